"""The torch form's life among torch's tools: second derivatives are refused, first ones recomputed and compiled."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hgrn2 import HGRN2Backbone, HGRN2Config
from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d

OPTIONS = {
    "forward": {},
    "reverse": dict(direction="reverse"),
    "both": dict(direction="both"),
    "lengths": dict(lengths=torch.tensor([5, 9])),
    "documents": dict(cu_seqlens=torch.tensor([0, 4, 9])),
}


def draw(*shape):
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3)]


def scan(name, impl):
    return lambda q, f, v: hgrn2_scan(q, f, v, impl=impl, q_act="silu", **OPTIONS[name])[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives_are_refused(name):
    inputs = draw(1 if name == "documents" else 2, 9, 2, 2)
    for x in inputs:
        with pytest.raises(NotImplementedError, match=r"second derivatives.*impl='reference'"):
            torch.autograd.grad(scan(name, "torch")(*inputs).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        scan(name, "torch")(*inputs).sum().backward(create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.gradgradcheck(scan(name, "torch"), inputs)


def test_second_derivatives_of_states_and_bounds_are_refused():
    inputs, gamma = draw(2, 9, 2, 2), torch.rand(2, 2, dtype=torch.float64).requires_grad_()
    state = torch.randn(2, 2, 2, 2, dtype=torch.float64).requires_grad_()
    o, final = hgrn2_scan(*inputs, gamma, initial_state=state, output_final_state=True, impl="torch")
    for y, x in ((o, gamma), (o, state), (final, state), (final, gamma)):
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_second_derivatives_on_grids_are_refused():
    inputs = draw(1, 2, 3, 2, 2)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(hgrn2_scan_2d(*inputs, impl="torch").sum(), inputs, create_graph=True)


def test_the_reference_has_second_derivatives():
    inputs = draw(1, 3, 1, 2)
    assert torch.autograd.gradgradcheck(scan("forward", "reference"), inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_no_second_derivatives(reentrant):
    inputs = draw(2, 9, 2, 2)
    want = torch.autograd.grad(scan("forward", "torch")(*inputs).square().sum(), inputs)
    checkpoint(scan("forward", "torch"), *inputs, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, want, strict=True))


def test_compiles():
    config = HGRN2Config(dim=8, depth=2, expand_ratio=4, glu_width=8, impl="torch")
    backbone, x = HGRN2Backbone(config), torch.randn(2, 9, 8)
    want = torch.autograd.grad(backbone(x).square().sum(), list(backbone.parameters()))
    torch.compile(backbone, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for parameter, grad in zip(backbone.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
