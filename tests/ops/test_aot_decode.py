"""The decoding kernels compile ahead of time for every chip, without a GPU, fit its shared memory and do not spill."""

import sys

import pytest
import torch

pytest.importorskip("triton")
from test_aot import OTHERS, SHARED, compile_for, compiled_apart, report_on


def variants(capability: int):
    """(label, kernel, constants, absent arguments, options): every head dim, and each tile of a 2048-wide layer."""
    from hgrn2.ops.decode import matvec, step

    early = capability >= 90
    for dim in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        heads, columns = step.blocks(2048 // dim, dim)
        constants = dict(K=dim, BH=heads, BV=columns, HAS_LB=True, Q_ACT=1, V_ACT=2, OVERLAP=early)
        yield f"step {dim}", step.step_kernel, constants, [], dict(num_warps=step._WARPS)
    for rows in (1, 2):
        for norm, width, gate in ((0, 2048, -1), (1, 2048, -1), (2, 2048, -1), (0, 5632, 1)):
            wide, padded = (2, 8192) if width > 4096 else (1, width)
            absent = ["bias_ptr"] + ["g_ptr"] * (norm == 0) + ["shift_ptr"] * (norm < 2)
            constants = dict(
                BB=rows, N=width, BM=wide * matvec._ELEMENTS // padded, BN=padded, NORM=norm, GATE=gate, HAS_BIAS=False,
                HAS_G=norm > 0, HAS_SHIFT=norm == 2, HAS_RES=True, START=3 if early else 0,
            )  # fmt: skip
            label = f"matvec {rows} rows, norm {norm}, width {width}"
            yield label, matvec.matvec_kernel, constants, absent, dict(num_warps=wide * matvec._WARPS)


@pytest.mark.parametrize("capability", [86, 90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 89, 100, 120))])
@pytest.mark.parametrize("other", [None, *OTHERS])
def test_decoding_kernels_compile_and_fit(capability, other, tmp_path):
    report = compiled_apart(__file__, tmp_path, other, capability)
    assert len(report) == 17
    assert not {name: row for name, row in report.items() if row["shared"] > SHARED[capability] or row.get("stack")}


def compiled(capability: int) -> dict:
    return {
        label: compile_for(capability, kernel, torch.bfloat16, *rest) for label, kernel, *rest in variants(capability)
    }


if __name__ == "__main__":
    report_on(compiled, int(sys.argv[2]))
