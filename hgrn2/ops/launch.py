"""Plans: everything about a call but its addresses, worked out once, so that the host only fills them in and launches.

The first call of a kind goes through Triton with tensors; later ones start the compiled kernels with bare addresses.
That way is private to Triton: `run`, `function` and `packed_metadata` of a compiled kernel. Where a version has them no
more, or takes other arguments, every call goes through Triton, and that is said once.
"""

import contextlib
import functools
import operator
import os
import warnings

import torch
from torch import Tensor

from hgrn2.ops.gates import triton

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# of the chunked scan; and of states that a lane holds in registers
HEAD_DIMS = (16, 32, 64, 128, 256)
SMALL_HEAD_DIMS = (1, 2, 4, 8)

_compiled = {}
# kinds of launches that took more of some resource than the device has, or did not compile
_too_large = set()
# why compiled kernels cannot be started without Triton, once that is known
_private_failure: list[str] = []
# plans are small, but every new length makes some
_MOST_PLANS = 512
# a * b + c in one instruction: Triton's default up to 3.9, which warns that it will not stay
FUSED = {"enable_fp_fusion": True}


def kinds(tensors: tuple[Tensor | None, ...]) -> tuple:
    """What Triton compiles different code for in the tensors of a call: absence, dtype, alignment, kinds of strides."""
    found = [0 if INTERPRET else torch.cuda.current_device()]
    for x in tensors:
        if x is None:
            found.append(None)
        else:
            found += [x.dtype, x.data_ptr() % 16 == 0, x.dim()]
            found += [(s % 16 == 0, s == 1, s > 0x7FFFFFFF) for s in x.stride()[:4]]
    return tuple(found)


class Slots:
    """Where the tensors that share one buffer lie in it: name -> (offset in bytes, bytes, shape, dtype)."""

    def __init__(self):
        self.of, self.size = {}, 0

    def add(self, name: str, shape: tuple, dtype: torch.dtype) -> None:
        count = dtype.itemsize
        for size in shape:
            count = count * size
        offset = (self.size + 15) // 16 * 16
        self.of[name] = offset, count, shape, dtype
        self.size = offset + count

    def part(self, name: str, whole: str, first: int, rows: int) -> None:
        """Name `rows` rows of a slot, from the `first` on, aligned as rows are."""
        offset, count, shape, dtype = self.of[whole]
        row = count // shape[0]
        self.of[name] = offset + first * row, rows * row, (rows, *shape[1:]), dtype

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """One of the tensors in a buffer of `size` bytes."""
        offset, count, shape, dtype = self.of[name]
        return buffer[offset : offset + count].view(dtype).view(shape)


class Plan:
    """The launches of one kind of call, in order; `key` is `kinds` of all tensors that come from the caller.

    In every kernel's signature pointers come first. Fresh tensors are aligned, and integers that come from anywhere but
    a tensor's strides are ones that the kernel does not specialise on, or multiples of 16. Triton's launch hooks (its
    profiler's) are not called after the first launch.
    """

    def __init__(self, key: tuple):
        self.key, self.steps, self.launches = key, [], None

    def add(self, kernel, programs: int, options: dict, values: dict, **tensors: str) -> None:
        """Launch `programs` programs of a kernel with Triton's options, integers and constants from `values`.

        tensors: the plan's names for the kernel's pointers, where they differ; "none" is absent.
        """
        self.add_first(kernel, [(programs, options, values)], **tensors)

    def add_first(self, kernel, choices: list[tuple[int, dict, dict]], **tensors: str) -> None:
        """As `add`, the first of several (programs, options, values) that the device has the resources for."""
        names = kernel.arg_names
        count = sum(name.endswith("_ptr") for name in names)
        pointers = [tensors.get(name[:-4], name[:-4]) for name in names[:count]]
        found = []
        for programs, options, values in choices:
            rest = tuple(values[name] for name in names[count:])
            found.append((programs, options, rest, None if INTERPRET else self._kind(kernel, options, rest)))
        self.steps.append((kernel, pointers, found))

    def run(self, tensors: dict[str, Tensor | None], *buffers: tuple[Slots, Tensor]) -> None:
        """Launch everything; `tensors` and the slots of `buffers` together hold all names."""
        if _private_failure or (self.launches is None and not self._resolve()):
            self._compile(_by_name(tensors, buffers), self.steps)
            return
        found = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
        found["none"] = None
        for slots, buffer in buffers:
            base = buffer.data_ptr()
            for name, slot in slots.of.items():
                found[name] = base + slot[0]
        stream = torch._C._cuda_getCurrentRawStream(self.key[0])
        for i, (programs, run, function, metadata, take, rest) in enumerate(self.launches):
            pointers = take(found)
            try:
                run(programs, 1, 1, stream, function, metadata, None, None, None, *pointers, *rest)
            except TypeError as error:  # of the arguments: nothing has run
                _give_up_private_launches(error)
                self._compile(_by_name(tensors, buffers), self.steps[i:])
                return

    def _kind(self, kernel, options: dict, rest: tuple) -> tuple:
        parameters = kernel.params[len(kernel.params) - len(rest) :]
        return (
            id(kernel),
            *options.values(),
            self.key,
            *(x for x, p in zip(rest, parameters, strict=True) if p.is_constexpr),
        )

    def _resolve(self) -> bool:
        """Take the kernels that other plans have compiled, if those are all."""
        if INTERPRET:
            return False
        launches = []
        for _, pointers, choices in self.steps:
            programs, _, rest, kind = _untried(choices)[0]
            run = _compiled.get(kind)
            if run is None:
                return False
            launches.append((programs, *run, operator.itemgetter(*pointers), rest))
        self.launches = launches
        return True

    def _compile(self, tensors: dict[str, Tensor | None], steps: list) -> None:
        for kernel, pointers, choices in steps:
            found, kind = _launch_first(kernel, _untried(choices), [tensors[name] for name in pointers])
            if not (INTERPRET or _private_failure):
                try:
                    _compiled[kind] = found.run, found.function, found.packed_metadata
                except AttributeError as error:
                    _give_up_private_launches(error)


