"""Host side of the chunked Triton scan: plans the grid, allocates, launches. Shapes as in `chunk_common`.

Tensors are `[B, T, H, K]`, or `[B, P, T, H, K]` with any strides over B, P and T (see `directions`).
"""

import functools
import math

import torch
from torch import Tensor

from hgrn2.ops import tiles
from hgrn2.ops.chunk_bwd import chunk_grad_kernel, chunk_value_grad_kernel
from hgrn2.ops.chunk_common import FAST_LIMIT, FAST_LIMIT_FP32
from hgrn2.ops.chunk_factors import chunk_factor_kernel
from hgrn2.ops.chunk_fwd import carry_kernel, chunk_out_kernel, chunk_state_kernel
from hgrn2.ops.chunk_safe import chunk_score_kernel
from hgrn2.ops.chunk_safe_bwd import chunk_safe_grad_kernel
from hgrn2.ops.gates import activation_code
from hgrn2.ops.launch import Plan, Plans, Slots, kinds, on_device

# sequences of fewer chunks are not worth splitting
_MIN_SPLIT = 16
# programs a multiprocessor that safe chunks are spread over at least, if there are as many
_SAFE_PROGRAMS = 16

_forward_plans, _backward_plans = Plans(), Plans()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def count_chunks(batch: int, time: int, dim: int, dtype: torch.dtype, documents: int | None) -> int:
    """Chunks in all; for packed documents an upper bound that needs no look at the device."""
    chunk = tiles.tiles_for(dim, dtype).chunk
    return batch * _cdiv(time, chunk) if documents is None else (time + documents * (chunk - 1)) // chunk


def chunk_table(cu_seqlens: Tensor, n_chunks: int, chunk: int, reverse: bool) -> Tensor:
    """`[NC, 4]` int32, made on the device: document, first token, rows (0: unused) and flags (1 first, 2 last)."""
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    per_doc = (end - start + chunk - 1) // chunk
    until = per_doc.cumsum(0)
    c = torch.arange(n_chunks, device=cu_seqlens.device)
    doc = torch.searchsorted(until, c, right=True)
    used = doc < start.numel()
    doc = doc.clamp(max=start.numel() - 1)
    index = c - (until - per_doc)[doc]
    done = index * chunk
    rows = torch.where(used, (end[doc] - start[doc] - done).clamp(max=chunk), 0)
    t0 = torch.where(used, end[doc] - 1 - done if reverse else start[doc] + done, 0)
    flags = torch.where(used, (index == 0) + 2 * (index == per_doc[doc] - 1), 0)
    return torch.stack([doc, t0, rows, flags], dim=1).to(torch.int32)


def saved_slots(n_chunks: int, heads: int, dim: int, dtype: torch.dtype, keep: bool, exact: bool) -> Slots:
    """What the forward leaves in one buffer: for the backward if `keep`, for an initial state's gradient if `exact`."""
    slots, chunk, product = Slots(), tiles.tiles_for(dim, dtype).chunk, tiles.product_dtype(dtype)
    for name in ("qx", "kx", "ex") if keep else ("qx", "kx"):
        slots.add(name, (n_chunks, heads, chunk, dim), product)
    slots.add("states", (n_chunks, heads, dim, dim), product)
    slots.add("a", (n_chunks, heads, chunk, chunk), product)
    slots.add("total", (n_chunks, heads, dim), torch.float32)
    if exact:
        slots.add("qf", (n_chunks, heads, chunk, dim), torch.float32)
    slots.add("safe", (n_chunks, heads), torch.int32)  # last: no gaps, which would hold anything
    return slots


