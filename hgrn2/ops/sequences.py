"""What both wings of the scan know of a call: its directions, its documents, and where gradients go.

Shapes: B batch, T time, H heads, K = V head dim, N documents, NC chunks (or segments) in all.
"""

import functools

import torch
from torch import Tensor

# those after "both" are for grids; "rows" and "columns" run both ways along one axis
DIRECTIONS = ("forward", "reverse", "both", "2d", "rows", "columns")


def document_table(cu_seqlens: Tensor, n_chunks: int, chunk: int, reverse: bool) -> Tensor:
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
