"""Host side of the Triton scan for small states: cuts lines into segments, plans the launches, allocates.

Tensors are `[B, Y, X, H, K]` (1-D: Y = 1) and lines run along X; two-dimensional scans run along Y besides, on the same
memory. Kernels in `lane.forward` and `lane.backward`, shapes in `common`.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from triton import cdiv

from hgrn2.ops.gates import activation_code
from hgrn2.ops.lane.backward import scan_grad_kernel
from hgrn2.ops.lane.forward import scan_carry_kernel, scan_out_kernel, scan_segment_kernel
from hgrn2.ops.launch import (
    INTERPRET,
    Plan,
    Plans,
    Slots,
    kinds,
    multiprocessors,
    on_its_device,
    signature,
    with_buffer,
)
from hgrn2.ops.sequences import document_table, gradients

_WARPS = 1 if INTERPRET else 4
_LANES = 32 * _WARPS
# key channels of one lane: two share a head of 8, whose states would fill the registers of one
_KEYS = {1: 1, 2: 2, 4: 4, 8: 4}
# lanes per multiprocessor that a scan should have
_WANTED = {1: 512, 2: 512, 4: 512, 8: 512}
# tokens a segment: short ones stay in the cache from one loop to the next, long ones have fewer states to carry
_MIN_SEGMENT = 16
_MAX_SEGMENT = {1: 128, 2: 64, 4: 64, 8: 128}
# tokens at a time of (segments, outputs, gradients), as many more are on their way: registers and compile time grow
_UNROLL = {1: (8, 8, 4), 2: (8, 8, 4), 4: (4, 2, 4), 8: (4, 2, 2)}
# most registers a thread of (outputs, gradients): just under what lets one more program run beside
_REGISTERS = {1: (None, None), 2: (128, 168), 4: (None, None), 8: (None, None)}
# head dims whose states are cheaper to compute again than what they leave behind (see `lane.backward`)
_BLOCK = (1, 2)

_forward_plans, _backward_plans = Plans(), Plans()


@dataclasses.dataclass(frozen=True)
class Options:
    """The scan's direction (flip: reverse; both: and the opposite), axes (2: along X, 1: along Y) and activations."""

    flip: bool
    both: bool
    axes: tuple[int, ...]
    q_act: int
    v_act: int


