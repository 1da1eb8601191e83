"""Host side of the chunked Triton scan: plans the grid, allocates, launches. Shapes as in `chunk_common`."""

import dataclasses
import functools

import torch
from torch import Tensor

from hgrn2.ops import tiles
from hgrn2.ops.chunk_bwd import chunk_grad_kernel
from hgrn2.ops.chunk_common import FAST_LIMIT, FAST_LIMIT_FP32
from hgrn2.ops.chunk_factors import chunk_factor_kernel
from hgrn2.ops.chunk_fwd import carry_kernel, chunk_out_kernel, chunk_state_kernel
from hgrn2.ops.launch import kinds, launch

# sequences of fewer chunks are not worth splitting
_MIN_SPLIT = 16


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


@dataclasses.dataclass
class Saved:
    """What the forward leaves for the backward."""

    qx: Tensor
    kx: Tensor
    ex: Tensor
    total: Tensor
    safe: Tensor
    states: Tensor
    table: Tensor | None


class Scan:
    """One call of the scan: its tensors, sizes and the constants all its kernels share."""

    def __init__(self, q, f, v, lower_bound, lengths, table, n_chunks, reverse, q_act, v_act, others, fast_limit=None):
        self.q, self.f, self.v, self.lower_bound, self.lengths, self.table = q, f, v, lower_bound, lengths, table
        self.batch, self.time, self.heads, self.dim = q.shape
        self.tiles = tiles.tiles_for(self.dim, q.dtype)
        self.n_chunks, self.n_t = n_chunks, _cdiv(self.time, self.tiles.chunk)
        self.q_act, self.v_act, self.reverse = q_act, v_act, reverse
        default = FAST_LIMIT_FP32 if q.dtype == torch.float32 else FAST_LIMIT
        self.fast_limit = default if fast_limit is None else fast_limit
        self.precision, self.split = tiles.arithmetic(q.dtype)
        self.masks = tiles.sum_masks(self.tiles.chunk, q.device)
        self.key = kinds((q, f, v, lower_bound, lengths, *others))
        self.layout = dict(
            K=self.dim, C=self.tiles.chunk, REVERSE=reverse, VARLEN=table is not None, HAS_LEN=lengths is not None,
            PRECISION=self.precision,
        )  # fmt: skip
        self.scores = dict(
            LOG_C=self.tiles.chunk.bit_length() - 1, HAS_LB=lower_bound is not None, Q_ACT=q_act, V_ACT=v_act,
            SPLIT=self.split,
        )  # fmt: skip

    def factors(self) -> tuple[Tensor, ...]:
        """qx, kx, ex `[NC, H, C, K]`, total `[NC, H, K]` and the safe flags `[NC, H]`."""
        tile, q, f = self.tiles.factor, self.q, self.f
        shape = (self.n_chunks, self.heads, self.tiles.chunk, self.dim)
        qx, kx, ex = (q.new_empty(shape, dtype=tiles.product_dtype(q.dtype)) for _ in range(3))
        total = q.new_empty(self.n_chunks, self.heads, self.dim, dtype=torch.float32)
        safe = q.new_empty(self.n_chunks, self.heads, dtype=torch.int32)
        band = max(1, tile.bk // self.dim)
        args = (
            q, f, self.lower_bound, qx, kx, ex, total, safe, self.table, self.lengths, *q.stride()[:3], *f.stride()[:3],
            self.time, self.n_t, self.heads, self.fast_limit,
        )  # fmt: skip
        constants = dict(
            BH=band,
            BT=tile.bv,
            HAS_LB=self.lower_bound is not None,
            Q_ACT=self.q_act,
            STAGES=tile.stages,
            **self.layout,
        )
        launch(chunk_factor_kernel, self.n_chunks * _cdiv(self.heads, band), args, constants, tile.warps, self.key)
        return qx, kx, ex, total, safe

    def states(self, x, y, total, safe, enter, leave, *, backward: bool, act: int) -> Tensor:
        """Chunk states `[NC, H, K, V]`, from `enter` to `leave` (`[N, H, K, V]` or None); splits few long sequences."""
        tile = self.tiles.state
        shape = (self.heads, self.dim, self.dim)
        states = x.new_empty(self.n_chunks, *shape)
        blocks = self.heads * (self.dim // tile.bk) * (self.dim // tile.bv)
        multiprocessors = _multiprocessors(x.device)

        constants = dict(
            BK=tile.bk, BV=tile.bv, BACKWARD=backward, HAS_INIT=enter is not None, HAS_FINAL=leave is not None, ACT=act,
            STAGES=tile.stages, **self.layout,
        )  # fmt: skip

        def run(mode: int, segments: int, length: int, seg: Tensor | None, decay: Tensor | None) -> None:
            args = (
                x, y, total, safe, enter, leave, states, seg, decay, self.table, self.lengths, *y.stride()[:3],
                self.time, self.n_t, self.n_chunks, self.heads, length,
            )  # fmt: skip
            launch(chunk_state_kernel, segments * blocks, args, constants | dict(MODE=mode), tile.warps, self.key)

        if self.table is None and (2 * self.batch * blocks >= multiprocessors or self.n_t < _MIN_SPLIT):
            run(0, self.batch, self.n_t, None, None)
            return states
        length = max(_MIN_SPLIT // 2, _cdiv(self.n_chunks, max(1, 4 * multiprocessors // blocks)))
        segments = _cdiv(self.n_chunks, length)
        seg = x.new_zeros(segments, *shape, dtype=torch.float32)
        if segments > 1:
            decay = x.new_empty(segments, self.heads, self.dim, dtype=torch.float32)
            run(1, segments, length, seg, decay)
            rows = min(self.dim, max(1, 512 // self.dim))
            launch(
                carry_kernel,
                self.heads * (self.dim // rows),
                (seg, decay, self.heads, segments),
                dict(K=self.dim, BK=rows, BACKWARD=backward),
                4,
                self.key,
            )
        run(2, segments, length, seg, None)
        return states

    def outputs(self, qx, kx, safe, states, do: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """o `[B, T, H, V]`. With do and the states' gradient: dv, and do v^T below and on the diagonal."""
        grad = do is not None
        tile = self.tiles.dv if grad else self.tiles.out
        q, f, v = self.q, self.f, self.v
        y = do if grad else v
        o = v.new_empty(self.batch, self.time, self.heads, self.dim)
        da = diag = None
        if grad:
            shape = (self.n_chunks, self.heads, self.tiles.chunk, self.tiles.chunk)
            da, diag = qx.new_empty(shape), qx.new_empty(shape[:-1], dtype=torch.float32)
        args = (
            qx, kx, q, f, v, y, self.lower_bound, self.masks, safe, states, o, da, diag, self.table, self.lengths,
            *q.stride()[:3], *f.stride()[:3], *v.stride()[:3], *y.stride()[:3], self.time, self.n_t, self.heads,
        )  # fmt: skip
        constants = dict(BK=tile.bk, BV=tile.bv, GRAD=grad, STAGES=tile.stages, **self.scores, **self.layout)
        programs = self.n_chunks * self.heads * (self.dim // tile.bv)
        for run_safe in (False, True):
            launch(chunk_out_kernel, programs, args, constants | dict(SAFE=run_safe), tile.warps, self.key)
        return o, da, diag

    def gate_gradients(self, saved: Saved, d_states: Tensor, da: Tensor, diag: Tensor, do: Tensor, bound: bool):
        """dq, df `[B, T, H, K]` and, if `bound`, d lower_bound `[H, K]`, else None."""
        tile = self.tiles.grad
        q, f, v = self.q, self.f, self.v
        dq, df = (q.new_empty(q.shape) for _ in range(2))
        d_bound = None
        if bound:  # chunks that stay unused write nothing
            make = q.new_empty if self.table is None else q.new_zeros
            d_bound = make(self.n_chunks, self.heads, self.dim, dtype=torch.float32)
        args = (
            saved.qx, saved.kx, saved.ex, q, f, v, do, self.lower_bound, self.masks, saved.total, saved.safe,
            saved.states, d_states, da, diag, dq, df, d_bound, self.table, self.lengths,
            *q.stride()[:3], *f.stride()[:3], *v.stride()[:3], *do.stride()[:3], self.time, self.n_t, self.heads,
        )  # fmt: skip
        constants = dict(BK=tile.bk, BV=tile.bv, LB_GRAD=bound, STAGES=tile.stages, **self.scores, **self.layout)
        programs = self.n_chunks * self.heads * (self.dim // tile.bk)
        for run_safe in (False, True):
            launch(chunk_grad_kernel, programs, args, constants | dict(SAFE=run_safe), tile.warps, self.key)
        return dq, df, None if d_bound is None else d_bound.sum(0)


def _boundary(like: Tensor, rows: int, other: Tensor | None, packed: bool) -> Tensor:
    """Room for the states at one end; an empty document passes on the state of the `other` end."""
    heads, dim = like.shape[-2:]
    state = like.new_empty(rows, heads, dim, dim, dtype=torch.float32)
    if packed:
        state.zero_() if other is None else state.copy_(other)
    return state


def _on_its_device(run):
    """Launch on the device of the first argument, whichever is current."""

    @functools.wraps(run)
    def guarded(x, *args, **options):
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return run(x, *args, **options)
        with torch.cuda.device(x.device):
            return run(x, *args, **options)

    return guarded


@_on_its_device
def forward(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, reverse, output_final_state, q_act, v_act,
            fast_limit=None):  # fmt: skip
    """Outputs `[B, T, H, V]`, the final state `[N, H, K, V]` or None, and what `backward` needs."""
    batch, time, _, dim = q.shape
    documents = None if cu_seqlens is None else cu_seqlens.numel() - 1
    n_chunks = count_chunks(batch, time, dim, q.dtype, documents)
    table = None
    if cu_seqlens is not None:
        table = chunk_table(cu_seqlens, n_chunks, tiles.tiles_for(dim, q.dtype).chunk, reverse)
    others = (initial_state,)
    scan = Scan(q, f, v, lower_bound, lengths, table, n_chunks, reverse, q_act, v_act, others, fast_limit)
    final = None
    if output_final_state:
        final = _boundary(q, batch if documents is None else documents, initial_state, table is not None)
    qx, kx, ex, total, safe = scan.factors()
    states = scan.states(kx, v, total, safe, initial_state, final, backward=False, act=v_act)
    return scan.outputs(qx, kx, safe, states)[0], final, Saved(qx, kx, ex, total, safe, states, table)


@_on_its_device
def backward(do, d_final, q, f, v, lower_bound, lengths, saved: Saved, reverse, q_act, v_act, lower_bound_grad,
             initial_rows: int | None):  # fmt: skip
    """Gradients of q, f, v (contiguous), lower_bound and the initial state (`initial_rows`); None where not asked."""
    n_chunks = saved.states.shape[0]
    scan = Scan(q, f, v, lower_bound, lengths, saved.table, n_chunks, reverse, q_act, v_act, (do, d_final))
    d_initial = None
    if initial_rows is not None:
        d_initial = _boundary(q, initial_rows, d_final, saved.table is not None)
    d_states = scan.states(saved.qx, do, saved.total, saved.safe, d_final, d_initial, backward=True, act=0)
    dv, da, diag = scan.outputs(saved.qx, saved.kx, saved.safe, d_states, do)
    dq, df, d_bound = scan.gate_gradients(saved, d_states, da, diag, do, lower_bound_grad)
    return dq, df, dv, d_bound, d_initial
