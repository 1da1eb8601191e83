"""Decoding in a CUDA graph: the host cannot launch a step's small kernels as fast as a GPU runs them."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """`step(x, state, gammas)` of a backbone or a language model, replayed from a CUDA graph; elsewhere a plain call.

        decode = GraphedStep(backbone.step, state, backbone.gammas())
        y = decode(x)  # x as at the first call, in shape, dtype and device

    `state` is the caller's and is updated in place: write to it (`state.copy_(other)`) to start from elsewhere. Weights
    may change in place, not move; dropout must be off, and so must autocast unless it stays on throughout.
    """

    def __init__(self, step: Callable[..., Tensor], state: Tensor, gammas: list[Tensor | None] | None = None):
        self.step, self.state, self.gammas = step, state, gammas
        self.graph = self.x = self.y = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """One token a row; the result is a fresh tensor."""
        if x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return self.step(x, self.state, self.gammas)
        if self.graph is None:
            self._capture(x)
        if (x.shape, x.dtype) != (self.x.shape, self.x.dtype):
            raise ValueError(f"the graph is for {tuple(self.x.shape)} {self.x.dtype}, got {tuple(x.shape)} {x.dtype}")
        self.x.copy_(x)
        self.graph.replay()
        return self.y.clone()

    def _capture(self, x: Tensor) -> None:
        with torch.cuda.device(x.device), _uncached_autocast():
            self.x, before = x.clone(), self.state.clone()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):  # compiles and tests kernels, allocates workspaces
                    self.step(self.x, self.state, self.gammas)
            finally:
                torch.cuda.current_stream().wait_stream(stream)
                self.state.copy_(before)
            # other threads (data loading, NCCL's) may call CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.y = self.step(self.x, self.state, self.gammas)
            self.graph = graph


def _uncached_autocast():
    """Autocast as it is, but without its cache: a cached copy of a weight would go stale inside a graph."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
