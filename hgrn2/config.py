"""The model's configuration: one typed dataclass, checked as a whole."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

NormName = Literal["layernorm", "rmsnorm", "simple_rmsnorm", "batchnorm", "sync_batchnorm"]
TokenNormName = Literal["layernorm", "rmsnorm", "simple_rmsnorm"]
GateActivation = Literal["silu", "sigmoid"]
GLUActivation = Literal["silu", "sigmoid", "gelu", "relu"]
Scan = Literal["causal", "bidirectional", "2d_parallel", "2d_series"]
LowerBound = Literal["cumsum", "exclusive"]
Impl = Literal["auto", "triton", "torch", "reference"]

MAX_EXPAND_RATIO = 256


class ConfigError(ValueError):
    """A user's mistake in a config, a path or a combination; the message is for the user and says what is valid.

    Args:
        message: for the user.
        of: the dataclass whose fields the message names, for a command line that knows them by longer keys.
    """

    def __init__(self, message: str, of: type | None = None):
        super().__init__(message)
        self.of = of


def check(problems: list[str], of: type | None = None) -> None:
    """Raise one ConfigError that lists all problems, if there are any."""
    if problems:
        raise ConfigError("; ".join(problems), of)


def choices(hint: Any) -> list[Any]:
    """The values that a type of choices allows, `Literal[...]` or `Literal[...] | None`; empty for any other type."""
    parts = get_args(hint)
    if parts and all(isinstance(part, str) for part in parts):
        return list(parts)
    named = [value for part in parts for value in choices(part)]
    return [None, *named] if named and type(None) in parts else named


def unknown_choices(config: Any) -> list[str]:
    """Problems of a dataclass whose fields hold something else than their types' choices."""
    valid = {key: found for key, hint in get_type_hints(type(config)).items() if (found := choices(hint))}
    return [
        f"{key}={getattr(config, key)!r} is unknown; valid: {', '.join(map(str, allowed))}"
        for key, allowed in valid.items()
        if getattr(config, key) not in allowed
    ]


@dataclass
class HGRN2Config:
    """An HGRN2 backbone `[B, T, dim] -> [B, T, dim]`; the defaults are the official module's (FLA and LM differ).

    Args:
        dim: width of the residual stream.
        depth: number of layers, each a mixer block and (unless `glu_width` is 0) a GLU block.
        expand_ratio: head dim e of keys and values; a power of two from 1 to 256 that divides dim (heads = dim / e).
        scan: causal; bidirectional (two directions summed); 2d_parallel (four scans over a grid summed); 2d_series
            (bidirectional along the columns, then along the rows, the same weights).
        q_act: activation of the output gate q.
        v_act: activation of the input v.
        lower_bound: how the forget gates' lower bounds grow with depth from P = softmax over layers: cumsum
            (`cumsum(P)_k - P_0`, LM), exclusive (`sum_{j<k} P_j`, ViT and LRA), or null for none. It is 0 in the first
            layer, and so with depth 1.
        bias: biases in the mixer's projections.
        norm: pre-norm of the residual blocks.
        mixer_norm: norm over the full width before the mixer's output projection.
        final_norm: norm after the last layer, or null.
        norm_eps: epsilon of all norms.
        glu_width: hidden width of the GLU; null for int(8/3 dim), 0 for no channel mixer (MQAR).
        glu_act: activation of the GLU's gate; null for none (bilinear).
        glu_bias: biases in the GLU.
        dropout: dropout on the output of both residual branches.
        drop_path: stochastic depth, the rate of the last layer (growing linearly from 0).
        impl: which implementation of the scan runs; auto picks Triton on CUDA, else torch.
    """

    dim: int = 128
    depth: int = 4
    expand_ratio: int = 32
    scan: Scan = "causal"
    q_act: GateActivation | None = "sigmoid"
    v_act: GateActivation | None = "silu"
    lower_bound: LowerBound | None = "cumsum"
    bias: bool = True
    norm: NormName = "layernorm"
    mixer_norm: TokenNormName = "layernorm"
    final_norm: NormName | None = "layernorm"
    norm_eps: float = 1e-5
    glu_width: int | None = None
    glu_act: GLUActivation | None = "silu"
    glu_bias: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        problems = []
        for key in ("dim", "depth", "expand_ratio"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                problems.append(f"{key}={getattr(self, key)} must be a whole number of at least 1")
        e = self.expand_ratio
        if problems:
            pass  # no sense in dividing them
        elif not (1 <= e <= MAX_EXPAND_RATIO and e & (e - 1) == 0):
            problems.append(f"expand_ratio={e} must be a power of two from 1 to {MAX_EXPAND_RATIO}")
        elif self.dim % e:
            problems.append(f"expand_ratio={e} must divide dim={self.dim}")
        problems += unknown_choices(self)
        if not self.norm_eps > 0:
            problems.append(f"norm_eps={self.norm_eps} must be positive")
        for key in ("dropout", "drop_path"):
            if not 0 <= getattr(self, key) < 1:
                problems.append(f"{key}={getattr(self, key)} must be in [0, 1)")
        if self.glu_width is not None and self.glu_width < 0:
            problems.append(f"glu_width={self.glu_width} must be 0 (no GLU) or more")
        if self.glu_width == 0:
            for key in ("glu_act", "glu_bias"):
                if getattr(self, key) != getattr(type(self), key):
                    problems.append(f"{key}={getattr(self, key)} has no effect with glu_width=0 (no GLU)")
        if self.drop_path and self.depth == 1:
            problems.append(f"drop_path={self.drop_path} has no effect with depth=1 (it grows from 0)")
        check(problems, type(self))

    @property
    def heads(self) -> int:
        """Number of heads, dim / expand_ratio."""
        return self.dim // self.expand_ratio

    @property
    def hidden(self) -> int:
        """Hidden width of the GLU, 0 where there is none."""
        return int(8 * self.dim / 3) if self.glu_width is None else self.glu_width
