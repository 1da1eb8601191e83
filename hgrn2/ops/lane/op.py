"""The Triton scan of small states as a torch op: registration and its entry point. As `chunk.op`, for head dims 1 to 8.

Shapes: B batch, T time, Y and X rows and columns of a grid, H heads, K = V head dim, N sequences.
"""

import torch
from torch import Tensor

from hgrn2.ops.gates import ACTIVATIONS
from hgrn2.ops.register import count_scan, int32, is_traced, no_second_derivative, refuse_second_derivatives, register
from hgrn2.ops.sequences import DIRECTIONS


def _grid(x: Tensor) -> Tensor:
    """`[B, Y, X, H, K]`, a sequence as a grid of one row; copied only where kernels cannot read it in place."""
    from hgrn2.ops.lane.host import vectors

    return vectors(x if x.dim() == 5 else x.unsqueeze(1))


def _options(direction: int, q_act: int, v_act: int):
    from hgrn2.ops.lane.host import Options

    name = DIRECTIONS[direction]
    axes = {"2d": (2, 1), "columns": (1,)}.get(name, (2,))
    return Options(name == "reverse", name not in ("forward", "reverse"), axes, q_act, v_act)


def _run(q, f, v, lower_bound, initial_state, lengths, cu_seqlens, direction, output_final_state, q_act, v_act):
    from hgrn2.ops.lane import host as scan  # needs Triton

    options = _options(direction, q_act, v_act)
    o, final, kept = scan.forward(
        _grid(q), _grid(f), _grid(v), lower_bound, initial_state, int32(lengths), int32(cu_seqlens), options,
        output_final_state,
    )  # fmt: skip
    return o if o.dim() == q.dim() else o.squeeze(1), final, kept


def _run_backward(
    do, d_final, q, f, v, lower_bound, initial_state, lengths, cu_seqlens, direction, q_act, v_act,
    lower_bound_grad, initial_state_grad, kept=None, packed=False,
):  # fmt: skip
    from hgrn2.ops.lane import host as scan

    options = _options(direction, q_act, v_act)
    *grads, d_bound, d_initial = scan.backward(
        _grid(q), _grid(f), _grid(v), _grid(do), d_final, lower_bound, initial_state, int32(lengths),
        int32(cu_seqlens), options, kept, lower_bound_grad, initial_state_grad, packed,
    )  # fmt: skip
    return *(x if x.dim() == q.dim() else x.squeeze(1) for x in grads), d_bound, d_initial


def _scan(*args):
    o, final, _ = _run(*args)
    return o, o.new_empty(0, dtype=torch.float32) if final is None else final


def _scan_fake(
    q, f, v, lower_bound, initial_state, lengths, cu_seqlens, direction, output_final_state, q_act, v_act
):  # fmt: skip
    heads, dim = q.shape[-2:]
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty((rows, heads, dim, dim) if output_final_state else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), final


def _scan_backward(*args):
    *grads, d_bound, d_initial = _run_backward(*args)
    empty = grads[0].new_empty(0, dtype=torch.float32)
    return *grads, empty if d_bound is None else d_bound, empty.clone() if d_initial is None else d_initial


def _scan_backward_fake(
    do, d_final, q, f, v, lower_bound, initial_state, lengths, cu_seqlens, direction, q_act, v_act,
    lower_bound_grad, initial_state_grad,
):  # fmt: skip
    heads, dim = q.shape[-2:]
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_bound = q.new_empty((heads, dim) if lower_bound_grad else (0,), dtype=torch.float32)
    d_initial = q.new_empty((rows, heads, dim, dim) if initial_state_grad else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), d_bound, d_initial


def _save(ctx, inputs, output) -> None:
    *tensors, direction, ctx.has_final, q_act, v_act = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.options = (direction, q_act, v_act)


def _differentiate(ctx, do, d_final):
    refuse_second_derivatives()
    d_final = d_final if ctx.has_final else None  # else it belongs to an empty tensor
    if do is None and d_final is None:
        return (None,) * 11
    tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[0]) if do is None else do
    needs = [tensors[i] is not None and ctx.needs_input_grad[i] for i in (3, 4)]
    *grads, d_bound, d_initial = torch.ops.hgrn2.lane_scan_backward(do, d_final, *tensors, *ctx.options, *needs)
    return *grads, d_bound if needs[0] else None, d_initial if needs[1] else None, *(None,) * 6


class _Eager(torch.autograd.Function):
    """The registered op without the dispatcher; it keeps the segments' states, which the op computes again."""

    @staticmethod
    def forward(ctx, *inputs):
        o, final, kept = _run(*inputs)
        *tensors, direction, _, q_act, v_act = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, kept)
        ctx.options = (direction, q_act, v_act)
        return o, final

    @staticmethod
    def backward(ctx, do, d_final):
        refuse_second_derivatives()
        if do is None and d_final is None:
            return (None,) * 11
        *tensors, kept = ctx.saved_tensors
        do = torch.zeros_like(tensors[0]) if do is None else do
        needs = [tensors[i] is not None and ctx.needs_input_grad[i] for i in (3, 4)]
        grads = _run_backward(do, d_final, *tensors, *ctx.options, *needs, kept, packed=True)
        return *grads, *(None,) * 6


register(
    "lane_scan(Tensor q, Tensor f, Tensor v, Tensor? lower_bound, Tensor? initial_state, Tensor? lengths, "
    "Tensor? cu_seqlens, int direction, bool output_final_state, int q_act, int v_act) -> (Tensor, Tensor)",
    _scan, _scan_fake, _differentiate, _save,
)  # fmt: skip
register(
    "lane_scan_backward(Tensor do, Tensor? d_final, Tensor q, Tensor f, Tensor v, Tensor? lower_bound, "
    "Tensor? initial_state, Tensor? lengths, Tensor? cu_seqlens, int direction, int q_act, int v_act, "
    "bool lower_bound_grad, bool initial_state_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward, _scan_backward_fake, no_second_derivative,
)  # fmt: skip
count_scan(torch.ops.hgrn2.lane_scan, torch.ops.hgrn2.lane_scan_backward, lambda *_: 0)


def lane_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None = None,
    *,
    direction: str = "forward",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    q_act: str | None = None,
    v_act: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scan on Triton for head dims 1 to 8, arguments as `hgrn2.ops.hgrn2_scan`.

    direction: for q, f, v `[B, Y, X, H, K]`: "2d", the four scans of `hgrn2_scan_2d`, or "rows" or "columns", the two
        along X or along Y.

    Returns:
        o shaped and typed like q, and the final state `[N, H, K, V]` fp32, or None where not asked for.
    """
    if lower_bound is not None:
        lower_bound = lower_bound.float().contiguous()
    if initial_state is not None:
        initial_state = initial_state.float()
    o, final = (torch.ops.hgrn2.lane_scan if is_traced() else _Eager.apply)(
        q, f, v, lower_bound, initial_state, lengths, cu_seqlens, DIRECTIONS.index(direction), output_final_state,
        ACTIVATIONS.index(q_act), ACTIVATIONS.index(v_act),
    )  # fmt: skip
    return o, final if output_final_state else None