class _Call:
    """Sizes and constants of one kind of call, which add its kernels to a plan; tensors have the names used here."""

    def __init__(self, q, f, v, lower_bound, lengths, others, n_chunks, packed_documents, reverse, q_act, v_act):
        *lines, self.time, self.heads, self.dim = q.shape
        self.batch = math.prod(lines)
        self.device, self.dtype, self.tiles = q.device, q.dtype, tiles.tiles_for(self.dim, q.dtype)
        chunk = self.tiles.chunk
        self.n_chunks, self.n_t, self.varlen = n_chunks, _cdiv(self.time, chunk), packed_documents
        precision, split, sub = tiles.arithmetic(q.dtype)
        self.values = dict(
            T=self.time, NT=self.n_t, P=1 if len(lines) == 1 else lines[1], NC=n_chunks, H=self.heads,
            sign=-1 if reverse else 1, has_len=int(lengths is not None), K=self.dim, C=chunk,
            SUB=sub, VARLEN=packed_documents, HAS_LB=lower_bound is not None, PRECISION=precision, SPLIT=split,
            Q_ACT=activation_code(q_act, q.dtype), V_ACT=activation_code(v_act, q.dtype),
        )  # fmt: skip
        self.lengths = "safe" if lengths is None else "len"  # any integers: they are not read
        self.plan = Plan(kinds((q, f, v, lower_bound, lengths, *others)))
        for name, x in (("q", q), ("f", f), ("v", v)):
            self.strides(name, x)
        self.scratch = Slots()
        self.masks = {name: tiles.sum_masks(size, q.device) for name, size in (("mask", chunk), ("mask32", 32))}

    def strides(self, name: str, x: Tensor) -> None:
        b, *p, t, h, _ = x.stride()
        self.values |= {f"{name}_stride_{axis}": s for axis, s in zip("bpth", (b, *(p or (0,)), t, h), strict=True)}

    def add(self, kernel, programs: int, tile: tiles.Kernel, values: dict | None = None, **names: str) -> None:
        values = self.values | dict(BK=tile.bk, BV=tile.bv, STAGES=tile.stages) | (values or {})
        self.plan.add(kernel, programs, tile.options, values, len=self.lengths, **names)

    def factors(self, keep: bool, exact: bool, fast_limit: float | None) -> None:
        if fast_limit is None:
            fast_limit = FAST_LIMIT_FP32 if self.dtype == torch.float32 else FAST_LIMIT
        tile = self.tiles.factor
        band = max(1, tile.bk // self.dim)
        values = dict(BH=band, BT=tile.bv, EXACT=exact, keep=int(keep), fast_limit=float(fast_limit))
        names = dict(qf="qf" if exact else "none", ex="ex" if keep else "qx")
        self.add(chunk_factor_kernel, self.n_chunks * _cdiv(self.heads, band), tile, values, **names)

    def states(self, x: str, y: str, states: str, enter: str, leave: str, backward: bool) -> None:
        """Chunk states, from `enter` to `leave` ("none": zero, not wanted); splits few long sequences."""
        tile = tiles.exact_state(self.dim) if x == "qf" else self.tiles.state
        blocks = self.heads * (self.dim // tile.bk) * (self.dim // tile.bv)
        multiprocessors = _multiprocessors(self.device)
        values = {f"y_stride_{axis}": self.values[f"{y}_stride_{axis}"] for axis in "bpth"} | dict(
            BACKWARD=backward, HAS_INIT=enter != "none", HAS_FINAL=leave != "none", EXACT=x == "qf",
            ACT=0 if backward else self.values["V_ACT"],
        )  # fmt: skip
        names = dict(x=x, y=y, states=states, init=enter, final=leave)

        def run(mode: int, segments: int, length: int, **more: str) -> None:
            more = {"seg": "none", "decay": "none"} | more
            self.add(chunk_state_kernel, segments * blocks, tile, values | dict(MODE=mode, L=length), **names, **more)

        if not self.varlen and (2 * self.batch * blocks >= multiprocessors or self.n_t < _MIN_SPLIT):
            run(0, self.batch, self.n_t)
            return
        length = max(_MIN_SPLIT // 2, _cdiv(self.n_chunks, max(1, 4 * multiprocessors // blocks)))
        segments = _cdiv(self.n_chunks, length)
        self.scratch.add("seg", (segments, self.heads, self.dim, self.dim), torch.float32)
        self.scratch.add("decay", (segments, self.heads, self.dim), torch.float32)
        if segments > 1:
            run(1, segments, length, seg="seg", decay="decay")
        rows = min(self.dim, max(1, 512 // self.dim))
        # a single segment starts from the zeros that this writes
        carry = dict(N_SEG=segments, BACKWARD=backward)
        self.add(carry_kernel, self.heads * (self.dim // rows), tiles.Kernel(rows, self.dim, 4), carry)
        run(2, segments, length, seg="seg")

    def safe_chunks(self, keep: bool) -> None:
        names = dict(mask="mask32", x="ex" if keep else "qx")
        self.add_safe(chunk_score_kernel, 1, self.tiles.score, dict(keep=int(keep)), **names)

    def add_safe(self, kernel, programs: int, tile: tiles.Kernel, values: dict, **names: str) -> None:
        """Add a kernel that takes `programs` programs for each safe chunk and head; groups of them share programs."""
        each = self.n_chunks * self.heads
        group = max(1, min(16, each * programs // (_SAFE_PROGRAMS * _multiprocessors(self.device))))
        self.add(kernel, _cdiv(each, group) * programs, tile, values | dict(GROUP=group), **names)

    def outputs(self, keep: bool, add: bool) -> None:
        tile = self.tiles.out
        programs = self.n_chunks * self.heads * (self.dim // tile.bv)
        values = dict(keep=int(keep), ADD=add, PRECISION=tiles.output_precision(self.dtype))
        self.add(chunk_out_kernel, programs, tile, values)

    def gradients(self, bound: bool, add: bool) -> None:
        values = dict(LB_GRAD=bound, ADD=add)
        dlb = "dlb" if bound else "none"
        tile, precise = self.tiles.dv, dict(PRECISION=tiles.output_precision(self.dtype))
        programs = self.n_chunks * self.heads * (self.dim // tile.bv)
        self.add(chunk_value_grad_kernel, programs, tile, values | precise, dlb=dlb)
        tile = self.tiles.grad
        self.add(chunk_grad_kernel, self.n_chunks * self.heads * (self.dim // tile.bk), tile, values, dlb=dlb)
        tile = self.tiles.safe_grad
        halves = self.tiles.chunk // 32
        names = dict(dlb=dlb, mask="mask32", x="ex")
        self.add_safe(chunk_safe_grad_kernel, halves * (self.dim // tile.bk), tile, values, **names)


def _boundary(like: Tensor, rows: int, other: Tensor | None, packed: bool) -> Tensor:
    """Room for the states at one end; an empty document passes on the state of the `other` end."""
    heads, dim = like.shape[-2:]
    state = like.new_empty(rows, heads, dim, dim, dtype=torch.float32)
    if packed:
        state.zero_() if other is None else state.copy_(other)
    return state


def _scratch(like: Tensor, slots: Slots) -> tuple[Slots, Tensor]:
    return slots, like.new_empty(slots.size, dtype=torch.uint8)


def _signature(q: Tensor, *tensors: Tensor | None) -> tuple:
    """What a plan depends on in its tensors; where all are aligned, as nearly always, quickly."""
    bits = q.data_ptr()
    for x in tensors:
        if x is not None:
            bits |= x.data_ptr()
    aligned = bits % 16 == 0 or tuple(x is not None and x.data_ptr() % 16 == 0 for x in (q, *tensors))
    return q.dtype, q.get_device(), q.shape, aligned, q.stride(), *(x if x is None else x.stride() for x in tensors)


def _on_its_device(run):
    """Launch on the device of the first argument, whichever is current."""

    @functools.wraps(run)
    def guarded(x, *args, **options):
        with on_device(x):
            return run(x, *args, **options)

    return guarded


@_on_its_device
def forward(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, reverse, output_final_state, q_act, v_act,
            fast_limit=None, keep=True, exact=False, o=None, add=False, buffer=None):  # fmt: skip
    """Outputs shaped like v, the final state `[N, H, K, V]` or None, and what `backward` needs: buffer and table.

    keep: a backward will follow; exact: with a gradient for the initial state. o, buffer: room for them, `add`: o holds
    what the outputs are added to.
    """
    *lines, time, heads, dim = q.shape
    batch = math.prod(lines)
    o = v.new_empty(q.shape) if o is None else o
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    options = (documents, reverse, output_final_state, q_act, v_act, fast_limit, keep, exact, add)
    key = (*_signature(q, f, v, lower_bound, initial_state, lengths, o), *options)
    found = _forward_plans.get(key)
    if found is None:
        n_chunks = count_chunks(batch, time, dim, q.dtype, documents)
        call = _Call(
            q, f, v, lower_bound, lengths, (initial_state, o), n_chunks, documents is not None, reverse, q_act, v_act
        )  # fmt: skip
        call.strides("o", o)
        call.factors(keep, exact, fast_limit)
        call.safe_chunks(keep)
        enter, leave = "none" if initial_state is None else "init", "final" if output_final_state else "none"
        call.states("kx", "v", "states", enter, leave, backward=False)
        call.outputs(keep, add)
        slots = saved_slots(n_chunks, heads, dim, q.dtype, keep, exact)
        found = call.plan, slots, call.scratch, n_chunks, call.masks
        _forward_plans[key] = found
    plan, slots, scratch, n_chunks, masks = found
    table = final = None
    if cu_seqlens is not None:
        table = chunk_table(cu_seqlens, n_chunks, tiles.tiles_for(dim, q.dtype).chunk, reverse)
    if output_final_state:
        final = _boundary(q, batch if documents is None else documents, initial_state, table is not None)
    buffer = q.new_empty(slots.size, dtype=torch.uint8) if buffer is None else buffer
    tensors = dict(
        q=q, f=f, v=v, lb=lower_bound, init=initial_state, final=final, len=lengths, table=table, o=o, **masks
    )  # fmt: skip
    plan.run(tensors, (slots, buffer), *((_scratch(q, scratch),) if scratch.of else ()))
    return o, final, buffer, table


@_on_its_device
def backward(do, d_final, q, f, v, lower_bound, lengths, buffer, table, reverse, q_act, v_act, lower_bound_grad,
             initial_rows: int | None, grads, add=False):  # fmt: skip
    """Gradients of lower_bound and the initial state (`initial_rows`); None where not asked.

    grads: dq, df and dv, of the same strides, to be written; `add`: they hold what the gradients are added to.
    """
    exact = initial_rows is not None
    dq, df, dv = grads
    options = (table is None, reverse, q_act, v_act, lower_bound_grad, exact, add, buffer.shape)
    key = (*_signature(q, f, v, do, lower_bound, d_final, lengths, dq), *options)
    found = _backward_plans.get(key)
    if found is None:
        *lines, time, heads, dim = q.shape
        n_chunks = count_chunks(math.prod(lines), time, dim, q.dtype, None) if table is None else table.shape[0]
        call = _Call(
            q, f, v, lower_bound, lengths, (do, d_final, dq), n_chunks, table is not None, reverse, q_act, v_act
        )  # fmt: skip
        call.strides("do", do)
        call.strides("g", dq)
        chunk, product = call.tiles.chunk, tiles.product_dtype(q.dtype)
        call.scratch.add("dstates", (n_chunks, heads, dim, dim), product)
        call.scratch.add("da", (n_chunks, heads, chunk, chunk), product)
        call.scratch.add("diag", (n_chunks, heads, chunk), torch.float32)
        enter, leave = "none" if d_final is None else "d_final", "d_initial" if exact else "none"
        call.states("qf" if exact else "qx", "do", "dstates", enter, leave, backward=True)
        call.gradients(lower_bound_grad, add)
        slots = saved_slots(n_chunks, heads, dim, q.dtype, True, exact)
        found = call.plan, slots, call.scratch, n_chunks, call.masks
        _backward_plans[key] = found
    plan, slots, scratch, n_chunks, masks = found
    heads, dim = q.shape[-2:]
    d_initial = dlb = None
    if exact:
        d_initial = _boundary(q, initial_rows, d_final, table is not None)
    if lower_bound_grad:
        dlb = q.new_empty(n_chunks, heads, dim, dtype=torch.float32)
    tensors = dict(
        q=q, f=f, v=v, do=do, lb=lower_bound, d_final=d_final, d_initial=d_initial, len=lengths, table=table,
        dq=dq, df=df, dv=dv, dlb=dlb, **masks,
    )  # fmt: skip
    plan.run(tensors, (slots, buffer), _scratch(q, scratch))
    return None if dlb is None else dlb.sum(0), d_initial
