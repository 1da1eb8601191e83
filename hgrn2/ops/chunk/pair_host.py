"""Host side of both directions of the chunked scan in one plan; see `pair_forward`. Tensors as in `chunk`."""

import math

import torch
from torch import Tensor

from hgrn2.ops.chunk import tiles
from hgrn2.ops.chunk.common import FAST_LIMIT_FP32, FAST_LIMIT_PAIR
from hgrn2.ops.chunk.host import count_chunks
from hgrn2.ops.chunk.pair_backward import chunk_pair_grad_kernel
from hgrn2.ops.chunk.pair_forward import chunk_pair_factor_kernel, chunk_pair_out_kernel, chunk_pair_value_grad_kernel
from hgrn2.ops.chunk.plan import Call, saved_slots
from hgrn2.ops.launch import Plans, on_its_device, signature, with_buffer
from hgrn2.ops.sequences import document_table

_forward_plans, _backward_plans = Plans(), Plans()


@on_its_device
def forward(q, f, v, lower_bound, lengths, cu_seqlens, q_act, v_act, fast_limit, keep, o, add, buffer) -> Tensor | None:
    """Write o, or add to it (`add`), and to `buffer` what `backward` needs beside the table that this returns."""
    *lines, time, heads, dim = q.shape
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    key = (*signature(q, f, v, lower_bound, lengths, o), documents, q_act, v_act, fast_limit, keep, add)
    found = _forward_plans.get(key)
    if found is None:
        n_chunks = count_chunks(math.prod(lines), time, dim, q.dtype, documents)
        call = Call(q, f, v, lower_bound, lengths, (o,), n_chunks, documents is not None, False, q_act, v_act)
        call.tiles = tiles.pair(call.tiles)
        call.strides("o", o)
        if fast_limit is None:
            fast_limit = FAST_LIMIT_FP32 if q.dtype == torch.float32 else FAST_LIMIT_PAIR
        call.factors(keep, False, fast_limit, chunk_pair_factor_kernel)
        call.safe_chunks(keep)
        call.safe_chunks(keep, back=True)
        call.states("kx", "v", "states", "none", "none", backward=False)
        call.states("kx2", "v", "states2", "none", "none", backward=True)
        call.outputs(keep, add, chunk_pair_out_kernel)
        slots = saved_slots(n_chunks, heads, dim, q.dtype, keep, False, pair=True)
        found = _forward_plans[key] = call.plan, slots, call.scratch, n_chunks, call.masks
    plan, slots, scratch, n_chunks, masks = found
    table = None
    if cu_seqlens is not None:
        table = document_table(cu_seqlens, n_chunks, tiles.tiles_for(dim, q.dtype).chunk, False)
    tensors = dict(q=q, f=f, v=v, lb=lower_bound, len=lengths, table=table, o=o, **masks)
    plan.run(tensors, (slots, buffer), *((with_buffer(q, scratch),) if scratch.of else ()))
    return table


@on_its_device
def backward(do, q, f, v, lower_bound, lengths, buffer, table, q_act, v_act, bound: bool, grads, add) -> Tensor | None:
    """Write dq, df and dv (`grads`), or add to them (`add`); returns the gradient of lower_bound if `bound`."""
    dq, df, dv = grads
    packed = table is not None
    key = (*signature(q, f, v, do, lower_bound, lengths, dq), packed, q_act, v_act, bound, add, buffer.shape)
    found = _backward_plans.get(key)
    if found is None:
        *lines, time, heads, dim = q.shape
        n_chunks = table.shape[0] if packed else count_chunks(math.prod(lines), time, dim, q.dtype, None)
        call = Call(q, f, v, lower_bound, lengths, (do, dq), n_chunks, packed, False, q_act, v_act)
        call.tiles = tiles.pair(call.tiles)
        call.strides("do", do)
        call.strides("g", dq)
        call.gradient_slots("dstates", "dstates2")
        call.states("qx", "do", "dstates", "none", "none", backward=True)
        call.states("qx2", "do", "dstates2", "none", "none", backward=False)
        call.value_gradients(bound, add, chunk_pair_value_grad_kernel)
        call.gradients(bound, add, chunk_pair_grad_kernel)
        call.safe_gradients(bound, add, pair=True)
        call.safe_gradients(bound, True, pair=True, back=True)
        if bound:
            call.bound_gradient(2)
        slots = saved_slots(n_chunks, heads, dim, q.dtype, True, False, pair=True)
        found = _backward_plans[key] = call.plan, slots, call.scratch, call.masks
    plan, slots, scratch, masks = found
    d_bound = q.new_empty(q.shape[-2:], dtype=torch.float32) if bound else None
    tensors = dict(
        q=q, f=f, v=v, do=do, lb=lower_bound, len=lengths, table=table, dq=dq, df=df, dv=dv, d_bound=d_bound, **masks
    )  # fmt: skip
    plan.run(tensors, (slots, buffer), with_buffer(q, scratch))
    return d_bound
