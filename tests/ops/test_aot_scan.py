"""The kernels for small states compile ahead of time for every chip, without a GPU; registers and spills are kept."""

import sys

import pytest
import torch

pytest.importorskip("triton")
from test_aot import OTHERS, SHARED, compile_for, compiled_apart, record, report_on


def variants(dim: int, fp32: bool = True):
    """(label, kernel, dtype, constants, absent, options): both directions at once, from and to other segments."""
    from hgrn2.ops.lane import backward as scan_bwd
    from hgrn2.ops.lane import forward as scan_fwd
    from hgrn2.ops.lane import host as scan

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


def check(capability: int, dims: list[int], folder, fp32: bool, other: str | None = None) -> None:
    report = compiled_apart(__file__, folder, other, capability, int(fp32), *dims)
    assert len(report) == (7 if fp32 else 5) * len(dims)
    assert not {name: row for name, row in report.items() if row["shared"] > SHARED[capability]}
    if other is None:
        record(capability, report)
    # states that spill would go to memory at every token (fp32's are recorded: exact functions take registers)
    assert not {name: row for name, row in report.items() if row.get("stack", 0) > 128 and name.startswith("bf16")}


@pytest.mark.parametrize("other", OTHERS)
def test_kernels_compile_with_other_versions_of_triton(other, tmp_path):
    check(86, [2], tmp_path, False, other)


@pytest.mark.parametrize("capability", ROUND)
def test_kernels_compile_and_fit(capability, tmp_path):
    check(capability, ROUND[capability], tmp_path, False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_head_dim_on_every_chip(capability, tmp_path):
    check(capability, [1, 2, 4, 8], tmp_path, True)


def compiled_dims(capability: int, fp32: bool, dims: list[int]) -> dict:
    return {
        label: compile_for(capability, kernel, dtype, *rest)
        for dim in dims
        for label, kernel, dtype, *rest in variants(dim, fp32)
    }


if __name__ == "__main__":
    report_on(compiled_dims, int(sys.argv[2]), sys.argv[3] == "1", [int(dim) for dim in sys.argv[4:]])
