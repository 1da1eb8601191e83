"""The scans of one call of the chunked kernels: one, or pairs in opposite directions, the second adding to the first.

Shapes: B batch, T time, Y and X rows and columns of a grid, H heads, K = V head dim. Columns of `[B, Y, X, H, K]` are
read and written in place: to the kernels they are the lines of `[B, X, Y, H, K]` with other strides.
"""

import functools
import math

import torch
from torch import Tensor

# those after "both" are for grids; "rows" and "columns" run both ways along one axis
DIRECTIONS = ("forward", "reverse", "both", "2d", "rows", "columns")
# (along columns, reverse)
_AHEAD, _BACK, _DOWN, _UP = (False, False), (False, True), (True, False), (True, True)
SCANS = {
    "forward": (_AHEAD,),
    "reverse": (_BACK,),
    "both": (_AHEAD, _BACK),
    "2d": (_AHEAD, _BACK, _DOWN, _UP),
    "rows": (_AHEAD, _BACK),
    "columns": (_DOWN, _UP),
}


def _lines(columns: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, P, T, H, K]` (sequences: `[B, T, H, K]`) for scans along T."""
    return tuple(x.transpose(1, 2) for x in tensors) if columns else tensors


def layout(shape, dtype, direction: str, packed: int | None, keep: bool, exact: bool) -> tuple[list, list]:
    """Chunks of each scan (`packed` where documents make them), and where its buffer begins in that of the call;
    the latter list ends with the size of the whole."""
    from hgrn2.ops.chunk import count_chunks, saved_slots  # needs Triton

    *sizes, heads, dim = shape
    chunks, begins, end = [], [], 0
    for i, (columns, _) in enumerate(SCANS[direction]):
        time = sizes[1] if columns else sizes[-1]
        rest = sizes[:1] + (sizes[2:] if columns else sizes[1:-1])
        chunks.append(count_chunks(math.prod(rest), time, dim, dtype, None) if packed is None else packed)
        size = saved_slots(chunks[-1], heads, dim, dtype, keep, exact).size
        # without a backward the axes take turns in one place
        if keep:
            begins.append((end + 15) // 16 * 16)
        else:
            begins.append(i % 2 * ((size + 15) // 16 * 16))
        end = max(end, begins[-1] + size)
    return chunks, [*begins, end]


_layout = functools.lru_cache(512)(layout)


def forward(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, direction: str, output_final_state, q_act, v_act,
            fast_limit=None, keep=True, exact=False):  # fmt: skip
    """As `chunk.forward`; with several scans the buffers and tables are those of all, one after the other."""
    from hgrn2.ops import chunk, pair

    scans = SCANS[direction]
    if len(scans) == 1:
        return chunk.forward(
            q, f, v, lower_bound, initial_state, lengths, cu_seqlens, scans[0][1], output_final_state, q_act, v_act,
            fast_limit, keep, exact,
        )  # fmt: skip
    packed = (
        None if cu_seqlens is None else chunk.count_chunks(1, q.shape[1], q.shape[3], q.dtype, cu_seqlens.shape[0] - 1)
    )
    chunks, at = _layout(q.shape, q.dtype, direction, packed, keep, exact)
    o, buffer, tables = v.new_empty(q.shape), q.new_empty(at[-1], dtype=torch.uint8), []
    for i in range(0, len(scans), 2):
        *inputs, out = _lines(scans[i][0], q, f, v, o)
        if keep:
            for j in range(i, min(i + 2, len(scans) - 1)):
                if chunks[j] * q.shape[-2] % 4:
                    buffer[at[j + 1] - 16 : at[j + 1]].zero_()  # the gap before the next scan's would hold anything
        parts = buffer[at[i] :], buffer[at[i + 1] :]
        tables += pair.forward(
            *inputs, lower_bound, lengths, cu_seqlens, q_act, v_act, fast_limit, keep, out, i > 0, parts
        )  # fmt: skip
    return o, None, buffer, None if packed is None else torch.cat(tables)


def backward(do, d_final, q, f, v, lower_bound, lengths, buffer, table, direction: str, q_act, v_act,
             lower_bound_grad, initial_rows: int | None, packed: bool = False):  # fmt: skip
    """Gradients of q, f, v, lower_bound and the initial state (`initial_rows`); None where not asked.

    packed: where q, f and v are slots of one packed projection, their gradients are slots of one tensor, too.
    """
    from hgrn2.ops import chunk, pair

    grads, scans = gradients(q, f, v, packed), SCANS[direction]
    rest = (lower_bound, lengths)
    if len(scans) == 1:
        options = (q_act, v_act, lower_bound_grad, initial_rows)
        ends = chunk.backward(do, d_final, q, f, v, *rest, buffer, table, scans[0][1], *options, grads)
        return *grads, *ends
    tables = (None,) * len(scans) if table is None else table.chunk(len(scans))
    packed = None if table is None else tables[0].shape[0]
    _, at = _layout(q.shape, q.dtype, direction, packed, True, False)
    bound = None
    for i in range(0, len(scans), 2):
        inputs = _lines(scans[i][0], do, q, f, v)
        out = _lines(scans[i][0], *grads)
        parts = buffer[at[i] :], buffer[at[i + 1] :]
        share = pair.backward(
            *inputs, *rest, parts, tables[i : i + 2], q_act, v_act, lower_bound_grad, out, i > 0
        )  # fmt: skip
        bound = share if bound is None else bound + share
    return *grads, bound, None


@functools.lru_cache(1024)
def _is_slot(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether `[..., H, K]` is laid out as a slot of a packed `[..., 3, H, K]`."""
    *sizes, heads, dim = shape
    want, step = (dim, 1), 3 * heads * dim
    for size in sizes[::-1]:
        want, step = (step, *want), step * size
    return all(size == 1 or stride == w for size, stride, w in zip(shape, strides, want, strict=True))


def _packed_order(q: Tensor, f: Tensor, v: Tensor) -> tuple[int, int, int] | None:
    """Which slots of one packed `[..., 3, H, K]` q, f and v are, or None."""
    if not all(_is_slot(x.shape, x.stride()) for x in (q, f, v)):
        return None
    row = q.shape[-2] * q.shape[-1] * q.element_size()
    at = [x.data_ptr() for x in (q, f, v)]
    order = tuple((a - min(at)) // row if (a - min(at)) % row == 0 else -1 for a in at)
    return order if sorted(order) == [0, 1, 2] else None


def gradients(q: Tensor, f: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, ...]:
    """Room for dq, df and dv; `packed`: slots of one tensor, where q, f and v are slots of one."""
    order = _packed_order(q, f, v) if packed else None
    if order is None:
        return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    parts = q.new_empty(*q.shape[:-2], 3, *q.shape[-2:]).unbind(-3)
    return tuple(parts[i] for i in order)
