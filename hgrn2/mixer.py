"""The token mixer (HGRU2): projections, the scan in its directions, output norm.

Legend: B batch, T tokens, D width, H heads, K = V head dim (`expand_ratio`), Y rows and X columns of a grid.
"""

import torch
from torch import Tensor, nn

from hgrn2.config import HGRN2Config
from hgrn2.fused import fused_mixer_step, mixer_supported
from hgrn2.layers import make_norm
from hgrn2.ops import grid_scan, hgrn2_scan, hgrn2_scan_2d, hgrn2_step
from hgrn2.ops.gates import forget_gate


class _Unpack(torch.autograd.Function):
    """`packed.unbind(-3)`; gradients that are the slots of one packed tensor already are handed on without a copy."""

    @staticmethod
    def forward(ctx, packed: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape = packed.shape
        return packed.unbind(-3)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> Tensor | None:
        if all(x is None for x in grads):
            return None
        whole = None if torch.is_grad_enabled() else _packed(grads, ctx.shape)
        if whole is None:
            some = next(x for x in grads if x is not None)
            whole = torch.stack([torch.zeros_like(some) if x is None else x for x in grads], dim=-3)
        return whole


def _packed(slots: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor | None:
    """The contiguous tensor of `shape` `[..., N, H, K]` whose slots `[..., H, K]` these are, in order, or None."""
    first = slots[0]
    if first is None:
        return None
    whole = [1]
    for size in shape[:0:-1]:
        whole.insert(0, whole[0] * size)
    row = whole[-3]
    for i, x in enumerate(slots):
        if (
            x is None
            or x.stride() != (*whole[:-3], *whole[-2:])
            or x.dtype != first.dtype
            or x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or x.storage_offset() != first.storage_offset() + i * row
        ):
            return None
    return first.as_strided(shape, whole)


class HGRN2Mixer(nn.Module):
    """`out_proj(norm(scan(q, f, v)))`; parameter names and the packed V, Q, F order are those of the authors' module
    (Doraemonzzz/hgru2-pytorch), so its weights load as they are."""

    def __init__(self, config: HGRN2Config):
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.norm = make_norm(config.mixer_norm, config.dim, config.norm_eps)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=config.bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., D]` -> q, f, v `[..., H, K]`, views of one packed projection."""
        packed = self.in_proj(x).unflatten(-1, (3, self.config.heads, self.config.expand_ratio))
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        v, q, f = packed.unbind(-3) if traced else _Unpack.apply(packed)
        return q, f, v

    def forward(
        self,
        x: Tensor,
        lower_bound: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix `x` over its tokens.

        Args:
            x: `[B, T, D]`.
            lower_bound: this layer's gamma `[H, K]`, or None for 0.
            lengths, cu_seqlens: as `hgrn2_scan`; 1-D scans only.
            grid: (Y, X) with Y * X = T, raster order; 2-D scans only.
            state: `[B, H, K, V]` to start from; causal only.
            return_state: return the final state too; causal only.

        Returns:
            `[B, T, D]`, and the final state or None.
        """
        scan = self.config.scan
        if scan == "2d_series":
            for direction in ("columns", "rows"):
                q, f, v = (a.unflatten(1, grid) for a in self._project(x))
                o = grid_scan(q, f, v, lower_bound, direction, **self._acts())
                x = self._output(o.flatten(1, 2))
            return x, None
        q, f, v = self._project(x)
        acts = self._acts()
        if scan == "2d_parallel":
            q, f, v = (a.unflatten(1, grid) for a in (q, f, v))
            o, final = hgrn2_scan_2d(q, f, v, lower_bound, **acts).flatten(1, 2), None
        else:
            o, final = hgrn2_scan(
                q, f, v, lower_bound,
                direction="forward" if scan == "causal" else "both",
                initial_state=state, output_final_state=return_state, lengths=lengths, cu_seqlens=cu_seqlens, **acts,
            )  # fmt: skip
        return self._output(o), final

    def step(self, x: Tensor, state: Tensor, lower_bound: Tensor | None = None) -> Tensor:
        """One token `[B, D]` -> `[B, D]`; `state` `[B, H, K, V]` is updated in place."""
        if mixer_supported(self, HGRN2Mixer, x, state, lower_bound):
            return fused_mixer_step(self, x, state, lower_bound)
        q, f, v = self._project(x)
        o = hgrn2_step(q, f, v, state, lower_bound, **self._acts())
        return self._output(o)

    @torch.no_grad()
    def log_decay(self, x: Tensor, lower_bound: Tensor | None = None) -> Tensor:
        """log lam `[B, T, H, K]` fp32 of the forget gates for the mixer's input `[B, T, D]`; for inspection."""
        _, f, _ = self._project(x)
        return forget_gate(f.float(), None if lower_bound is None else lower_bound.float())[1]

    def _acts(self) -> dict:
        return {"q_act": self.config.q_act, "v_act": self.config.v_act, "impl": self.config.impl}

    def _output(self, o: Tensor) -> Tensor:
        """`[..., H, V]` -> `[..., D]`: the norm is over the full width, not per head."""
        return self.out_proj(self.norm(o.flatten(-2)))
