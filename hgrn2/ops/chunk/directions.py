"""The scans of one call of the chunked kernels: one, or pairs in opposite directions, later ones adding to the first.

Shapes: B batch, T time, Y and X rows and columns of a grid, H heads, K = V head dim. Columns of `[B, Y, X, H, K]` are
read and written in place: to the kernels they are the lines of `[B, X, Y, H, K]` with other strides.
"""

import functools
import math

import torch
from torch import Tensor

from hgrn2.ops.sequences import gradients

# of each the scans, those in opposite directions as one: (along columns, whether to reverse or "both")
SCANS = {
    "forward": ((False, False),),
    "reverse": ((False, True),),
    "both": ((False, "both"),),
    "2d": ((False, "both"), (True, "both")),
    "rows": ((False, "both"),),
    "columns": ((True, "both"),),
}


def _lines(columns: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, P, T, H, K]` (sequences: `[B, T, H, K]`) for scans along T."""
    return tuple(x.transpose(1, 2) for x in tensors) if columns else tensors


def layout(shape, dtype, direction: str, packed: int | None, keep: bool, exact: bool) -> tuple[list, list]:
    """Chunks of each of the `SCANS` (`packed` where documents make them), and where its buffer begins in that of the
    call; the latter list ends with the size of the whole."""
    from hgrn2.ops.chunk.host import count_chunks
    from hgrn2.ops.chunk.plan import saved_slots  # needs Triton

    *sizes, heads, dim = shape
    chunks, begins, end = [], [], 0
    for columns, way in SCANS[direction]:
        time = sizes[1] if columns else sizes[-1]
        rest = sizes[:1] + (sizes[2:] if columns else sizes[1:-1])
        chunks.append(count_chunks(math.prod(rest), time, dim, dtype, None) if packed is None else packed)
        slots = saved_slots(chunks[-1], heads, dim, dtype, keep, exact and way != "both", way == "both")
        # without a backward they take turns in one place
        begins.append((end + 15) // 16 * 16 if keep else 0)
        end = max(end, begins[-1] + slots.size)
    return chunks, [*begins, end]


_layout = functools.lru_cache(512)(layout)


def forward(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, direction: str, output_final_state, q_act, v_act,
            fast_limit=None, keep=True, exact=False):  # fmt: skip
    """As `chunk.forward`; of several scans the buffer is that of all, one after the other."""
    from hgrn2.ops.chunk import host as chunk
    from hgrn2.ops.chunk import pair_host as pair

    scans = SCANS[direction]
    if scans[0][1] != "both":
        return chunk.forward(
            q, f, v, lower_bound, initial_state, lengths, cu_seqlens, scans[0][1], output_final_state, q_act, v_act,
            fast_limit, keep, exact,
        )  # fmt: skip
    packed = (
        None if cu_seqlens is None else chunk.count_chunks(1, q.shape[1], q.shape[3], q.dtype, cu_seqlens.shape[0] - 1)
    )
    _, at = _layout(q.shape, q.dtype, direction, packed, keep, exact)
    o, buffer, table = v.new_empty(q.shape), q.new_empty(at[-1], dtype=torch.uint8), None
    for i, (columns, _) in enumerate(scans):
        *inputs, out = _lines(columns, q, f, v, o)
        part = buffer[at[i] : at[i + 1]] if keep else buffer
        table = pair.forward(
            *inputs, lower_bound, lengths, cu_seqlens, q_act, v_act, fast_limit, keep, out, i > 0, part
        )  # fmt: skip
    return o, None, buffer, table


def backward(do, d_final, q, f, v, lower_bound, lengths, buffer, table, direction: str, q_act, v_act,
             lower_bound_grad, initial_rows: int | None, packed: bool = False):  # fmt: skip
    """Gradients of q, f, v, lower_bound and the initial state (`initial_rows`); None where not asked.

    packed: where q, f and v are slots of one packed projection, their gradients are slots of one tensor, too.
    """
    from hgrn2.ops.chunk import host as chunk
    from hgrn2.ops.chunk import pair_host as pair

    grads, scans = gradients(q, f, v, packed), SCANS[direction]
    rest = (lower_bound, lengths)
    if scans[0][1] != "both":
        options = (q_act, v_act, lower_bound_grad, initial_rows)
        ends = chunk.backward(do, d_final, q, f, v, *rest, buffer, table, scans[0][1], *options, grads)
        return *grads, *ends
    _, at = _layout(q.shape, q.dtype, direction, None if table is None else table.shape[0], True, False)
    bound = None
    for i, (columns, _) in enumerate(scans):
        inputs = _lines(columns, do, q, f, v)
        out = _lines(columns, *grads)
        part = buffer[at[i] : at[i + 1]]
        share = pair.backward(*inputs, *rest, part, table, q_act, v_act, lower_bound_grad, out, i > 0)
        bound = share if bound is None else bound + share
    return *grads, bound, None
