"""The backbone shared by all tasks: `[B, T, D] -> [B, T, D]`, pre-norm residual blocks of mixer and GLU.

Initialisation (the one place): PyTorch's defaults for Linear (uniform, bound 1/sqrt(fan_in), biases too) and norms
(weight 1, bias 0); `lower_bounds` 1, so that gamma_k = k / depth. Embeddings and heads belong to the tasks.

Legend: B batch, T tokens, D width, L layers, H heads, K = V head dim.
"""

import torch
from torch import Tensor, nn
from torch import _dynamo as dynamo

from hgrn2.config import HGRN2Config
from hgrn2.fused import (
    block_consists,
    fused_glu_step,
    fused_mixer_step,
    glu_supported,
    mixer_supported,
    norm_consists,
)
from hgrn2.layers import DropPath, apply_norm, make_glu, make_norm
from hgrn2.mixer import HGRN2Mixer
from hgrn2.ops.gates import without_autocast


class Block(nn.Module):
    """One layer: `x + Drop(Mixer(Norm x))`, then `x + Drop(GLU(Norm x))` unless the config has no GLU."""

    def __init__(self, config: HGRN2Config, drop_path: float = 0.0):
        super().__init__()
        self.mixer_norm = make_norm(config.norm, config.dim, config.norm_eps)
        self.mixer = HGRN2Mixer(config)
        self.glu_norm = make_norm(config.norm, config.dim, config.norm_eps) if config.hidden else None
        self.glu = make_glu(config.dim, config.hidden, config.glu_act, config.glu_bias) if config.hidden else None
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def _drop(self, branch: Tensor) -> Tensor:
        return self.drop_path(self.dropout(branch))

    def _channel_mix(self, x: Tensor, pad: Tensor | None) -> Tensor:
        return x if self.glu is None else x + self._drop(self.glu(apply_norm(self.glu_norm, x, pad)))

    def forward(
        self, x: Tensor, branch: Tensor | None, lower_bound: Tensor | None, pad: Tensor | None, **scan
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer on `x + branch` (x alone for None).

        The last residual sum is left to who comes next: compiled, it is one launch with the norm that follows it.

        Returns:
            The stream and the branch that is still to be added to it, both `[B, T, D]`; the scan's state or None.
        """
        if branch is not None:
            x = x + branch
        mixed, state = self.mixer(apply_norm(self.mixer_norm, x, pad), lower_bound, **scan)
        mixed = self._drop(mixed)
        if self.glu is None:
            return x, mixed, state
        x = x + mixed
        return x, self._drop(self.glu(apply_norm(self.glu_norm, x, pad))), state

    def step(self, x: Tensor, state: Tensor, lower_bound: Tensor | None) -> Tensor:
        if not (block_consists(self, Block) and mixer_supported(self.mixer, HGRN2Mixer, x, state, lower_bound)):
            mixed = self.mixer.step(apply_norm(self.mixer_norm, x, None), state, lower_bound)
            return self._channel_mix(x + self._drop(mixed), None)
        x = fused_mixer_step(self.mixer, x, state, lower_bound, self.mixer_norm)
        if self.glu is not None and norm_consists(self.glu_norm) and glu_supported(self.glu, x):
            return fused_glu_step(self.glu, x, self.glu_norm)
        return self._channel_mix(x, None)


class AddNorm(nn.Module):
    """The last residual sum and the norm after it; a module without state of its own, so that it compiles in place."""

    def forward(self, norm: nn.Module, x: Tensor, branch: Tensor, pad: Tensor | None) -> Tensor:
        return apply_norm(norm, x + branch, pad)


class HGRN2Backbone(nn.Module):
    """A stack of HGRN2 layers with learnt lower bounds (arXiv 2404.07904; frame of HGRN, arXiv 2311.04823)."""

    def __init__(self, config: HGRN2Config):
        super().__init__()
        self.config = config
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = make_norm(config.final_norm, config.dim, config.norm_eps)
        self.add_norm = AddNorm()
        # with one layer gamma is 0 whatever the parameter says
        self.lower_bounds = (
            nn.Parameter(torch.ones(config.depth, config.dim)) if config.lower_bound and config.depth > 1 else None
        )

    def compile_blocks(self, **options) -> None:
        """Compile each block in place (`nn.Module.compile`: keys of checkpoints stay), as whole graphs.

        Blocks of one kind share a graph: the first layer, which has no lower bound, has one and all others another, for
        each of training and evaluation, padded and packed rows, and fixed and changing sizes. Prompts that leave a
        state behind are read uncompiled.
        """
        # dynamo's own limit of 8 counts the graphs of all layers together, and past it a whole graph is an error
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
        for block in self.blocks:
            block.compile(fullgraph=True, **options)
        self.add_norm.compile(fullgraph=True, **options)

    def gammas(self) -> list[Tensor | None]:
        """Each layer's lower bound gamma `[H, K]` in [0, 1), fp32; None where it is constantly 0 (the first layer)."""
        if self.lower_bounds is None:
            return [None] * self.config.depth
        with without_autocast(self.lower_bounds):
            share = self.lower_bounds.to(torch.promote_types(self.lower_bounds.dtype, torch.float32)).softmax(0)
            # cumsum_k - P_0 and sum_{j<k} P_j for k >= 1, without a difference; rounding must not reach 1
            terms = share[:-1] if self.config.lower_bound == "exclusive" else share[1:]
            gamma = terms.cumsum(0).clamp(max=1 - 2**-24)
        gamma = gamma.unflatten(1, (self.config.heads, self.config.expand_ratio))
        return [None, *gamma.unbind(0)]

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            x: `[B, T, D]`.
            lengths: int `[B]`, real tokens of right-padded rows (1-D scans). Padded inputs are zeroed at entry and
                padded outputs are 0: whatever padding holds, NaN too, reaches no output and no gradient.
            cu_seqlens: int `[N + 1]`, documents packed in one row (B = 1, 1-D scans).
            grid: (Y, X) with Y * X = T in raster order, required by 2-D scans and refused by 1-D ones.
            state: `[L, B, H, K, V]` to continue from (`init_state`, or a returned state); causal only.
            return_state: also return the final state (after each row's last real token); causal only.

        Returns:
            `[B, T, D]`, or that and the state `[L, B, H, K, V]` in fp32.
        """
        self._check(x, lengths, cu_seqlens, grid, state, return_state)
        if return_state and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.compiler.set_stance("force_eager"):
                return self._run(x, lengths, cu_seqlens, grid, state, return_state)
        return self._run(x, lengths, cu_seqlens, grid, state, return_state)

    def _run(self, x, lengths, cu_seqlens, grid, state, return_state) -> Tensor | tuple[Tensor, Tensor]:
        pad = None
        if lengths is not None:
            pad = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None]).unsqueeze(-1)
            x = x.masked_fill(pad, 0)
        finals, branch = [], None
        for i, (block, gamma) in enumerate(zip(self.blocks, self.gammas(), strict=True)):
            start = None if state is None else state[i]
            if cu_seqlens is not None and not torch.compiler.is_compiling():
                for stream in filter(torch.is_tensor, (x, branch)):
                    dynamo.maybe_mark_dynamic(stream, 1)  # packed rows are of any length: none is worth a graph
            x, branch, final = block(
                x, branch, gamma, pad,
                lengths=lengths, cu_seqlens=cu_seqlens, grid=grid, state=start, return_state=return_state,
            )  # fmt: skip
            finals.append(final)
        x = self.add_norm(self.norm, x, branch, pad)
        if pad is not None:
            x = x.masked_fill(pad, 0)
        return (x, torch.stack(finals)) if return_state else x

    def init_state(self, batch_size: int) -> Tensor:
        """A zero state `[L, B, H, K, V]` for `step`, on the parameters' device: fp32, or fp64 for fp64 parameters."""
        weight, c = self.blocks[0].mixer.in_proj.weight, self.config
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (c.depth, batch_size, c.heads, c.expand_ratio, c.expand_ratio)
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor, gammas: list[Tensor | None] | None = None) -> Tensor:
        """One token of decoding: `[B, D]` -> `[B, D]`; `state` `[L, B, H, K, V]` is updated in place.

        `gammas`, from `self.gammas()`, spares computing them for every token.
        """
        if self.config.scan != "causal":
            raise ValueError(f"step() decodes token by token and needs scan='causal', not {self.config.scan!r}")
        gammas = self.gammas() if gammas is None else gammas
        for i, (block, gamma) in enumerate(zip(self.blocks, gammas, strict=True)):
            x = block.step(x, state[i], gamma)
        return apply_norm(self.norm, x, None)

    def _check(self, x, lengths, cu_seqlens, grid, state, return_state) -> None:
        scan = self.config.scan
        if x.dim() != 3 or x.shape[-1] != self.config.dim:
            raise ValueError(f"x must be [B, T, {self.config.dim}], got {tuple(x.shape)}")
        if scan.startswith("2d"):
            if grid is None or grid[0] * grid[1] != x.shape[1]:
                raise ValueError(f"scan={scan!r} needs grid=(Y, X) with Y * X = T = {x.shape[1]}, got {grid}")
            if lengths is not None or cu_seqlens is not None:
                raise ValueError(f"scan={scan!r} takes no lengths or cu_seqlens: every cell of the grid is a token")
        elif grid is not None:
            raise ValueError(f"grid={grid} has no effect with scan={scan!r}")
        if scan != "causal" and (state is not None or return_state):
            raise ValueError(f"state and return_state need scan='causal', not {scan!r}")
