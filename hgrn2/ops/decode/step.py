"""One decoding step on Triton: gates, activations, the state's update and the output in one launch, every head dim.

Legend: B batch, H heads, K = V head dim. A program owns BH heads and BV value columns with all K rows of their states,
so that no sum crosses programs; each state is read and written once.
"""

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hgrn2.ops.gates import ACTIVATIONS, activate, forget_gate, triton, without_autocast
from hgrn2.ops.launch import HEAD_DIMS, SMALL_HEAD_DIMS, kinds, launch, on_device
from hgrn2.ops.register import is_traced, register, say_falls_back, too_old
from hgrn2.ops.register import rows as contiguous_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# state elements a program: 32 a thread, in rows of 128 bytes for head dim 128
_ELEMENTS = 4096
_WARPS = 4

if triton is not None:
    import triton.language as tl

    from hgrn2.ops.gates import activate_tile, gate_tile

    @triton.jit(do_not_specialize=["H"])
    def step_kernel(
        q_ptr, f_ptr, v_ptr, state_ptr, lb_ptr, o_ptr,
        q_stride_b, q_stride_h, f_stride_b, f_stride_h, v_stride_b, v_stride_h, H,
        K: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, HAS_LB: tl.constexpr,
        Q_ACT: tl.constexpr, V_ACT: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """q, f `[B, H, K]`, v `[B, H, V]`, state `[B, H, K, V]` (in place) -> o `[B, H, V]`.

        OVERLAP: launched while the kernel before still runs; state and bound are read before the wait.
        """
        pid = tl.program_id(0)
        i_v = pid % (K // BV)
        blocks = (H + BH - 1) // BH
        i_h = pid // (K // BV) % blocks
        b = (pid // (K // BV) // blocks).to(tl.int64)
        o_h = i_h * BH + tl.arange(0, BH)
        o_k = tl.arange(0, K)
        o_v = i_v * BV + tl.arange(0, BV)
        m_h = o_h < H
        m_hk = m_h[:, None] & (o_k >= 0)[None, :]
        m_hv = m_h[:, None] & (o_v >= 0)[None, :]
        rows = (b * H + o_h)[:, None, None] * K + o_k[None, :, None]
        p_state = state_ptr + rows * K + o_v[None, None, :]
        m_state = m_h[:, None, None] & (o_k >= 0)[None, :, None] & (o_v >= 0)[None, None, :]
        state = tl.load(p_state, mask=m_state, other=0.0)
        gamma = 0.0
        if HAS_LB:
            gamma = tl.load(lb_ptr + (o_h * K)[:, None] + o_k[None, :], mask=m_hk, other=0.0)
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        q = tl.load(q_ptr + b * q_stride_b + (o_h * q_stride_h)[:, None] + o_k[None, :], mask=m_hk, other=0.0)
        f = tl.load(f_ptr + b * f_stride_b + (o_h * f_stride_h)[:, None] + o_k[None, :], mask=m_hk, other=0.0)
        v = tl.load(v_ptr + b * v_stride_b + (o_h * v_stride_h)[:, None] + o_v[None, :], mask=m_hv, other=0.0)
        _, _, k, lam, _ = gate_tile(f.to(tl.float32), gamma, HAS_LB)
        q = activate_tile(q.to(tl.float32), Q_ACT)
        v = activate_tile(v.to(tl.float32), V_ACT)
        state = lam[:, :, None] * state + k[:, :, None] * v[:, None, :]
        tl.store(p_state, state, mask=m_state)
        o = tl.sum(q[:, :, None] * state, axis=1)
        p_o = o_ptr + ((b * H + o_h) * K)[:, None] + o_v[None, :]
        tl.store(p_o, o.to(o_ptr.dtype.element_ty), mask=m_hv)


def torch_step(
    q: Tensor, f: Tensor, v: Tensor, state: Tensor, lower_bound: Tensor | None, q_act: str | None, v_act: str | None
) -> Tensor:
    """The step in torch, on any device; gates in the state's dtype."""
    dtype = state.dtype
    with without_autocast(q):
        gamma = None if lower_bound is None else lower_bound.to(dtype)
        k, log_lam = forget_gate(f.to(dtype), gamma)
        v_ = activate(v.to(dtype), v_act)
        q_ = activate(q.to(dtype), q_act)
        state.mul_(log_lam.exp().unsqueeze(-1)).addcmul_(k.unsqueeze(-1), v_.unsqueeze(-2))
        return (q_.unsqueeze(-2) @ state).squeeze(-2).to(q.dtype)


def blocks(heads: int, dim: int) -> tuple[int, int]:
    """(BH, BV): heads and value columns a program owns."""
    columns = min(dim, max(1, _ELEMENTS // dim))
    most = min(_ELEMENTS // columns, 512)  # gates of more rows leave too few registers
    return min(max(1, most // dim), 1 << (heads - 1).bit_length()), columns


def run_step(
    q: Tensor, f: Tensor, v: Tensor, state: Tensor, lower_bound: Tensor | None, q_act: int, v_act: int, overlap=False
) -> Tensor:
    """Launch the kernel: q, f, v with contiguous rows, state contiguous fp32, lower_bound contiguous fp32 or None.

    overlap: the kernel launched just before on this stream is one of this package's that waits for its own
    predecessor, and writes neither state nor lower_bound: start while it still runs (see `matvec`).
    """
    batch, heads, dim = q.shape
    o = torch.empty((batch, heads, dim), dtype=q.dtype, device=q.device)
    n_heads, columns = blocks(heads, dim)
    args = (q, f, v, state, lower_bound, o, *q.stride()[:2], *f.stride()[:2], *v.stride()[:2], heads)
    constants = dict(
        K=dim, BH=n_heads, BV=columns, HAS_LB=lower_bound is not None, Q_ACT=q_act, V_ACT=v_act, OVERLAP=overlap
    )
    programs = batch * -(-heads // n_heads) * (dim // columns)
    with on_device(q):
        launch(step_kernel, programs, args, constants, _WARPS, kinds((q, f, v, state, lower_bound)), pdl=overlap)
    return o


def _step(q, f, v, state, lower_bound, q_act: int, v_act: int) -> Tensor:
    return run_step(contiguous_rows(q), contiguous_rows(f), contiguous_rows(v), state, lower_bound, q_act, v_act)


register(
    "step(Tensor q, Tensor f, Tensor v, Tensor(a!) state, Tensor? lower_bound, int q_act, int v_act) -> Tensor",
    _step, lambda q, *_: q.new_empty(q.shape), of="hgrn2_step",
)  # fmt: skip
register_flop_formula(torch.ops.hgrn2.step, get_raw=True)(lambda q, *_, **__: 4 * q.numel() * q.shape[-1])


def triton_step(
    q: Tensor, f: Tensor, v: Tensor, state: Tensor, lower_bound: Tensor | None, q_act: str | None, v_act: str | None
) -> Tensor:
    """The step on Triton, arguments as `hgrn2.ops.hgrn2_step`; see `step_supported`."""
    if lower_bound is not None:
        lower_bound = lower_bound.float().contiguous()
    run = torch.ops.hgrn2.step if is_traced() else _step
    return run(q, f, v, state, lower_bound, ACTIVATIONS.index(q_act), ACTIVATIONS.index(v_act))


def step_supported(
    q: Tensor, state: Tensor, lower_bound: Tensor | None, q_act: str | None, v_act: str | None
) -> str | None:
    """Why the Triton step cannot run for a call on CUDA, or None; runs its self-test at first use."""
    if triton is None:
        return "Triton is not installed"
    if q.device.type != "cuda" or torch.version.hip is not None:
        return "the kernels are for NVIDIA devices"
    if q.dtype not in DTYPES:
        return f"no Triton kernel for {q.dtype}"
    if not state.is_contiguous():
        return "the state is not contiguous"
    dim = next((size for size in (*SMALL_HEAD_DIMS, *HEAD_DIMS) if q.shape[-1] == size), None)  # a constant in tracing
    return _checked(q.device.index, dim, q.dtype, lower_bound is not None, q_act, v_act)


@torch.compiler.assume_constant_result
def _checked(*case) -> str | None:
    return _checked_once(*case)


@functools.cache
def _checked_once(index: int, dim: int, dtype: torch.dtype, bounded: bool, q_act, v_act) -> str | None:
    if (reason := too_old(index)) is not None:
        return reason
    from hgrn2.ops.selftest import remembered

    case = ["step", dim, str(dtype), bounded, q_act, v_act]
    reason = remembered(index, case, lambda: _self_test(index, dim, dtype, bounded, q_act, v_act))
    say_falls_back("hgrn2_step", reason)
    return reason


# relative 2-norm errors, well above those of a correct kernel
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def _self_test(index: int, dim: int, dtype: torch.dtype, bounded: bool, q_act, v_act) -> str | None:
    """None if the kernel agrees with the torch form, else what is wrong."""
    device = torch.device("cuda", index)
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, device=device, generator=generator)
    heads = max(2, 257 // dim)  # more than one program's, and not a multiple of them
    q, f, v = (draw(2, heads, dim).to(dtype) for _ in range(3))
    state = draw(2, heads, dim, dim)
    gamma = 0.9 * torch.rand(heads, dim, device=device, generator=generator) if bounded else None
    expected = state.clone()
    want = torch_step(q.float(), f.float(), v.float(), expected, gamma, q_act, v_act)
    got = run_step(q, f, v, state, gamma, ACTIVATIONS.index(q_act), ACTIVATIONS.index(v_act))
    for name, a, b, limit in (("o", got, want, LIMITS[dtype]), ("state", state, expected, 1e-5)):
        error = float((a.float() - b).norm() / b.norm())
        if not error < limit:
            return f"{name} of the step for head dim {dim}, {dtype} is off by {error:.1e}"
    return None
