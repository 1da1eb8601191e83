"""The fused linear layer and cross-entropy: plain torch is the truth."""

import pytest
import torch
import torch.nn.functional as F

from hgrn2 import loss as module
from hgrn2.loss import IGNORED, linear_cross_entropy


def case(tokens=70, width=24, vocab=67, dtype=torch.float32, device="cpu", spread=3.0):
    x = (torch.randn(tokens, width, device=device) * spread).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(dtype)
    target = torch.randint(vocab, (tokens,), device=device)
    target[torch.rand(tokens, device=device) < 0.2] = IGNORED
    return x.requires_grad_(), weight.requires_grad_(), target


def plain(x, weight, target, dtype=None):
    logits = x.to(dtype or x.dtype) @ weight.to(dtype or x.dtype).T
    return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")


def gradients(total, *inputs):
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [2**29, 4 * 67 * 20])  # all tokens at once; parts of 20, the last shorter
def test_loss_and_gradients_are_the_plain_ones(dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    x, weight, target = case(dtype=dtype)
    total, losses = linear_cross_entropy(x, weight, target)
    expected = plain(x, weight, target)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=0)
    found = gradients(total / 7, x, weight)
    for got, want in zip(found, gradients(expected.sum() / 7, x, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_extreme_logits_and_no_token_that_counts():
    x = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total, losses = linear_cross_entropy(x, weight, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(losses, plain(x, weight, torch.tensor([1, 1, 0])).detach())
    assert all(bool(d.isfinite().all()) for d in gradients(total, x, weight))
    total, losses = linear_cross_entropy(x, weight, torch.full((3,), IGNORED))
    assert total == 0
    assert not any(bool(d.any()) for d in gradients(total, x, weight))


def test_autocast_decides_the_operands_and_not_the_sums():
    x, weight, target = case()
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = linear_cross_entropy(x, weight, target)
    rounded = plain(x.bfloat16().float(), weight.bfloat16().float(), target)
    torch.testing.assert_close(losses, rounded.detach(), rtol=1e-5, atol=1e-6)
    dx, dw = gradients(total, x, weight)
    assert dx.dtype == dw.dtype == torch.float32
    for got, want in zip((dx, dw), gradients(rounded.sum(), x, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_nothing_is_computed_for_gradients_that_nobody_wants(monkeypatch):
    made = []
    softmax = module._softmax
    monkeypatch.setattr(module, "_softmax", lambda *args: made.append(args[-1]) or softmax(*args))
    x, weight, target = case()
    with torch.no_grad():
        linear_cross_entropy(x, weight, target)
    total, _ = linear_cross_entropy(x, weight.detach(), target)
    assert made == [None, torch.float32]
    torch.testing.assert_close(
        *gradients(total, x), gradients(plain(x, weight, target).sum(), x)[0], rtol=1e-5, atol=1e-6
    )


def test_refusals():
    x, weight, target = case()
    with pytest.raises(ValueError, match=r"x must be \[N, D\] and weight \[V, D\]"):
        linear_cross_entropy(x, weight.T, target)
    with pytest.raises(ValueError, match=r"target must be \[N\] = \[70\]"):
        linear_cross_entropy(x, weight, target[1:])
    total, _ = linear_cross_entropy(x, weight, target)
    with pytest.raises(NotImplementedError, match=r"no second derivatives; F\.cross_entropy"):
        torch.autograd.grad(total, x, create_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [67, 256, 5000, 50264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device(vocab, dtype, monkeypatch):
    """bf16: the loss to 1e-5, and gradients no further off than a plain bf16 product with an fp32 loss."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * vocab * 256)
    x, weight, target = case(1000, 512, vocab, dtype, "cuda")
    total, _ = linear_cross_entropy(x, weight, target)
    truth = plain(x, weight, target, torch.float64).sum()
    assert abs(total.item() / truth.item() - 1) < 1e-5
    logits = x @ weight.T
    usual = F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum")
    wanted = [d.double() for d in gradients(truth, x, weight)]
    for got, plain_one, want in zip(gradients(total, x, weight), gradients(usual, x, weight), wanted, strict=True):
        error, usual_error = ((d.double() - want).norm() / want.norm() for d in (got, plain_one))
        assert error <= max(1.05 * usual_error, 1e-5)