def _by_name(tensors: dict[str, Tensor | None], buffers: tuple[tuple[Slots, Tensor], ...]) -> dict[str, Tensor | None]:
    """All tensors of a plan, those inside of buffers as views."""
    return {"none": None} | tensors | {name: slots.view(buffer, name) for slots, buffer in buffers for name in slots.of}


def _give_up_private_launches(error: Exception) -> None:
    """Launch through Triton from now on: slower for the host, the same for the device."""
    _private_failure.append(f"{type(error).__name__}: {error}")
    version = "" if triton is None else f" {triton.__version__}"
    _say_once(f"kernels are launched through Triton{version}, which takes the host longer: {_private_failure[0]}")


def _untried(choices: list[tuple]) -> list[tuple]:
    """Those not known to be too large; the last one in any case, for its error."""
    return [choice for choice in choices if choice[3] not in _too_large] or choices[-1:]


def _launch_first(kernel, choices: list[tuple], pointers: list[Tensor | None]) -> tuple:
    """Launch the first choice that compiles and fits, and return what Triton compiled with its kind."""
    for programs, options, rest, kind in choices:
        try:
            return kernel[(programs,)](*pointers, *rest, **options, **FUSED), kind
        except Exception as error:  # of a tile: before the launch, nothing has run
            problem = _problem_of_tile(error)
            if problem is None or kind == choices[-1][3]:
                raise
            _too_large.add(kind)
            _say_once(f"{kernel.fn.__name__} runs on a smaller tile: {problem}")
    raise AssertionError("no choices")


def _problem_of_tile(error: Exception) -> str | None:
    """What a smaller tile may do without, if that is what the error is about."""
    if triton is not None and isinstance(error, triton.OutOfResources):
        return f"its first takes {error.name} {error.required} of {error.limit} with Triton {triton.__version__}"
    if "PassManager::run failed" in str(error):  # all that Triton says of what its compiler cannot do
        return f"Triton {triton.__version__} fails to compile its first"
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def with_buffer(like: Tensor, slots: Slots) -> tuple[Slots, Tensor]:
    return slots, like.new_empty(slots.size, dtype=torch.uint8)


def signature(q: Tensor, *tensors: Tensor | None) -> tuple:
    """What a plan depends on in its tensors; where all are aligned, as nearly always, quickly."""
    bits = q.data_ptr()
    for x in tensors:
        if x is not None:
            bits |= x.data_ptr()
    aligned = bits % 16 == 0 or tuple(x is not None and x.data_ptr() % 16 == 0 for x in (q, *tensors))
    return q.dtype, q.get_device(), q.shape, aligned, q.stride(), *(x if x is None else x.stride() for x in tensors)


class Plans(dict):
    """Plans by call; forgets all of them when there are too many."""

    def __setitem__(self, key, plan) -> None:
        if len(self) >= _MOST_PLANS:
            self.clear()
        super().__setitem__(key, plan)


def on_device(x: torch.Tensor):
    """A context in which the device of x is current."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def on_its_device(run):
    """Launch on the device of the first argument, whichever is current."""

    @functools.wraps(run)
    def guarded(x, *args, **options):
        with on_device(x):
            return run(x, *args, **options)

    return guarded


def launch(kernel, programs: int, args: tuple, constants: dict, warps: int, key: tuple, pdl: bool = False) -> None:
    """Run `programs` programs of a jitted kernel; args come first in its signature, constants after them.

    key: `kinds` of all tensors that come from a caller. Fresh ones are aligned, and all other integers in args must be
    ones that the kernel does not specialise on, below 2^31. pdl: programmatic dependent launch: the kernel may start
    before its predecessor ends, and must wait in its own code.
    """
    if INTERPRET:
        kernel[(programs,)](*args, **constants, num_warps=warps, **FUSED)
        return
    key = (id(kernel), warps, pdl, key, *constants.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants, num_warps=warps, launch_pdl=pdl, **FUSED)
        names = [parameter.name for parameter in kernel.params[len(args) :]]
        _compiled[key] = compiled, [constants[name] for name in names]
        return
    compiled, values = found
    compiled[(programs, 1, 1)](*args, *values)
