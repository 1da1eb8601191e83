"""Every shipped tile compiles ahead of time, without a GPU, and fits each chip's memories; spills are recorded.

    HGRN2_AOT_REPORT=aot.json python -m pytest tests/ops/test_aot.py

Besides the installed Triton, those in folders of `HGRN2_TRITONS` (`pip install --no-deps --target FOLDER triton==...`,
separated as in PATH) compile the kernels that take most, down to where shared memory is known.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

# shared memory one program may have, in bytes
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
FP32 = {
    "total_ptr", "lb_ptr", "init_ptr", "final_ptr", "seg_ptr", "decay_ptr", "dlb_ptr", "diag_ptr", "qf_ptr",
    "state_ptr", "own_ptr", "enter_ptr", "d_enter_ptr", "scratch_ptr", "dk_ptr", "dq2_ptr",
}  # fmt: skip
INT32 = {"safe_ptr", "table_ptr", "len_ptr"}
PRODUCT = {"qx_ptr", "kx_ptr", "ex_ptr", "x_ptr", "states_ptr", "dstates_ptr", "a_ptr", "da_ptr"}
# of the scan back, and sums
FP32 |= {"dlb2_ptr", "shares_ptr", "sum_ptr"}
PRODUCT |= {"qx2_ptr", "kx2_ptr", "states2_ptr", "dstates2_ptr"}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = 23


# columns of tensor memory that a program may have, where a chip has some
TENSOR_MEMORY = 512
# the kernels that take most shared memory
LARGE = {"state0", "out", "value_grad", "grad", "safe_grad", "pair_out", "pair_value_grad", "pair_grad"}


# (Triton, compute capability) whose compiler fails on the first tile of these, so that the next one runs
FAILS = {("3.5", 100): {"pair_out", "pair_out_add", "pair_value_grad", "pair_value_grad_add"}}


def variants(dim: int, dtype: torch.dtype, shared: int, skip: int = 0):
    """(label, kernel, constants, absent arguments, options) of all kernels of one row of the table of tiles, on a chip
    with `shared` bytes of shared memory a program; of tiles that give way to others the one after `skip`."""
    from hgrn2.ops.chunk import backward as chunk_bwd
    from hgrn2.ops.chunk import factors as chunk_factors
    from hgrn2.ops.chunk import forward as chunk_fwd
    from hgrn2.ops.chunk import pair_backward as chunk_pair_grad
    from hgrn2.ops.chunk import pair_forward as chunk_pair
    from hgrn2.ops.chunk import safe_backward as chunk_safe_bwd
    from hgrn2.ops.chunk import safe_forward as chunk_safe
    from hgrn2.ops.chunk import tiles
    from hgrn2.ops.gates import activation_code

    cfg = tiles.tiles_for(dim, dtype)
    both = tiles.pair(cfg)
    precision, split, sub = tiles.arithmetic(dtype)
    act = activation_code(1, dtype)
    common = dict(
        K=dim, C=cfg.chunk, SUB=sub, SPLIT=split, VARLEN=False, PRECISION=precision,
        HAS_LB=True, LB_GRAD=True, Q_ACT=act, V_ACT=act, HAS_INIT=True, HAS_FINAL=True, ACT=0, EXACT=False,
    )  # fmt: skip

    def variant(label, kernel, t, absent=(), **constants):
        t = t.candidates(shared)[skip:][0] if skip and t.stages > 1 else t.candidates(shared)[0]
        constants = common | dict(BK=t.bk, BV=t.bv, STAGES=t.stages) | constants
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        return label, kernel, constants, ["table_ptr", *absent], t.options

    t = cfg.factor
    for exact in (False, True):
        sizes = dict(BH=max(1, t.bk // dim), BT=t.bv, EXACT=exact)
        yield variant(
            f"factor{exact:d}", chunk_factors.chunk_factor_kernel, t, () if exact else ["qf_ptr"], **sizes
        )  # fmt: skip
    yield variant("pair_factor", chunk_pair.chunk_pair_factor_kernel, t, **sizes)
    output = dict(PRECISION=tiles.output_precision(dtype))
    for mode in (0, 2):
        absent = ["seg_ptr", "decay_ptr"] if mode == 0 else ["decay_ptr"]
        for label, backward, exact in (("", False, False), ("_grad", True, False), ("_exact", True, True)):
            if not (exact and mode):
                constants = dict(MODE=mode, BACKWARD=backward, EXACT=exact, **output)
                t = tiles.exact_state(dim) if exact else cfg.state
                yield variant(f"state{mode}{label}", chunk_fwd.chunk_state_kernel, t, absent, **constants)
    for label, back in (("", False), ("_back", True)):
        yield variant(f"score{label}", chunk_safe.chunk_score_kernel, cfg.score, BACK=back)
    yield variant("out", chunk_fwd.chunk_out_kernel, cfg.out, **output)
    yield variant("value_grad", chunk_bwd.chunk_value_grad_kernel, cfg.dv, **output)
    yield variant("grad", chunk_bwd.chunk_grad_kernel, cfg.grad)
    for label, add in (("", False), ("_add", True)):
        yield variant(f"pair_out{label}", chunk_pair.chunk_pair_out_kernel, both.out, ADD=add, **output)
        yield variant(f"pair_value_grad{label}", chunk_pair.chunk_pair_value_grad_kernel, both.dv, ADD=add, **output)
        yield variant(f"pair_grad{label}", chunk_pair_grad.chunk_pair_grad_kernel, both.grad, ADD=add)
    yield variant("row_sum", chunk_bwd.row_sum_kernel, tiles.Kernel(16, 64, 4), BM=16, BN=64)
    for label, add, pair in (("", False, False), ("_ahead", False, True), ("_back", True, True)):
        ways = dict(ADD=add, PAIR=pair, BACK=add)
        yield variant(f"safe_grad{label}", chunk_safe_bwd.chunk_safe_grad_kernel, cfg.safe_grad, **ways)


class Known(Exception):
    """Raised with a kernel's metadata once its memories are known."""


