"""Host side of the Triton scan for small states: cuts lines into segments, allocates, launches.

Tensors are `[B, Y, X, H, K]` (1-D: Y = 1) and lines run along X; two-dimensional scans run along Y besides, on the same
memory. Kernels in `scan_fwd` and `scan_bwd`, shapes in `scan_common`.
"""

import dataclasses

import torch
from torch import Tensor

from hgrn2.ops import tiles
from hgrn2.ops.chunk import _multiprocessors, _on_its_device, chunk_table
from hgrn2.ops.launch import kinds, launch
from hgrn2.ops.scan_bwd import scan_grad_kernel
from hgrn2.ops.scan_fwd import scan_carry_kernel, scan_out_kernel, scan_segment_kernel

# enough threads to hide memory's latency; more segments only add states to carry
_LANES_PER_MULTIPROCESSOR = 512
_MIN_SEGMENT = 16
_WARPS = 1 if tiles.INTERPRET else 4
# tokens in flight per thread
_UNROLL = {1: 8, 2: 8, 4: 4, 8: 2}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def segment_length(lines: int, time: int, heads: int, device: torch.device, stride: int) -> int:
    """Tokens a segment: a multiple of 8; all of `time` where lines and heads alone fill the device."""
    wanted = _multiprocessors(device) * _LANES_PER_MULTIPROCESSOR
    segments = 1 if 3 * lines * heads >= wanted else _cdiv(wanted, lines * heads)
    length = max(_cdiv(time, segments), _MIN_SEGMENT)
    # offsets inside a segment are 32 bits wide
    length = min(length, max(8, (2**31 - 1) // max(1, stride) - 8))
    return 8 * _cdiv(length, 8)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the lines have in common: the scan's direction, activations (indices into `ACTIVATIONS`)."""

    flip: bool
    both: bool
    q_act: int
    v_act: int


def _strides(x: Tensor, axis: int) -> tuple[int, ...]:
    """Strides over (batch, line, token, head) of x `[B, Y, X, H, K]` for lines along `axis`, in units of K."""
    dim = x.shape[-1]
    b, y, x_, h = (0 if size == 1 else stride // dim for size, stride in zip(x.shape[:4], x.stride()[:4], strict=True))
    return (b, y, x_, h) if axis == 2 else (b, x_, y, h)


def vectors(x: Tensor) -> Tensor:
    """x, copied only where a head's K values are not adjacent or not at multiples of K."""
    dim = x.shape[-1]
    fine = x.stride(-1) == 1 or dim == 1
    fine = fine and all(size == 1 or s % dim == 0 for size, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    return x if fine else x.contiguous()


class Lines:
    """All lines along one axis of q, f, v: their segments and the launches over them."""

    def __init__(self, q, f, v, lower_bound, lengths, cu_seqlens, options: Options, axis: int = 2):
        self.q, self.f, self.v, self.lower_bound, self.lengths = q, f, v, lower_bound, lengths
        self.options, self.axis = options, axis
        self.batch, self.heads, self.dim = q.shape[0], q.shape[3], q.shape[4]
        self.time, self.lines = q.shape[axis], q.shape[3 - axis]
        step = max(_strides(x, axis)[2] for x in (q, f, v)) * self.dim
        lines = self.batch * self.lines
        self.length = segment_length(lines, self.time, self.heads, q.device, step)
        self.table = None
        if cu_seqlens is None:
            self.per_line = _cdiv(self.time, self.length)
            self.segments = lines * self.per_line
        else:
            documents = cu_seqlens.numel() - 1
            self.segments = self.per_line = (self.time + documents * (self.length - 1)) // self.length
            self.table = chunk_table(cu_seqlens, self.segments, self.length, False)
        self.carried = self.per_line > 1 or self.table is not None
        self.lanes = self.segments * self.heads
        self.sizes = (
            self.lanes, self.time, self.lines, self.per_line, self.segments, self.length, self.heads,
        )  # fmt: skip
        self.layout = dict(
            K=self.dim, LANES=32 * _WARPS, UNROLL=_UNROLL[self.dim], FLIP=options.flip, BOTH=options.both,
            VARLEN=self.table is not None, HAS_LEN=lengths is not None, HAS_LB=lower_bound is not None,
        )  # fmt: skip

    def _launch(self, kernel, args: tuple, tensors: tuple, lanes: int | None = None, **constants) -> None:
        programs = _cdiv(self.lanes if lanes is None else lanes, 32 * _WARPS)
        launch(kernel, programs, args, constants, _WARPS, kinds(tensors))

    def states(self, enter: Tensor | None, leave: Tensor | None, do: Tensor | None = None) -> Tensor | None:
        """The states `[slots, NC, H, V, K]` that enter the segments (do: their gradients), None where all are zero.

        enter, leave: `[lines or documents, H, V, K]`, at the ends of the scan; `leave` is written, here if segments
        are carried, else by the kernel that runs over them.
        """
        if not self.carried:
            return None if enter is None else enter.unsqueeze(0)
        opts, grad = self.options, do is not None
        slots = 2 if opts.both else 1
        x, y = (self.q, do) if grad else (self.f, self.v)
        own = x.new_empty(slots, self.segments, self.heads, self.dim, self.dim, dtype=torch.float32)
        decay = x.new_empty(self.segments, self.heads, self.dim, dtype=torch.float32)
        args = (
            self.f, x, y, self.lower_bound, own, decay, self.table, self.lengths,
            *_strides(self.f, self.axis), *_strides(x, self.axis), *_strides(y, self.axis), *self.sizes,
        )  # fmt: skip
        acts = dict(X_ACT=opts.q_act if grad else 0, Y_ACT=0 if grad else opts.v_act)
        self._launch(scan_segment_kernel, args, (self.f, x, y, self.lengths), GRAD=grad, **self.layout, **acts)
        rows = (1 if self.table is not None else self.batch * self.lines) * self.heads * self.dim
        args = (own, decay, enter, leave, self.table, rows, self.per_line, self.segments, self.heads)
        constants = {key: self.layout[key] for key in ("K", "LANES", "FLIP", "BOTH", "VARLEN")}
        constants |= dict(UNROLL=4, GRAD=grad, HAS_INIT=enter is not None, HAS_FINAL=leave is not None)
        lanes = slots * 32 * _WARPS * _cdiv(rows, 32 * _WARPS)
        self._launch(scan_carry_kernel, args, (enter, leave), lanes, **constants)
        return own

    def outputs(self, o: Tensor, states: Tensor | None, leave: Tensor | None, add: bool) -> None:
        """Write (add: add to) o; leave: `[lines, H, V, K]` for the final states of lines of one segment."""
        leave = None if self.carried else leave
        args = (
            self.q, self.f, self.v, self.lower_bound, o, states, leave, self.table, self.lengths,
            *(s for x in (self.q, self.f, self.v, o) for s in _strides(x, self.axis)), *self.sizes,
        )  # fmt: skip
        self._launch(
            scan_out_kernel, args, (self.q, self.f, self.v, self.lengths, states), Q_ACT=self.options.q_act,
            V_ACT=self.options.v_act, ADD=add, HAS_ENTER=states is not None, HAS_LEAVE=leave is not None, **self.layout,
        )  # fmt: skip

    def gradients(self, do, grads, scratch, states, d_states, d_initial, bound: bool, add: bool) -> Tensor | None:
        """Write (add: add to) grads = (dq, df, dv); returns d lower_bound `[H, K]` if `bound`."""
        d_bound = None
        if bound:
            d_bound = do.new_empty(self.segments, self.heads, self.dim, dtype=torch.float32)
        d_leave = None if self.carried else d_initial
        kept = [x.view(torch.int16) if self.dim == 8 else x for x in scratch]
        args = (
            self.q, self.f, self.v, do, self.lower_bound, *grads, d_bound, kept[0], kept[-1], states, d_states,
            d_leave, self.table, self.lengths,
            *(s for x in (self.q, self.f, self.v, do, grads[0], scratch[0]) for s in _strides(x, self.axis)),
            *self.sizes,
        )  # fmt: skip
        self._launch(
            scan_grad_kernel, args, (self.q, self.f, self.v, do, self.lengths, states, d_states),
            Q_ACT=self.options.q_act, V_ACT=self.options.v_act, ADD=add, LB_GRAD=bound, HAS_ENTER=states is not None,
            HAS_D_ENTER=d_states is not None, HAS_D_LEAVE=d_leave is not None, **self.layout,
        )  # fmt: skip
        return None if d_bound is None else d_bound.sum(0)


def _turned(state: Tensor | None) -> Tensor | None:
    """`[N, H, K, V]` to the kernels' `[N, H, V, K]`, or back."""
    return None if state is None else state.transpose(-1, -2).contiguous()


def _axes(q, f, v, lower_bound, lengths, cu_seqlens, options: Options, grid: bool) -> list[Lines]:
    return [Lines(q, f, v, lower_bound, lengths, cu_seqlens, options, axis) for axis in ((2, 1) if grid else (2,))]


def _ends(q: Tensor, cu_seqlens: Tensor | None, other: Tensor | None) -> Tensor:
    """Room for the states at one end; an empty document passes on the state of the other end."""
    rows = q.shape[0] * q.shape[1] if cu_seqlens is None else cu_seqlens.numel() - 1
    if cu_seqlens is not None and other is not None:
        return other.clone()
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(rows, q.shape[3], q.shape[4], q.shape[4], dtype=torch.float32, device=q.device)


@_on_its_device
def forward(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, options: Options, grid: bool, final: bool):
    """o `[B, Y, X, H, V]`, the final states `[N, H, K, V]` (None unless `final`), and the states to keep per axis."""
    o = q.new_empty(q.shape)
    enter = _turned(initial_state)
    leave = _ends(q, cu_seqlens, enter) if final else None
    kept = []
    for i, lines in enumerate(_axes(q, f, v, lower_bound, lengths, cu_seqlens, options, grid)):
        states = lines.states(enter, leave)
        lines.outputs(o, states, leave, add=i > 0)
        kept.append(states)
    return o, _turned(leave), kept


@_on_its_device
def backward(q, f, v, do, d_final, lower_bound, initial_state, lengths, cu_seqlens, options: Options, grid: bool,
             kept: list[Tensor | None] | None, bound: bool, initial: bool):  # fmt: skip
    """dq, df, dv `[B, Y, X, H, K]`, d lower_bound `[H, K]` and d initial_state `[N, H, K, V]`; None where not asked.

    kept: the states that `forward` returned, or None to compute them again.
    """
    grads = tuple(q.new_empty(q.shape) for _ in range(3))
    scratch = [q.new_empty(q.shape, dtype=torch.float32) for _ in range(2 if options.both else 1)]
    enter, d_enter = _turned(initial_state), _turned(d_final)
    d_leave = _ends(q, cu_seqlens, d_enter) if initial else None
    d_bound = None
    for i, lines in enumerate(_axes(q, f, v, lower_bound, lengths, cu_seqlens, options, grid)):
        states = lines.states(enter, None) if kept is None else kept[i]
        d_states = lines.states(d_enter, d_leave, do)
        share = lines.gradients(do, grads, scratch, states, d_states, d_leave, bound, add=i > 0)
        d_bound = share if d_bound is None else d_bound + share
    return *grads, d_bound, _turned(d_leave)
