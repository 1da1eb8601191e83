"""Start a Triton kernel with little work for the host; Triton looking up a compiled kernel costs more than a launch."""

import contextlib

import torch

from hgrn2.ops import tiles

_compiled = {}


def kinds(tensors: tuple[torch.Tensor | None, ...]) -> tuple:
    """What Triton compiles different code for in the tensors of a call: absence, dtype, alignment, kinds of strides."""
    found = [] if tiles.INTERPRET else [torch.cuda.current_device()]
    for x in tensors:
        if x is None:
            found.append(None)
        else:
            found += [x.dtype, x.data_ptr() % 16 == 0]
            found += [(s % 16 == 0, s == 1, s > 0x7FFFFFFF) for s in x.stride()[:3]]
    return tuple(found)


def on_device(x: torch.Tensor):
    """A context in which the device of x is current."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def launch(kernel, programs: int, args: tuple, constants: dict, warps: int, key: tuple, pdl: bool = False) -> None:
    """Run `programs` programs of a jitted kernel; args come first in its signature, constants after them.

    key: `kinds` of all tensors that come from a caller. Fresh ones are aligned, and all other integers in args must be
    ones that the kernel does not specialise on, below 2^31. pdl: programmatic dependent launch: the kernel may start
    before its predecessor ends, and must wait in its own code.
    """
    if tiles.INTERPRET:
        kernel[(programs,)](*args, **constants, num_warps=warps)
        return
    key = (id(kernel), warps, pdl, key, *constants.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants, num_warps=warps, launch_pdl=pdl)
        names = [parameter.name for parameter in kernel.params[len(args) :]]
        _compiled[key] = compiled, [constants[name] for name in names]
        return
    compiled, values = found
    compiled[(programs, 1, 1)](*args, *values)
