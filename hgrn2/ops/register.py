"""The ops as torch ops, once for all: registration, what they refuse, and what they count as.

FLOPs, for `torch.utils.flop_counter` and what builds on it: a multiplication and an addition are 2. For T tokens and H
heads with states K x K, a scan takes `4 T H K (C + K)` forward and twice that backward: each token enters the state and
is read from it, 2 K^2 each, and chunks of C tokens form scores and weigh the values by them, 2 C K each (C = 0 for head
dims 1 to 8, whose kernels have no chunks). Two directions count as two scans. Gates, activations and decays are not
products and do not count, nor does what a kernel computes again. The torch form is no op of its own: its matrix
products count themselves, in chunks a fourth less as it leaves out the half of the scores that is 0.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

# scans of each of `directions.DIRECTIONS`
_SCANS = (1, 1, 2, 4, 2, 2)


# products in place, which torch counts nothing for
for _op, _known in (("baddbmm_", "baddbmm"), ("addmm_", "addmm")):
    flop_registry.setdefault(getattr(torch.ops.aten, _op), flop_registry[getattr(torch.ops.aten, _known)])


_LIBRARY = torch.library.Library("hgrn2", "FRAGMENT")


def register(schema: str, run: Callable, fake: Callable, differentiate=None, save=None, of: str = "hgrn2_scan") -> None:
    """Make a torch op of `schema`, for CUDA and, as kernels run there under TRITON_INTERPRET=1, CPU tensors.

    fake: shapes, for tracing. differentiate, save: backward and what it needs, as `torch.library.register_autograd`;
    of: the public op it belongs to, for errors.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"hgrn2::{name}", fake, lib=_LIBRARY)
    if differentiate is not None:
        torch.library.register_autograd(f"hgrn2::{name}", differentiate, setup_context=save, lib=_LIBRARY)

    def no_vmap(*_):
        raise NotImplementedError(f"{of} has no vmap rule: fold the mapped dimension into the batch instead")

    torch.library.register_vmap(f"hgrn2::{name}", no_vmap, lib=_LIBRARY)


def rows(x: Tensor) -> Tensor:
    """x, copied only if its last dim is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def refuse_second_derivatives() -> None:
    """For every backward: raise if autograd records it (`create_graph=True`), lest a derivative of it be wrong."""
    if torch.is_grad_enabled():
        no_second_derivative()


def is_traced() -> bool:
    """Whether someone looks on: then the registered op has to run, which eager calls do without."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def count_scan(forward, backward, chunk: Callable[[int, torch.dtype], int]) -> None:
    """Register the FLOPs of a scan's two ops, whose arguments are its registered ones; chunk: C."""

    def flops(x: Tensor, direction: int) -> int:
        return _SCANS[direction] * 4 * x.numel() * (chunk(x.shape[-1], x.dtype) + x.shape[-1])

    register_flop_formula(forward, get_raw=True)(lambda q, *args, **_: flops(q, args[6]))
    register_flop_formula(backward, get_raw=True)(lambda do, *args, **_: 2 * flops(do, args[8]))


def no_second_derivative(*_):
    raise NotImplementedError(
        "this implementation of HGRN2's scan has no second derivatives (create_graph=True); impl='reference' has them"
    )


@functools.cache
def too_old(index: int) -> str | None:
    """Why the kernels cannot run on CUDA device `index`, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= (8, 0) and torch.version.hip is None:
        return None
    return f"Triton kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"


def say_falls_back(op: str, reason: str | None) -> None:
    if reason is not None:
        warnings.warn(f"{op} falls back to the torch form: {reason}", RuntimeWarning, stacklevel=3)
