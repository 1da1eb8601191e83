"""The GLU's gate: plain torch is the truth."""

import pytest
import torch

from hgrn2.ops import glu as module
from hgrn2.ops.glu import ACTS, glu


def plain(packed, act):
    a, b = packed.chunk(2, dim=-1)
    return module._TORCH[ACTS.index(act)](a) * b


def compare(act, dtype, device, shape=(3, 5, 2 * 344)):
    packed = (2 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, device=device).to(dtype)
    wide = packed.detach().double().requires_grad_()
    want = plain(wide, act)
    (d_want,) = torch.autograd.grad(want, wide, grad.double())
    out = torch.ops.hgrn2.glu(packed, ACTS.index(act))
    (d_out,) = torch.autograd.grad(out, packed, grad)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for got, true in ((out, want), (d_out, d_want)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(glu(packed, act), out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op_is_the_plain_gate(act, dtype):
    compare(act, dtype, "cpu")


def test_registration():
    packed = torch.randn(3, 8, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hgrn2.glu.default, (packed, 1), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 341, 2816])
def test_on_the_device(act, dtype, width):
    compare(act, dtype, "cuda", (7, 33, 2 * width))
