"""A numerical self-test of the Triton scan at first use, so that a miscompiled kernel is never used in silence.

Triton miscompiles some tile shapes on some GPUs. The shipped tiles were checked on one GPU and Triton version; here the
kernels of a head dim, dtype, direction and activations run once on a small input, forward and backward, both kinds of
scores, against the torch form; states, lengths and documents are other compilations, which are not tested. The verdict
is kept on disk per device, Triton and torch version and version of this code.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import torch

from hgrn2.ops.launch import SMALL_HEAD_DIMS
from hgrn2.ops.torch_form import chunked_scan

# relative 2-norm errors, well above those of correct kernels (see tests/ops/test_chunk_gpu.py)
_LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def cache_folder() -> pathlib.Path:
    """Where verdicts are kept: `$HGRN2_CACHE_DIR`, else `hgrn2` in the user's cache folder."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "hgrn2"
    return pathlib.Path(os.environ.get("HGRN2_CACHE_DIR") or default)


@functools.cache
def _code_version() -> str:
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_self_test(
    index: int, dim: int, dtype: torch.dtype, lower_bound: bool, direction: str, q_act: str | None, v_act: str | None
) -> str | None:
    """None if the kernels for these inputs are right on CUDA device `index`, else what is wrong; cached on disk."""
    case = [dim, str(dtype), lower_bound, direction, q_act, v_act]
    return remembered(index, case, lambda: _run(index, dim, dtype, lower_bound, direction, q_act, v_act))


def remembered(index: int, case: list, test: Callable[[], str | None]) -> str | None:
    """The verdict of a self-test on CUDA device `index`, from disk if it ran before: None or what is wrong."""
    import triton

    if torch.cuda.is_current_stream_capturing():
        return None
    key = [torch.cuda.get_device_name(index), triton.__version__, torch.__version__, _code_version(), *case]
    path = cache_folder() / f"selftest-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
    try:
        return json.loads(path.read_text())["failure"]
    except (OSError, ValueError, KeyError):
        pass  # not tested yet, or not readable: test
    try:
        with torch.inference_mode(False), torch.autocast("cuda", enabled=False), torch.cuda.device(index):
            failure = test()
            torch.cuda.synchronize(index)
    except Exception as error:  # whatever a compiler or driver may raise: the torch form still works
        failure = f"the kernels for {case} raised {type(error).__name__}: {str(error)[:200]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"key": key, "failure": failure}))
        os.replace(scratch, path)
    except OSError:
        pass  # a read-only home only costs the test again next time
    return failure


def _torch_form(q, f, v, lower_bound, direction: str, **options) -> tuple[torch.Tensor, None]:
    """What the kernels have to agree with."""
    if direction != "2d":
        return chunked_scan(q, f, v, lower_bound, direction=direction, **options)
    rows, columns = q.shape[1:3]
    options |= dict(direction="both")
    along, _ = chunked_scan(*(x.flatten(0, 1) for x in (q, f, v)), lower_bound, **options)
    down, _ = chunked_scan(*(x.transpose(1, 2).flatten(0, 1) for x in (q, f, v)), lower_bound, **options)
    return along.unflatten(0, (-1, rows)) + down.unflatten(0, (-1, columns)).transpose(1, 2), None


def _run(index: int, dim: int, dtype: torch.dtype, lower_bound: bool, direction: str, q_act, v_act) -> str | None:
    from hgrn2.ops.chunk.op import triton_scan
    from hgrn2.ops.lane.op import lane_scan

    device = torch.device("cuda", index)
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, device=device, generator=generator)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        shape = (1, 9, 17, 2, dim) if direction == "2d" else (1, 130, 2, dim)
        inputs = [draw(shape).to(dtype) for _ in range(3)]
        gamma = 0.9 * torch.rand(2, dim, device=device, generator=generator) if lower_bound else None
        d_out = draw(shape).to(dtype)
        options = dict(q_act=q_act, v_act=v_act)

        def run(scan, cast):
            leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
            bound = None if gamma is None else gamma.detach().clone().requires_grad_()
            o, _ = scan(*leaves, bound, **options)
            o.backward(d_out.to(o.dtype))
            return dict(o=o.detach(), dq=leaves[0].grad, df=leaves[1].grad, dv=leaves[2].grad) | (
                {} if bound is None else {"d lower_bound": bound.grad}
            )

        try:
            expected = run(functools.partial(_torch_form, direction=direction), torch.float32)
            if dim in SMALL_HEAD_DIMS:
                kinds = {"scan": functools.partial(lane_scan, direction=direction)}
            else:
                one = functools.partial(triton_scan, direction=direction, output_final_state=False)
                kinds = {
                    "fast": functools.partial(one, fast_limit=1e9),
                    "safe": functools.partial(one, fast_limit=-1.0),
                }
            for kind, scan in kinds.items():
                got = run(scan, dtype)
                for name, want in expected.items():
                    error = float((got[name].float() - want).norm() / want.norm())
                    if not error < _LIMITS[dtype]:
                        return f"{name} of the {kind} kernels for head dim {dim}, {dtype} is off by {error:.1e}"
            torch.cuda.synchronize(device)
        except Exception as error:  # whatever a compiler or driver may raise: the torch form still works
            return f"the kernels for head dim {dim}, {dtype} raised {type(error).__name__}: {str(error)[:200]}"
    return None
