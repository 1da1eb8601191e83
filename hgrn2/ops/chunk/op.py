"""The chunked Triton scan as a torch op: registration (shapes for tracing, autograd, clear errors) and its entry point.

Eager calls take a plain autograd function in place of the registered op: the same kernels, less work for the host.

Autocast leaves the op alone: products run in the dtype of q, f and v, gates and states in fp32 whatever surrounds it.
Shapes: B batch, T time, H heads, K = V head dim, N sequences (B, or documents with `cu_seqlens`).
"""

import functools

import torch
from torch import Tensor

from hgrn2.ops.chunk import directions, tiles
from hgrn2.ops.gates import ACTIVATIONS, triton
from hgrn2.ops.launch import HEAD_DIMS, INTERPRET, SMALL_HEAD_DIMS
from hgrn2.ops.register import (
    count_scan,
    int32,
    is_traced,
    no_second_derivative,
    refuse_second_derivatives,
    register,
    rows,
    say_falls_back,
    too_old,
)
from hgrn2.ops.sequences import DIRECTIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _scan(
    q, f, v, lower_bound, initial_state, lengths, cu_seqlens,
    direction, output_final_state, q_act, v_act, fast_limit, initial_grad,
):  # fmt: skip
    o, final, saved, table = directions.forward(
        rows(q), rows(f), rows(v), lower_bound, initial_state, int32(lengths), cu_seqlens,
        DIRECTIONS[direction], output_final_state, q_act, v_act, fast_limit, exact=initial_grad,
    )  # fmt: skip
    final = q.new_empty(0, dtype=torch.float32) if final is None else final
    return o, final, saved, q.new_empty((0, 4), dtype=torch.int32) if table is None else table


def _scan_fake(
    q, f, v, lower_bound, initial_state, lengths, cu_seqlens,
    direction, output_final_state, q_act, v_act, fast_limit, initial_grad,
):  # fmt: skip
    from hgrn2.ops.chunk.host import count_chunks

    heads, dim = q.shape[-2:]
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    packed = None if documents is None else count_chunks(1, q.shape[1], dim, q.dtype, documents)
    chunks, at = directions.layout(q.shape, q.dtype, DIRECTIONS[direction], packed, True, initial_grad)
    states = q.shape[0] if documents is None else documents
    final = q.new_empty((states, heads, dim, dim) if output_final_state else (0,), dtype=torch.float32)
    table = q.new_empty((0 if documents is None else chunks[0], 4), dtype=torch.int32)
    return q.new_empty(q.shape), final, q.new_empty(at[-1], dtype=torch.uint8), table


def _scan_backward(
    do, d_final, q, f, v, lower_bound, lengths, saved, table, direction, q_act, v_act, lower_bound_grad,
    initial_rows,
):  # fmt: skip
    d_final = None if d_final is None else d_final.contiguous()
    dq, df, dv, d_bound, d_initial = directions.backward(
        rows(do), d_final, rows(q), rows(f), rows(v), lower_bound, int32(lengths), saved,
        table if table.shape[0] else None, DIRECTIONS[direction], q_act, v_act, lower_bound_grad,
        initial_rows if initial_rows >= 0 else None,
    )  # fmt: skip
    empty = functools.partial(q.new_empty, 0, dtype=torch.float32)
    return dq, df, dv, empty() if d_bound is None else d_bound, empty() if d_initial is None else d_initial


def _scan_backward_fake(
    do, d_final, q, f, v, lower_bound, lengths, saved, table, direction, q_act, v_act, lower_bound_grad,
    initial_rows,
):  # fmt: skip
    heads, dim = q.shape[-2:]
    d_bound = q.new_empty((heads, dim) if lower_bound_grad else (0,), dtype=torch.float32)
    d_initial = q.new_empty((initial_rows, heads, dim, dim) if initial_rows >= 0 else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), d_bound, d_initial


def _save(ctx, inputs, output) -> None:
    q, f, v, lower_bound, initial_state, lengths, _, direction, ctx.has_final, q_act, v_act, _, initial_grad = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, f, v, lower_bound, lengths, *output[2:])
    ctx.options = (direction, q_act, v_act)
    ctx.initial_rows = initial_state.shape[0] if initial_grad else -1


def _differentiate(ctx, do, d_final, *_):
    refuse_second_derivatives()
    q, f, v, lower_bound, lengths, *saved = ctx.saved_tensors
    d_final = d_final if ctx.has_final else None  # else it belongs to an empty tensor
    if do is None and d_final is None:
        return (None,) * 13
    if do is None:
        do = torch.zeros_like(v)
    bound_grad = lower_bound is not None and ctx.needs_input_grad[3]
    dq, df, dv, d_bound, d_initial = torch.ops.hgrn2.chunk_scan_backward(
        do, d_final, q, f, v, lower_bound, lengths, *saved, *ctx.options, bound_grad, ctx.initial_rows
    )
    d_bound = d_bound if bound_grad else None
    d_initial = d_initial if ctx.initial_rows >= 0 else None
    return dq, df, dv, d_bound, d_initial, *(None,) * 8


