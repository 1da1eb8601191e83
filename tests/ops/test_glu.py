"""The GLU's gate: plain torch is the truth."""

import pytest
import torch

from hgrn2.ops.glu import ACTS, glu, glu_linear


def compare(act, dtype, device, shape=(3, 5, 2 * 344), out=24):
    width = shape[-1] // 2
    leaves = [torch.randn(shape) * 2, torch.randn(out, width) * width**-0.5, torch.randn(out)]
    leaves = [x.to(device, dtype).requires_grad_() for x in leaves]
    grad = torch.randn(*shape[:-1], out, device=device).to(dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = torch.nn.functional.linear(glu(wide[0], act), *wide[1:])
    d_want = torch.autograd.grad(want, wide, grad.double())
    found = torch.ops.hgrn2.glu_linear(*leaves, ACTS.index(act))
    d_found = torch.autograd.grad(found, leaves, grad)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for got, true in zip((found, *d_found), (want, *d_want), strict=True):
        assert got.dtype == dtype
        assert (got.double() - true).norm() <= tolerance * true.norm()
    torch.testing.assert_close(glu_linear(*leaves, act), found, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op_is_the_plain_gate(act, dtype):
    compare(act, dtype, "cpu")


def test_registration():
    leaves = [torch.randn(size, requires_grad=True) for size in ((3, 8), (5, 4), (5,))]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hgrn2.glu_linear.default, (*leaves, 1), test_utils=checks)


def test_the_gated_tensor_is_not_kept():
    leaves = [torch.randn(size, requires_grad=True) for size in ((3, 8), (5, 4))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        torch.ops.hgrn2.glu_linear(*leaves, None, 1)
    assert kept == [(3, 8), (5, 4)]


def test_a_hook_on_the_last_product_still_runs():
    from hgrn2.layers import make_glu

    layer, x = make_glu(8, 16, "silu", True), torch.randn(2, 8)
    plain = layer(x)
    layer.fc2.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(layer(x), plain + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 341, 2816])
def test_on_the_device(act, dtype, width):
    compare(act, dtype, "cuda", (7, 33, 2 * width))
