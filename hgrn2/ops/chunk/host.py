"""Host side of the chunked Triton scan: plans, allocates, launches. Shapes as in `common`.

Tensors are `[B, T, H, K]`, or `[B, P, T, H, K]` with any strides over B, P and T (see `directions`).
"""

import math

import torch
from torch import Tensor
from triton import cdiv

from hgrn2.ops.chunk import tiles
from hgrn2.ops.chunk.plan import Call, saved_slots
from hgrn2.ops.launch import Plans, on_its_device, signature, with_buffer
from hgrn2.ops.sequences import document_table

_forward_plans, _backward_plans = Plans(), Plans()


def count_chunks(batch: int, time: int, dim: int, dtype: torch.dtype, documents: int | None) -> int:
    """Chunks in all; for packed documents an upper bound that needs no look at the device."""
    chunk = tiles.tiles_for(dim, dtype).chunk
    return batch * cdiv(time, chunk) if documents is None else (time + documents * (chunk - 1)) // chunk


def _boundary(like: Tensor, rows: int, other: Tensor | None, packed: bool) -> Tensor:
    """Room for the states at one end; an empty document passes on the state of the `other` end."""
    heads, dim = like.shape[-2:]
    state = like.new_empty(rows, heads, dim, dim, dtype=torch.float32)
    if packed:
        state.zero_() if other is None else state.copy_(other)
    return state


@on_its_device
def forward(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, reverse, output_final_state, q_act, v_act,
            fast_limit=None, keep=True, exact=False):  # fmt: skip
    """Outputs shaped like v, the final state `[N, H, K, V]` or None, and what `backward` needs: buffer and table.

    keep: a backward will follow; exact: with a gradient for the initial state.
    """
    *lines, time, heads, dim = q.shape
    batch = math.prod(lines)
    o = v.new_empty(q.shape)
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    options = (documents, reverse, output_final_state, q_act, v_act, fast_limit, keep, exact)
    key = (*signature(q, f, v, lower_bound, initial_state, lengths, o), *options)
    found = _forward_plans.get(key)
    if found is None:
        n_chunks = count_chunks(batch, time, dim, q.dtype, documents)
        call = Call(
            q, f, v, lower_bound, lengths, (initial_state, o), n_chunks, documents is not None, reverse, q_act, v_act
        )  # fmt: skip
        call.strides("o", o)
        call.factors(keep, exact, fast_limit)
        call.safe_chunks(keep)
        enter, leave = "none" if initial_state is None else "init", "final" if output_final_state else "none"
        call.states("kx", "v", "states", enter, leave, backward=False)
        call.outputs(keep)
        slots = saved_slots(n_chunks, heads, dim, q.dtype, keep, exact)
        found = call.plan, slots, call.scratch, n_chunks, call.masks
        _forward_plans[key] = found
    plan, slots, scratch, n_chunks, masks = found
    table = final = None
    if cu_seqlens is not None:
        table = document_table(cu_seqlens, n_chunks, tiles.tiles_for(dim, q.dtype).chunk, reverse)
    if output_final_state:
        final = _boundary(q, batch if documents is None else documents, initial_state, table is not None)
    buffer = q.new_empty(slots.size, dtype=torch.uint8)
    tensors = dict(
        q=q, f=f, v=v, lb=lower_bound, init=initial_state, final=final, len=lengths, table=table, o=o, **masks
    )  # fmt: skip
    plan.run(tensors, (slots, buffer), *((with_buffer(q, scratch),) if scratch.of else ()))
    return o, final, buffer, table


@on_its_device
def backward(do, d_final, q, f, v, lower_bound, lengths, buffer, table, reverse, q_act, v_act, lower_bound_grad,
             initial_rows: int | None, grads):  # fmt: skip
    """Gradients of lower_bound and the initial state (`initial_rows`); None where not asked.

    grads: dq, df and dv, of the same strides, to be written.
    """
    exact = initial_rows is not None
    dq, df, dv = grads
    options = (table is None, reverse, q_act, v_act, lower_bound_grad, exact, buffer.shape)
    key = (*signature(q, f, v, do, lower_bound, d_final, lengths, dq), *options)
    found = _backward_plans.get(key)
    if found is None:
        *lines, time, heads, dim = q.shape
        n_chunks = count_chunks(math.prod(lines), time, dim, q.dtype, None) if table is None else table.shape[0]
        call = Call(
            q, f, v, lower_bound, lengths, (do, d_final, dq), n_chunks, table is not None, reverse, q_act, v_act
        )  # fmt: skip
        call.strides("do", do)
        call.strides("g", dq)
        enter, leave = "none" if d_final is None else "d_final", "d_initial" if exact else "none"
        call.state_gradients(enter, leave, exact)
        call.value_gradients(lower_bound_grad)
        call.gradients(lower_bound_grad)
        call.safe_gradients(lower_bound_grad)
        if lower_bound_grad:
            call.bound_gradient()
        slots = saved_slots(n_chunks, heads, dim, q.dtype, True, exact)
        found = call.plan, slots, call.scratch, call.masks
        _backward_plans[key] = found
    plan, slots, scratch, masks = found
    heads, dim = q.shape[-2:]
    d_initial = d_bound = None
    if exact:
        d_initial = _boundary(q, initial_rows, d_final, table is not None)
    if lower_bound_grad:
        d_bound = q.new_empty(heads, dim, dtype=torch.float32)
    tensors = dict(
        q=q, f=f, v=v, do=do, lb=lower_bound, d_final=d_final, d_initial=d_initial, len=lengths, table=table,
        dq=dq, df=df, dv=dv, d_bound=d_bound, **masks,
    )  # fmt: skip
    plan.run(tensors, (slots, buffer), with_buffer(q, scratch))
    return d_bound, d_initial
