"""What all implementations of the ops share as torch ops: what they refuse, and what they count as.

FLOPs, for `torch.utils.flop_counter` and what builds on it: a multiplication and an addition are 2. For T tokens and H
heads with states K x K, a scan takes `4 T H K (C + K)` forward and twice that backward: each token enters the state and
is read from it, 2 K^2 each, and chunks of C tokens form scores and weigh the values by them, 2 C K each (C = 0 for head
dims 1 to 8, whose kernels have no chunks). Two directions count as two scans. Gates, activations and decays are not
products and do not count, nor does what a kernel computes again. The torch form is no op of its own: its matrix
products count themselves, in chunks a fourth less as it leaves out the half of the scores that is 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

# scans of each of `directions.DIRECTIONS`
_SCANS = (1, 1, 2, 4, 2, 2)


# products in place, which torch counts nothing for
for _op, _known in (("baddbmm_", "baddbmm"), ("addmm_", "addmm")):
    flop_registry.setdefault(getattr(torch.ops.aten, _op), flop_registry[getattr(torch.ops.aten, _known)])


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
