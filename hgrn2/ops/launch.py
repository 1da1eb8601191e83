"""Start a Triton kernel with little work for the host; Triton looking up a compiled kernel costs more than a launch."""

import torch

from hgrn2.ops import tiles

_compiled = {}


def _kind(x) -> object:
    """What Triton compiles different code for: absence, dtype and alignment, divisibility, one, width."""
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x % 16 == 0, x == 1, x > 0x7FFFFFFF
    return type(x)


def launch(kernel, programs: int, args: tuple, constants: dict, warps: int) -> None:
    """Run `programs` programs of a jitted kernel; args come first in its signature, constants after them."""
    if tiles.INTERPRET or torch.compiler.is_compiling():
        kernel[(programs,)](*args, **constants, num_warps=warps)
        return
    key = (id(kernel), torch.cuda.current_device(), warps, tuple(constants.items()), tuple(map(_kind, args)))
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants, num_warps=warps)
        names = [parameter.name for parameter in kernel.params[len(args) :]]
        _compiled[key] = compiled, [constants[name] for name in names]
        return
    compiled, values = found
    compiled[(programs, 1, 1)](*args, *values)