class _Eager(torch.autograd.Function):
    """The registered op's forward and backward, without the dispatcher."""

    @staticmethod
    def forward(
        ctx, q, f, v, lower_bound, initial_state, lengths, cu_seqlens,
        direction, output_final_state, q_act, v_act, fast_limit,
    ):  # fmt: skip
        lengths = int32(lengths)
        o, final, saved, table = directions.forward(
            rows(q), rows(f), rows(v), lower_bound, initial_state, lengths, cu_seqlens, DIRECTIONS[direction],
            output_final_state, q_act, v_act, fast_limit, any(ctx.needs_input_grad), ctx.needs_input_grad[4],
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, f, v, lower_bound, lengths, saved, table)
        ctx.options = (direction, q_act, v_act)
        ctx.initial_rows = initial_state.shape[0] if ctx.needs_input_grad[4] else None
        return o, final

    @staticmethod
    def backward(ctx, do, d_final):
        refuse_second_derivatives()
        if do is None and d_final is None:
            return (None,) * 12
        q, f, v, lower_bound, lengths, saved, table = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else rows(do)
        d_final = None if d_final is None else d_final.contiguous()
        direction, *acts = ctx.options
        grads = directions.backward(
            do, d_final, rows(q), rows(f), rows(v), lower_bound, lengths, saved, table, DIRECTIONS[direction],
            *acts, ctx.needs_input_grad[3], ctx.initial_rows, packed=True,
        )  # fmt: skip
        return *grads, *(None,) * 7


register(
    "chunk_scan(Tensor q, Tensor f, Tensor v, Tensor? lower_bound, Tensor? initial_state, Tensor? lengths, "
    "Tensor? cu_seqlens, int direction, bool output_final_state, int q_act, int v_act, float? fast_limit, "
    "bool initial_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _scan, _scan_fake, _differentiate, _save,
)  # fmt: skip
register(
    "chunk_scan_backward(Tensor do, Tensor? d_final, Tensor q, Tensor f, Tensor v, Tensor? lower_bound, "
    "Tensor? lengths, Tensor saved, Tensor table, int direction, int q_act, int v_act, bool lower_bound_grad, "
    "int initial_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward, _scan_backward_fake, no_second_derivative,
)  # fmt: skip
count_scan(
    torch.ops.hgrn2.chunk_scan, torch.ops.hgrn2.chunk_scan_backward, lambda *kind: tiles.tiles_for(*kind).chunk
)  # fmt: skip


def triton_supported(q: Tensor, device: torch.device | None = None, self_test: dict | None = None) -> str | None:
    """Why the Triton scan cannot run for q `[B, T, H, K]` (on `device`, by default its own), or None.

    self_test: lower_bound (bool), direction, q_act and v_act of the call that comes; runs their self-test at first use.
    """
    device = q.device if device is None else device
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not (INTERPRET and device.type == "cpu"):
        return f"Triton kernels need a CUDA device, not {device.type}"
    # a constant also where tracing has made the size symbolic
    dims = SMALL_HEAD_DIMS + HEAD_DIMS
    dim = next((size for size in dims if q.shape[-1] == size), None)
    if dim is None:
        return f"no Triton kernel for head dim {q.shape[-1]}; there are {', '.join(map(str, dims))}"
    if q.dtype not in DTYPES:
        return f"no Triton kernel for {q.dtype}"
    if device.type != "cuda" or torch.version.hip is not None:
        return None if device.type != "cuda" else "the kernels are for NVIDIA devices"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _checked(index, dim, q.dtype, **(self_test or {}))


@torch.compiler.assume_constant_result
def _checked(index: int, dim: int, dtype: torch.dtype, **self_test) -> str | None:
    return _checked_once(index, dim, dtype, **self_test)


@functools.cache
def _checked_once(index: int, dim: int, dtype: torch.dtype, **self_test) -> str | None:
    if (reason := too_old(index)) is not None or not self_test:
        return reason
    from hgrn2.ops.selftest import run_self_test

    reason = run_self_test(index, dim, dtype, **self_test)
    say_falls_back("hgrn2_scan", reason)
    return reason


def triton_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None = None,
    *,
    direction: str | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    q_act: str | None = None,
    v_act: str | None = None,
    fast_limit: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scan on Triton, arguments as `hgrn2.ops.hgrn2_scan`; head dims 16 to 256.

    direction: by default what `reverse` says. For q, f, v `[B, Y, X, H, K]`: "2d", the four scans of `hgrn2_scan_2d`,
    or "rows" or "columns", the two along X or along Y.
    fast_limit: where chunks switch to safe scores (see `common`), for tests; negative sends all there.

    Returns:
        o shaped and typed like q, and the final state `[N, H, K, V]` fp32, or None where not asked for.
    """
    if lower_bound is not None:
        lower_bound = lower_bound.float().contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    number = int(reverse) if direction is None else DIRECTIONS.index(direction)
    args = (
        q, f, v, lower_bound, initial_state, lengths, cu_seqlens, number, output_final_state,
        ACTIVATIONS.index(q_act), ACTIVATIONS.index(v_act), fast_limit,
    )  # fmt: skip
    if is_traced():
        initial_grad = initial_state is not None and initial_state.requires_grad
        o, final, *_ = torch.ops.hgrn2.chunk_scan(*args, initial_grad)
    else:
        o, final = _Eager.apply(*args)
    return o, final if output_final_state else None