def segment_length(lines: int, time: int, heads: int, dim: int, device: torch.device, stride: int) -> int:
    """Tokens a segment, a multiple of 8, for lines of `time` tokens that lie `stride` values apart."""
    wanted = multiprocessors(device) * _WANTED[dim]
    length = max(cdiv(time, cdiv(wanted, lines * heads * (dim // _KEYS[dim]))), _MIN_SEGMENT)
    # offsets inside a segment are 32 bits wide
    length = min(length, _MAX_SEGMENT[dim], max(8, (2**31 - 1) // max(1, stride) - 8))
    # equal segments, of whole rounds of loads
    return 8 * cdiv(cdiv(time, cdiv(time, length)), 8)


@functools.lru_cache(maxsize=1024)
def _are_vectors(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    dim = shape[-1]
    fine = all(size == 1 or stride % dim == 0 for size, stride in zip(shape[:-1], strides[:-1], strict=True))
    return fine and (strides[-1] == 1 or dim == 1)


def vectors(x: Tensor) -> Tensor:
    """x, copied only where a head's K values are not adjacent or not at multiples of K."""
    return x if _are_vectors(x.shape, x.stride()) else x.contiguous()


class _Lines:
    """All lines along one axis, which add their kernels to a plan; tensors have the names used here."""

    def __init__(
        self, plan: Plan, scratch: Slots, q: Tensor, options: Options, axis: int, flags: dict, documents, step, exact
    ):
        self.plan, self.scratch, self.options, self.axis = plan, scratch, options, axis
        self.heads, self.dim, self.device = q.shape[3], q.shape[4], q.device
        lines, time = q.shape[0] * q.shape[3 - axis], q.shape[axis]
        self.length = segment_length(lines, time, self.heads, self.dim, q.device, step)
        self.varlen = documents is not None
        if self.varlen:
            self.segments = per_line = (time + documents * (self.length - 1)) // self.length
            lines = 1
        else:
            per_line = cdiv(time, self.length)
            self.segments = lines * per_line
        self.lines, self.carried = lines, per_line > 1 or self.varlen
        self.keys = _KEYS[self.dim]
        self.exact = exact
        n = self.segments * self.heads * (self.dim // self.keys)
        self.blocks = cdiv(n, _LANES)
        self.values = flags | dict(
            N=n, T=time, P=q.shape[3 - axis], NS=per_line, NC=self.segments, L=self.length,
            H=self.heads, K=self.keys, V=self.dim, LANES=_LANES, FLIP=options.flip, BOTH=options.both,
            VARLEN=self.varlen, EXACT=exact,
            Q_ACT=activation_code(options.q_act, q.dtype), V_ACT=activation_code(options.v_act, q.dtype),
        )  # fmt: skip
        self.absent = {
            name: "none" for name, there in (("lb", flags["HAS_LB"]), ("len", flags["HAS_LEN"])) if not there
        }
        self.absent |= {} if self.varlen else {"table": "none"}

    def strides(self, name: str, x: Tensor) -> None:
        """Strides over (batch, line, token, head) in units of K."""
        b, y, x_, h = (0 if n == 1 else s // self.dim for n, s in zip(x.shape[:4], x.stride()[:4], strict=True))
        order = (b, y, x_, h) if self.axis == 2 else (b, x_, y, h)
        self.values |= {f"{name}_stride_{dim}": s for dim, s in zip("bpth", order, strict=True)}

    def _add(
        self, kernel, programs: int, values: dict, warps: int = _WARPS, registers: int | None = None, **names: str
    ) -> None:
        options = dict(num_warps=warps) | ({} if registers is None else dict(maxnreg=registers))
        self.plan.add(kernel, programs, options, self.values | values, **self.absent, **names)

    def _checkpoints(self, unroll: int) -> tuple[int, ...]:
        return self.blocks, self.length // unroll, self.dim, _LANES, self.keys

    def states(self, slots: Slots, name: str, enter: str, leave: str, grad: bool) -> str:
        """The states that enter the segments (grad: their gradients) from `enter` to `leave`; the name they have."""
        if not self.carried:
            return enter
        shape = (2 if self.options.both else 1, self.segments, self.heads, self.dim, self.dim)
        name = f"{name}{self.axis}"
        slots.add(name, shape, torch.float32)
        decay = f"decay{len(self.scratch.of)}"
        self.scratch.add(decay, shape[1:-1], torch.float32)
        x, y = ("q", "do") if grad else ("f", "v")
        values = {
            f"{to}_stride_{d}": self.values[f"{of}_stride_{d}"] for to, of in (("x", x), ("y", y)) for d in "bpth"
        }
        acts = dict(X_ACT=self.values["Q_ACT"], Y_ACT=0) if grad else dict(X_ACT=0, Y_ACT=self.values["V_ACT"])
        values |= dict(GRAD=grad, UNROLL=_UNROLL[self.dim][0], **acts)
        self._add(scan_segment_kernel, self.blocks, values, x=x, y=y, own=name, decay=decay)
        rows = self.lines * self.heads * self.dim
        lanes = 32  # one warp a program: the loop over segments waits for memory, and there are few rows
        values = dict(
            N=rows, K=self.dim, LANES=lanes, UNROLL=8, GRAD=grad, HAS_INIT=enter != "none", HAS_FINAL=leave != "none"
        )  # fmt: skip
        self._add(
            scan_carry_kernel, shape[0] * cdiv(rows, lanes), values, 1, own=name, decay=decay, init=enter, final=leave
        )  # fmt: skip
        return name

    def outputs(self, enter: str, leave: str, add: bool) -> None:
        leave = "none" if self.carried else leave
        block = self.options.both and self.dim in _BLOCK
        unroll = _UNROLL[self.dim][1]
        values = dict(UNROLL=unroll, ADD=add, BLOCK=block, HAS_ENTER=enter != "none", HAS_LEAVE=leave != "none")
        scratch = f"checkpoints{self.axis}" if block else "none"
        if block:
            self.scratch.add(scratch, self._checkpoints(unroll), torch.float32)
        registers = _REGISTERS[self.dim][0]
        self._add(
            scan_out_kernel, self.blocks, values, registers=registers, enter=enter, leave=leave, scratch=scratch
        )  # fmt: skip

    def gradients(self, enter: str, d_enter: str, d_leave: str, bound: bool, add: bool) -> None:
        """dq, df and dv, and the segments' shares of d lower_bound."""
        block, d_leave = self.exact or self.dim in _BLOCK, "none" if self.carried else d_leave
        shape = (self.blocks, self.length, _LANES, self.keys)
        unroll = gradient_unroll(self.dim, self.exact)
        if block:
            shape = self._checkpoints(unroll)
        names = dict(enter=enter, d_enter=d_enter, d_leave=d_leave, dk=f"dk{self.axis}", dq2="none", dlb="none")
        self.scratch.add(names["dk"], shape, torch.float32)
        if self.options.both:
            names["dq2"] = f"dq2{self.axis}"
            self.scratch.add(names["dq2"], shape, torch.float32)
        if bound:
            names["dlb"] = f"dlb{self.axis}"
        values = dict(
            UNROLL=unroll, ADD=add, BLOCK=block, LB_GRAD=bound, HAS_ENTER=enter != "none",
            HAS_D_ENTER=d_enter != "none", HAS_D_LEAVE=d_leave != "none",
        )  # fmt: skip
        self._add(scan_grad_kernel, self.blocks, values, registers=_REGISTERS[self.dim][1], **names)


def gradient_unroll(dim: int, exact: bool) -> int:
    """Tokens at a time in the backward's loops; where exact, states of each of them are held, too."""
    return min(_UNROLL[dim][2], 2) if exact and dim > 2 else _UNROLL[dim][2]


def _is_exact(dtype: torch.dtype, initial: bool) -> bool:
    """For fp32 inputs and the initial state's gradient: the hardware's fast functions and running sums would show."""
    return dtype == torch.float32 or initial


def _lines(plan, scratch, options, q, f, v, lower_bound, lengths, documents, initial=False) -> list[_Lines]:
    exact = _is_exact(q.dtype, initial)
    flags = dict(HAS_LEN=lengths is not None, HAS_LB=lower_bound is not None)
    found = []
    for axis in options.axes:
        step = max(x.stride(axis) for x in (q, f, v))
        lines = _Lines(plan, scratch, q, options, axis, flags, documents, step, exact)
        for name, x in (("q", q), ("f", f), ("v", v)):
            lines.strides(name, x)
        found.append(lines)
    return found


def _turned(state: Tensor | None) -> Tensor | None:
    """`[N, H, K, V]` to the kernels' `[N, H, V, K]`, or back; always in fresh memory, which is aligned."""
    return None if state is None else state.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _ends(q: Tensor, documents: int | None, other: Tensor | None) -> Tensor:
    """Room for the states at one end; an empty document passes on the state of the other end."""
    if documents is not None and other is not None:
        return other.clone()
    make = torch.empty if documents is None else torch.zeros
    rows = q.shape[0] if documents is None else documents
    return make(rows, q.shape[3], q.shape[4], q.shape[4], dtype=torch.float32, device=q.device)


@on_its_device
def forward(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, options: Options, final: bool):
    """o `[B, Y, X, H, V]`, the final states `[N, H, K, V]` (None unless `final`), and a buffer for `backward`."""
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    key = (*signature(q, f, v, lower_bound, initial_state, lengths), documents, options, final)
    found = _forward_plans.get(key)
    if found is None:
        plan, saved, scratch = Plan(kinds((q, f, v, lower_bound, lengths, initial_state))), Slots(), Slots()
        like = torch.empty(q.shape, device="meta")
        enter, leave = "none" if initial_state is None else "init", "final" if final else "none"
        every = _lines(plan, scratch, options, q, f, v, lower_bound, lengths, documents)
        for i, lines in enumerate(every):
            lines.strides("o", like)
            lines.outputs(lines.states(saved, "states", enter, leave, False), leave, i > 0)
        found = _forward_plans[key] = plan, saved, scratch, every[0].segments, every[0].length
    plan, saved, scratch, segments, length = found
    o = q.new_empty(q.shape)
    enter = _turned(initial_state)
    leave = _ends(q, documents, enter) if final else None
    table = None if documents is None else document_table(cu_seqlens, segments, length, False)
    kept = with_buffer(q, saved)
    tensors = dict(q=q, f=f, v=v, o=o, lb=lower_bound, len=lengths, table=table, init=enter, final=leave)
    plan.run(tensors, kept, with_buffer(q, scratch))
    return o, _turned(leave), kept[1]


@on_its_device
def backward(q, f, v, do, d_final, lower_bound, initial_state, lengths, cu_seqlens, options: Options,
             kept: Tensor | None, bound: bool, initial: bool, packed: bool = False):  # fmt: skip
    """dq, df, dv `[B, Y, X, H, K]`, d lower_bound `[H, K]` and d initial_state `[N, H, K, V]`; None where not asked.

    kept: the buffer that `forward` returned, or None to compute the states again. packed: where q, f and v are slots of
    one packed projection, their gradients are slots of one tensor, too.
    """
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, df, dv = gradients(q, f, v, packed)
    # slots of a packed gradient may be aligned less than fresh tensors
    tensors = (q, f, v, do, lower_bound, initial_state, lengths, d_final, dq, df, dv)
    key = (*signature(*tensors), documents, options, kept is None, bound, initial)
    found = _backward_plans.get(key)
    if found is None:
        plan = Plan(kinds((q, f, v, do, lower_bound, lengths, initial_state, d_final, dq, df, dv)))
        saved, scratch = Slots(), Slots()
        enter, d_enter = "none" if initial_state is None else "init", "none" if d_final is None else "d_final"
        d_leave = "d_initial" if initial else "none"
        every = _lines(plan, scratch, options, q, f, v, lower_bound, lengths, documents, initial)
        if bound:  # all shares in one slot, for one sum; parts are aligned to a head's values, as a lane's store needs
            scratch.add("dlb", (sum(x.segments for x in every), *q.shape[3:]), torch.float32)
            for i, x in enumerate(every):
                scratch.part(f"dlb{x.axis}", "dlb", sum(y.segments for y in every[:i]), x.segments)
        for i, lines in enumerate(every):
            lines.strides("do", do)
            lines.strides("g", dq)
            target = plan if kept is None else Plan(())  # the forward's launches, which only name its buffer's slots
            lines.plan = target
            states = lines.states(saved, "states", enter, "none", False)
            lines.plan = plan
            d_states = lines.states(scratch, "d_states", d_enter, d_leave, True)
            lines.gradients(states, d_states, d_leave, bound, i > 0)
        found = _backward_plans[key] = plan, saved, scratch, every[0].segments, every[0].length
    plan, saved, scratch, segments, length = found
    enter, d_enter = _turned(initial_state), _turned(d_final)
    d_leave = _ends(q, documents, d_enter) if initial else None
    table = None if documents is None else document_table(cu_seqlens, segments, length, False)
    tensors = dict(
        q=q, f=f, v=v, do=do, dq=dq, df=df, dv=dv, lb=lower_bound, len=lengths, table=table, init=enter,
        d_final=d_enter, d_initial=d_leave,
    )  # fmt: skip
    work = with_buffer(q, scratch)
    plan.run(tensors, with_buffer(q, saved) if kept is None else (saved, kept), work)
    d_bound = scratch.view(work[1], "dlb").sum(0) if bound else None
    return dq, df, dv, d_bound, _turned(d_leave)
