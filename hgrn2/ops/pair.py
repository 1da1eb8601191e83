"""Host side of both directions of the chunked scan in one plan; see `chunk_pair`. Tensors as in `chunk`."""

import math

import torch
from torch import Tensor

from hgrn2.ops import tiles
from hgrn2.ops.call import Call, saved_slots
from hgrn2.ops.chunk import _on_its_device, _scratch, _signature, chunk_table, count_chunks
from hgrn2.ops.chunk_pair import chunk_pair_out_kernel, chunk_pair_value_grad_kernel
from hgrn2.ops.chunk_pair_grad import chunk_pair_grad_kernel
from hgrn2.ops.launch import Plans, Slots

_forward_plans, _backward_plans = Plans(), Plans()


def _both(slots: Slots) -> tuple[Slots, Slots]:
    """The slots of the scan ahead, and under their names with a 2 those of the scan back."""
    second = Slots()
    second.of, second.size = {f"{name}2": slot for name, slot in slots.of.items()}, slots.size
    return slots, second


def _calls(*args) -> tuple[Call, Call]:
    *args, q_act, v_act = args
    first = Call(*args, False, q_act, v_act)
    return first, Call(*args, True, q_act, v_act, "2", first)


@_on_its_device
def forward(q, f, v, lower_bound, lengths, cu_seqlens, q_act, v_act, fast_limit, keep, o, add, buffers):  # fmt: skip
    """Write o, or add to it (`add`), and to `buffers`, the two scans', what `backward` needs; returns their tables."""
    *lines, time, heads, dim = q.shape
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    key = (*_signature(q, f, v, lower_bound, lengths, o), documents, q_act, v_act, fast_limit, keep, add)
    found = _forward_plans.get(key)
    if found is None:
        n_chunks = count_chunks(math.prod(lines), time, dim, q.dtype, documents)
        calls = _calls(q, f, v, lower_bound, lengths, (o,), n_chunks, documents is not None, q_act, v_act)
        for call in calls:
            call.strides("o", o)
            call.factors(keep, False, fast_limit)
            call.safe_chunks(keep)
            call.states("kx", "v", "states", "none", "none", backward=False)
        calls[0].outputs(keep, add, chunk_pair_out_kernel)
        slots = _both(saved_slots(n_chunks, heads, dim, q.dtype, keep, False))
        found = _forward_plans[key] = calls[0].plan, slots, calls[0].scratch, n_chunks, calls[0].masks
    plan, slots, scratch, n_chunks, masks = found
    tables = [None, None]
    if cu_seqlens is not None:
        chunk = tiles.tiles_for(dim, q.dtype).chunk
        tables = [chunk_table(cu_seqlens, n_chunks, chunk, reverse) for reverse in (False, True)]
    tensors = dict(q=q, f=f, v=v, lb=lower_bound, len=lengths, table=tables[0], table2=tables[1], o=o, **masks)
    tensors |= {} if keep else dict(ex=None, ex2=None)
    more = (_scratch(q, scratch),) if scratch.of else ()
    plan.run(tensors, *zip(slots, buffers, strict=True), *more)
    return tables


@_on_its_device
def backward(
    do, q, f, v, lower_bound, lengths, buffers, tables, q_act, v_act, bound: bool, grads, add
) -> Tensor | None:
    """Write dq, df and dv (`grads`), or add to them (`add`); returns the gradient of lower_bound if `bound`."""
    dq, df, dv = grads
    packed = tables[0] is not None
    key = (*_signature(q, f, v, do, lower_bound, lengths, dq), packed, q_act, v_act, bound, add, buffers[0].shape)
    found = _backward_plans.get(key)
    if found is None:
        *lines, time, heads, dim = q.shape
        n_chunks = tables[0].shape[0] if packed else count_chunks(math.prod(lines), time, dim, q.dtype, None)
        calls = _calls(q, f, v, lower_bound, lengths, (do, dq), n_chunks, packed, q_act, v_act)
        for call in calls:
            call.strides("do", do)
            call.strides("g", dq)
            call.state_gradients("none", "none", False)
        calls[0].value_gradients(bound, add, chunk_pair_value_grad_kernel)
        calls[0].gradients(bound, add, tiles.pair_grad(calls[0].tiles), chunk_pair_grad_kernel)
        calls[0].safe_gradients(bound, add)
        calls[1].safe_gradients(bound, True)
        slots = _both(saved_slots(n_chunks, heads, dim, q.dtype, True, False))
        found = _backward_plans[key] = calls[0].plan, slots, calls[0].scratch, n_chunks, calls[0].masks
    plan, slots, scratch, n_chunks, masks = found
    dlb = q.new_empty(2, n_chunks, *q.shape[-2:], dtype=torch.float32) if bound else None
    tensors = dict(
        q=q, f=f, v=v, do=do, lb=lower_bound, len=lengths, table=tables[0], table2=tables[1], dq=dq, df=df, dv=dv,
        dlb=dlb[0] if bound else None, dlb2=dlb[1] if bound else None, **masks,
    )  # fmt: skip
    plan.run(tensors, *zip(slots, buffers, strict=True), _scratch(q, scratch))
    return dlb.sum((0, 1)) if bound else None