def stop_early() -> None:
    """Have Triton compile no further than `Known`: the assembler would take most of the time."""
    from triton.backends.nvidia.compiler import CUDABackend

    add_stages = CUDABackend.add_stages

    def without_assembler(self, stages, *args):
        def stop(source, metadata):
            raise Known(metadata)

        add_stages(self, stages, *args)
        stages["ptx"] = stop

    CUDABackend.add_stages = without_assembler


def compile_for(capability: int, kernel, dtype: torch.dtype, constants: dict, absent: list, options: dict) -> dict:
    """Shared and tensor memory and (where the tools can tell) registers and bytes of stack of one compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hgrn2.ops.launch import FUSED

    signature, values, attributes = {}, {}, {}
    product = "bf16" if dtype == torch.bfloat16 else "fp32"
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants or name in absent:
            signature[name], values[(i,)] = "constexpr", constants.get(name)
        elif name.endswith("_ptr"):
            kind = "fp32" if name in FP32 else "i32" if name in INT32 else product if name in PRODUCT else NAMES[dtype]
            if name == "x_ptr" and constants.get("EXACT"):
                kind = "fp32"
            signature[name] = "*" + ("bf16" if name == "mask_ptr" else kind)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("fast_limit", "eps") else "i32"
            if "stride" in name and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | FUSED)
    except Known as known:
        (metadata,) = known.args
        return {"shared": metadata["shared"], "tensor": metadata.get("tmem_size") or 0}
    row = {"shared": compiled.metadata.shared, "tensor": getattr(compiled.metadata, "tmem_size", None) or 0}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():
        path = Path(f"{os.environ['TRITON_CACHE_DIR']}/{os.getpid()}.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=False).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found:
            row |= {"registers": int(found[1]), "stack": int(found[2])}
    return row


def report_on(of, *args) -> None:
    """Print what `of(*args)` finds, for `compiled_apart`."""
    if sys.argv[1] == "1":
        stop_early()
    print(json.dumps({"triton": triton.__version__, "report": of(*args)}))


def compiled_rows(capability: int, rows: list[str]) -> dict:
    report = {}
    for row in rows:
        name, dim = row.split(":")
        dtype = next(d for d, n in NAMES.items() if n == name)
        for label, kernel, constants, absent, options in variants(int(dim), dtype, SHARED[capability]):
            if sys.argv[1] == "0" or label in LARGE:
                rest = (kernel, dtype, constants, absent, options)
                if label in FAILS.get((triton.__version__.rpartition(".")[0], capability), ()):
                    rest = next(v for v in variants(int(dim), dtype, SHARED[capability], skip=1) if v[0] == label)
                    rest = (kernel, dtype, *rest[2:])
                report[f"{row} {label}"] = compile_for(capability, *rest)
    return report


def record(capability: int, report: dict) -> None:
    """Add a chip's report to the file that HGRN2_AOT_REPORT names, if it does."""
    path = os.environ.get("HGRN2_AOT_REPORT")
    if path:
        known = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        known["about"] = {
            "device": "none: compiled ahead of time, per compute capability",
            "versions": {"triton": triton.__version__, "torch": torch.__version__},
            "commit": commit.stdout.strip() + " for the rows last compiled, earlier ones for others",
            "command": "HGRN2_AOT_REPORT=benchmarks/results/aot.json pytest tests/ops -k aot (-m slow: the rest)",
        }
        known[str(capability)] = known.get(str(capability), {}) | report
        Path(path).write_text(json.dumps(known, indent=1) + "\n")


