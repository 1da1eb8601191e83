"""The kernels for small states compile ahead of time for every chip, without a GPU; registers and spills are kept."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from test_aot import SHARED, compile_for, record


def variants(dim: int, fp32: bool = True):
    """(label, kernel, dtype, constants, absent, options): both directions at once, from and to other segments."""
    from hgrn2.ops import scan, scan_bwd, scan_fwd

    common = dict(
        K=scan._KEYS[dim], V=dim, LANES=scan._LANES, UNROLL=scan._UNROLL[dim][0], FLIP=False, BOTH=True,
        VARLEN=False, HAS_LEN=False, HAS_LB=True, Q_ACT=1, V_ACT=0, ADD=False, LB_GRAD=True, HAS_ENTER=True,
        HAS_LEAVE=False, HAS_D_ENTER=True, HAS_D_LEAVE=False, HAS_INIT=False, HAS_FINAL=False,
        BLOCK=dim in scan._BLOCK, EXACT=False,
    )  # fmt: skip
    _, out, grad = scan._UNROLL[dim]
    for label, kernel, constants, absent in (
        ("segment", scan_fwd.scan_segment_kernel, dict(GRAD=False, X_ACT=0, Y_ACT=0), ["x_ptr"]),
        ("segment grad", scan_fwd.scan_segment_kernel, dict(GRAD=True, X_ACT=1, Y_ACT=0), []),
        ("carry", scan_fwd.scan_carry_kernel, dict(GRAD=False, K=dim, LANES=32, UNROLL=8), ["init_ptr", "final_ptr"]),
        ("out", scan_fwd.scan_out_kernel, dict(UNROLL=out), ["leave_ptr"] + ["scratch_ptr"] * (dim not in scan._BLOCK)),
        ("grad", scan_bwd.scan_grad_kernel, dict(UNROLL=grad), ["d_leave_ptr"]),
    ):
        constants = common | constants
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        options = dict(num_warps=1 if label == "carry" else scan._WARPS)
        registers = dict(zip(("out", "grad"), scan._REGISTERS[dim], strict=True)).get(label)
        options |= {} if registers is None else dict(maxnreg=registers)
        absent = ["table_ptr", "len_ptr", *absent]
        yield f"bf16:{dim} scan {label}", kernel, torch.bfloat16, constants, absent, options
        if fp32 and label == "segment grad":  # of one scan, from its last token on
            constants = constants | dict(X_ACT=3, BOTH=False, EXACT=True)
            yield f"fp32:{dim} scan {label}", kernel, torch.float32, constants, absent, options
        if fp32 and label == "grad":
            constants |= dict(Q_ACT=3, BLOCK=True, EXACT=True, UNROLL=scan.gradient_unroll(dim, True))
            yield f"fp32:{dim} scan {label}", kernel, torch.float32, constants, absent, options


# each head dim in bf16 and each chip at least once; all on all under -m slow
ROUND = {80: [1], 86: [4], 89: [2], 90: [8], 100: [2], 120: [1]}


def check(capability: int, dims: list[int], folder, fp32: bool) -> None:
    # a process of its own: here Triton may be its interpreter
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, __file__, str(capability), str(int(fp32)), *map(str, dims)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == (7 if fp32 else 5) * len(dims)
    record(capability, report)
    assert not {name: row for name, row in report.items() if row["shared"] > SHARED[capability]}
    # states that spill would go to memory at every token (fp32's are recorded: exact functions take registers)
    assert not {name: row for name, row in report.items() if row.get("stack", 0) > 128 and name.startswith("bf16")}


@pytest.mark.parametrize("capability", ROUND)
def test_kernels_compile_and_fit(capability, tmp_path):
    check(capability, ROUND[capability], tmp_path, False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_head_dim_on_every_chip(capability, tmp_path):
    check(capability, [1, 2, 4, 8], tmp_path, True)


if __name__ == "__main__":
    chip = int(sys.argv[1])
    print(
        json.dumps(
            {
                label: compile_for(chip, kernel, dtype, *rest)
                for dim in sys.argv[3:]
                for label, kernel, dtype, *rest in variants(int(dim), sys.argv[2] == "1")
            }
        )
    )
