"""The public ops of HGRN2: validate, dispatch, say which implementation runs.

Shapes: B batch, T time, H heads, K = V head dim (`expand_ratio`), N documents.
"""

import torch
from torch import Tensor

from hgrn2.ops.chunk.op import triton_scan, triton_supported
from hgrn2.ops.decode.step import step_supported, torch_step, triton_step
from hgrn2.ops.gates import ACTIVATIONS
from hgrn2.ops.lane.op import lane_scan
from hgrn2.ops.reference import compute_dtype, recurrent_scan
from hgrn2.ops.torch_form import chunked_scan

IMPLS = ("auto", "reference", "torch", "triton")
DIRECTIONS = ("forward", "reverse", "both")
HEAD_DIMS = tuple(2**i for i in range(9))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

__all__ = ["choose_impl", "hgrn2_scan", "hgrn2_scan_2d", "hgrn2_step"]


def hgrn2_scan(
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated linear recurrence with outer-product state expansion (HGRN2, arXiv 2404.07904, section 3).

    `S_t = diag(lam_t) S_{t-1} + k_t (x) v_t` and `o_t = S_t^T q_t`, with `k_t = (1 - gamma) sigmoid(-f_t)`,
    `lam_t = 1 - k_t`; gates, activations and states in fp32 (fp64 for fp64 inputs).

    Args:
        q, f, v: output gate, raw forget logits and input, `[B, T, H, K]` of one dtype (fp32, bf16, fp16 or fp64), K a
            power of two from 1 to 256; strided views are accepted.
        lower_bound: gamma `[H, K]` in [0, 1), or None for 0 (a tensor of exact zeros has an ill-conditioned gradient
            where gates are shut).
        direction: "forward"; "reverse" (the recurrence runs from the last real token to token 0: `initial_state` enters
            at the last, the final state is the one after token 0); or "both", the sum of the two outputs.
        initial_state: `[B, H, K, V]`, or `[N, H, K, V]` with `cu_seqlens`; not with "both".
        output_final_state: return the final state, shaped as `initial_state`, too; not with "both".
        lengths: int32 or int64 `[B]`. Tokens at or past a row's length are never read; their outputs and gradients
            are 0.
        cu_seqlens: int32 or int64 `[N + 1]` from 0 to T, non-decreasing: documents packed in one row (B = 1), each
            with a state of its own. Read on its device only. Not together with `lengths`.
        q_act, v_act: activation applied to q and to v inside: None, "silu" or "sigmoid".
        impl: "auto" (triton where it can run, else torch), "triton", "torch" or "reference".

    Returns:
        o `[B, T, H, V]` in the dtype of q, and the final state (fp32 or fp64) or None. Gradients flow to q, f, v,
        `lower_bound` and `initial_state`.

    Raises:
        ValueError: a shape, dtype or combination that is not supported; the message names it.
    """
    _check_inputs(q, f, v, lower_bound, q_act, v_act, ndim=4, legend="[B, T, H, K]")
    _check_choice("direction", direction, DIRECTIONS)
    _check_states(q, direction, initial_state, output_final_state, lengths, cu_seqlens)
    name = _implementation(impl, q, lower_bound, direction, q_act, v_act)
    options = dict(lengths=lengths, cu_seqlens=cu_seqlens, q_act=q_act, v_act=v_act)
    if name == "torch":
        o, final_state = chunked_scan(
            q, f, v, lower_bound, direction=direction, initial_state=initial_state, **options
        )  # fmt: skip
        return o, final_state if output_final_state else None
    if name == "triton":
        return (lane_scan if q.shape[-1] < 16 else triton_scan)(
            q, f, v, lower_bound, direction=direction, initial_state=initial_state,
            output_final_state=output_final_state, **options,
        )  # fmt: skip
    if direction == "both":
        o = sum(recurrent_scan(q, f, v, lower_bound, reverse=reverse, **options)[0] for reverse in (False, True))
        final_state = None
    else:
        o, final_state = recurrent_scan(
            q, f, v, lower_bound, reverse=direction == "reverse", initial_state=initial_state, **options
        )  # fmt: skip
    return o, final_state if output_final_state else None


def hgrn2_scan_2d(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None = None,
    *,
    q_act: str | None = None,
    v_act: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """The 2-D parallel scan: the sum of four independent scans, each column down and up, each row right and left.

    Args:
        q, f, v: `[B, Y, X, H, K]`; the rest as `hgrn2_scan`.

    Returns:
        o `[B, Y, X, H, V]` in the dtype of q.
    """
    return grid_scan(q, f, v, lower_bound, "2d", q_act=q_act, v_act=v_act, impl=impl)


def grid_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None,
    direction: str,
    *,
    q_act: str | None = None,
    v_act: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """`hgrn2_scan_2d`, or with direction "rows" or "columns" only its two scans along X or along Y."""
    _check_inputs(q, f, v, lower_bound, q_act, v_act, ndim=5, legend="[B, Y, X, H, K]")
    options = dict(q_act=q_act, v_act=v_act)
    # the two along one axis are the kernels of sequences, on other strides
    name = _implementation(impl, q, lower_bound, "2d" if direction == "2d" else "both", **options)
    if name == "triton":
        return (lane_scan if q.shape[-1] < 16 else triton_scan)(
            q, f, v, lower_bound, direction=direction, output_final_state=False, **options
        )[0]
    found = []
    for columns in {"rows": (False,), "columns": (True,), "2d": (False, True)}[direction]:
        lines = [x.transpose(1, 2) if columns else x for x in (q, f, v)]
        o, _ = hgrn2_scan(*(x.flatten(0, 1) for x in lines), lower_bound, direction="both", impl=name, **options)
        o = o.unflatten(0, lines[0].shape[:2])
        found.append(o.transpose(1, 2) if columns else o)
    return sum(found)


@torch.no_grad()
def hgrn2_step(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    state: Tensor,
    lower_bound: Tensor | None = None,
    *,
    q_act: str | None = None,
    v_act: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """One token of the recurrence, for decoding: no gradients, `state` is updated in place.

    On CUDA one Triton kernel (for a contiguous fp32 state), which a CUDA graph may hold after one call outside of it.

    Args:
        q, f, v: `[B, H, K]`.
        state: `[B, H, K, V]` fp32 (fp64 for fp64 inputs).
        lower_bound, q_act, v_act, impl: as `hgrn2_scan`; "reference" is "torch" here.

    Returns:
        o `[B, H, V]` in the dtype of q.
    """
    _check_inputs(q, f, v, lower_bound, q_act, v_act, ndim=3, legend="[B, H, K]")
    _check_state("state", state, (*q.shape, q.shape[2]), compute_dtype(q), q.device)
    _check_choice("impl", impl, IMPLS)
    reason = "impl" if impl in ("torch", "reference") else step_supported(q, state, lower_bound, q_act, v_act)
    if reason is not None and impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {reason}; use impl='auto' or 'torch'")
    return (triton_step if reason is None else torch_step)(q, f, v, state, lower_bound, q_act, v_act)


def choose_impl(device: torch.device | str, head_dim: int) -> tuple[str, str]:
    """What `impl="auto"` runs for tensors on `device`: ("triton" | "torch", the reason).

    The Triton kernels also refuse fp64 and devices where they fail their self-test; the first call says so.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "torch", f"{device.type} tensors run the chunked torch form"
    reason = triton_supported(torch.empty(1, 1, 1, head_dim, dtype=torch.float32, device="meta"), device=device)
    return ("triton", "fused kernels") if reason is None else ("torch", reason)


def _implementation(impl: str, q: Tensor, lower_bound: Tensor | None, direction: str, q_act, v_act) -> str:
    """The implementation that runs for `impl`: "reference", "torch" or "triton"."""
    _check_choice("impl", impl, IMPLS)
    # on a CPU, Triton is its interpreter: for tests, by name only
    if impl in ("reference", "torch") or (impl == "auto" and q.device.type != "cuda"):
        return "torch" if impl == "auto" else impl
    call = dict(lower_bound=lower_bound is not None, direction=direction, q_act=q_act, v_act=v_act)
    reason = triton_supported(q, self_test=call)
    if reason is not None and impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {reason}; use impl='auto' or 'torch'")
    return "triton" if reason is None else "torch"


def _check_choice(key: str, value, valid: tuple) -> None:
    if value not in valid:
        raise ValueError(f"{key}={value!r} is unknown; valid: {', '.join(map(repr, valid))}")


def _check_inputs(q, f, v, lower_bound, q_act, v_act, *, ndim: int, legend: str) -> None:
    if q.dim() != ndim:
        raise ValueError(f"q must be {legend}, got shape {tuple(q.shape)}")
    for name, x in (("f", f), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, f and v must agree: q is {tuple(q.shape)} {q.dtype} on {q.device}, "
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    if q.dtype not in DTYPES:
        raise ValueError(f"q, f, v have dtype {q.dtype}; valid: {', '.join(map(str, DTYPES))}")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head dim {q.shape[-1]} is not supported; valid: {', '.join(map(str, HEAD_DIMS))}")
    if 0 in q.shape:
        raise ValueError(f"q must not be empty, got shape {tuple(q.shape)}")
    if lower_bound is not None and tuple(lower_bound.shape) != tuple(q.shape[-2:]):
        raise ValueError(f"lower_bound must be [H, K] = {tuple(q.shape[-2:])}, got {tuple(lower_bound.shape)}")
    if lower_bound is not None and lower_bound.device != q.device:
        raise ValueError(f"lower_bound must be on {q.device} as q is, got {lower_bound.device}")
    _check_choice("q_act", q_act, ACTIVATIONS)
    _check_choice("v_act", v_act, ACTIVATIONS)


def _check_states(q, direction, initial_state, output_final_state, lengths, cu_seqlens) -> None:
    batch, _, heads, dim = q.shape
    if direction == "both" and (initial_state is not None or output_final_state):
        raise ValueError("direction='both' has no states: pass no initial_state and output_final_state=False")
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("lengths and cu_seqlens exclude each other: pass one of them")
    rows = batch
    for name, x, size in (("lengths", lengths, batch), ("cu_seqlens", cu_seqlens, None)):
        if x is None:
            continue
        if x.dim() != 1 or x.dtype not in (torch.int32, torch.int64) or x.device != q.device:
            raise ValueError(
                f"{name} must be 1-D int32 or int64 on {q.device}, got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
        if size is not None and x.numel() != size:
            raise ValueError(f"{name} must have one entry a row ({size}), got {x.numel()}")
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.numel() < 2:
            raise ValueError(
                f"cu_seqlens needs B = 1 and at least 2 entries, got B = {batch}, {cu_seqlens.numel()} entries"
            )
        rows = cu_seqlens.numel() - 1
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would wait for the device
        _check_values(q.shape[1], lengths, cu_seqlens)
    if initial_state is not None:
        _check_state("initial_state", initial_state, (rows, heads, dim, dim), None, q.device)


def _check_values(time: int, lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if lengths is not None and (lengths.min() < 0 or lengths.max() > time):
        raise ValueError(f"lengths must be from 0 to T = {time}, got {lengths.tolist()}")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != time or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {time}, got {bounds}")


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, device) -> None:
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} must be [rows, H, K, V] = {shape}, got {tuple(state.shape)}")
    if dtype is not None and state.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} (it is updated in place), got {state.dtype}")
    if state.device != device:
        raise ValueError(f"{name} must be on {device} as q is, got {state.device}")