def compiled_apart(file: str, folder: Path, other: str | None, *args) -> dict:
    """What `file` reports from a process of its own (here Triton may be its interpreter), run with `args`.

    other: the folder of a Triton to use; a second argument tells the file of it.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    if other is not None:
        env["PYTHONPATH"] = os.pathsep.join([other, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, file, str(int(other is not None)), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if other is not None:
        assert list(Path(other).glob(f"triton-{found['triton']}*.dist-info"))
    return found["report"]


def check(capability: int, rows: list[str], folder: Path, other: str | None = None) -> None:
    report = compiled_apart(__file__, folder, other, capability, *rows)
    assert len(report) == (KERNELS if other is None else len(LARGE)) * len(rows)
    if other is None:
        record(capability, report)
    assert not {name: row for name, row in report.items() if row["shared"] > SHARED[capability]}
    assert not {name: row for name, row in report.items() if row["tensor"] > TENSOR_MEMORY}


OTHERS = [path for path in os.environ.get("HGRN2_TRITONS", "").split(os.pathsep) if path]


# each row of the table once, each chip at least once; all rows on all chips under -m slow
ROUND = {
    80: ["bf16:16"],
    86: ["bf16:128"],
    89: ["fp32:32"],
    90: ["bf16:64"],
    100: ["bf16:256"],
    120: ["bf16:32"],
}


EVERY = [f"{name}:{dim}" for name in NAMES.values() for dim in (16, 32, 64, 128, 256)]


@pytest.mark.parametrize("capability", ROUND)
def test_tiles_compile_and_fit(capability, tmp_path):
    check(capability, ROUND[capability], tmp_path)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("capability", ROUND)
def test_tiles_fit_with_other_versions_of_triton(capability, other, tmp_path):
    check(capability, ROUND[capability], tmp_path, other)


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("capability", SHARED)
def test_every_tile_fits_with_other_versions_of_triton(capability, other, tmp_path):
    check(capability, EVERY, tmp_path, other)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_tile_on_every_chip(capability, tmp_path):
    check(capability, EVERY, tmp_path)


if __name__ == "__main__":
    report_on(compiled_rows, int(sys.argv[2]), sys.argv[3:])
