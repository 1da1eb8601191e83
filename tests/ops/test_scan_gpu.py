"""The Triton kernels for small states on a real GPU: `pytest -m gpu`. Accuracy, dtypes, directions, life with torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import BF16, FP16, FP32, errors, plain_scan, run
from torch.utils.checkpoint import checkpoint

from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d
from hgrn2.ops.reference import recurrent_scan

ACTIVATED = dict(q_act="silu", v_act="sigmoid")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DIMS = (1, 2, 4, 8)


def draw(batch=2, time=150, heads=5, dim=4, dtype=BF16, mean=0.0, spread=1.0, rows=None):
    q, v = torch.randn(2, batch, time, heads, dim, device="cuda").to(dtype)
    f = (torch.randn(batch, time, heads, dim, device="cuda") * spread + mean).to(dtype)
    state = torch.randn(rows or batch, heads, dim, dim, device="cuda")
    return [q, f, v, 0.5 * torch.rand(heads, dim, device="cuda"), state]


def ours(*args, **options):
    return hgrn2_scan(*args, impl="triton", **options)


def agree(got, truth, limit=1e-2):
    found = errors(got, truth)
    assert all(e < limit for e in found.values()), found


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("mean", "acts"), [(0, {}), (3, {}), (-4, {}), (-8, {}), (0, ACTIVATED)])
def test_error_against_plain_torch(dtype, dim, mean, acts):
    inputs = draw(heads=256 // dim, dim=dim, dtype=dtype, mean=mean)
    d_out, d_final = torch.randn_like(inputs[0]), torch.randn_like(inputs[4])
    truth = run(recurrent_scan, inputs, d_out, d_final, torch.float64, **acts)
    mine = errors(run(ours, inputs, d_out, d_final, dtype, output_final_state=True, **acts), truth)
    plain = errors(run(plain_scan, inputs, d_out, d_final, dtype, **acts), truth)
    ratios = {n: mine[n] / plain[n] for n in truth}
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("time", [1, 2, 63, 65, 1000, 16385])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_lengths_of_time(time, dim, direction):
    inputs = draw(time=time, dim=dim)
    d_out = torch.randn_like(inputs[0])
    d_final = None if direction == "both" else torch.randn_like(inputs[4])
    options = dict(direction=direction, output_final_state=direction != "both")
    truth = run(hgrn2_scan, inputs, d_out, d_final, torch.float64, impl="torch", **options)
    agree(run(ours, inputs, d_out, d_final, BF16, **options), truth)


@pytest.mark.parametrize("dim", DIMS)
def test_many_lanes(dim):
    """Enough lines to fill the device without segments."""
    inputs = draw(batch=400, time=40, heads=64, dim=dim)
    d_out = torch.randn_like(inputs[0])
    truth = run(hgrn2_scan, inputs, d_out, None, torch.float64, impl="torch", direction="both")
    agree(run(ours, inputs, d_out, None, BF16, direction="both"), truth)


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 300), min_size=3, max_size=3),
    st.sampled_from(["forward", "reverse", "both"]),
    st.sampled_from(DIMS),
)
def test_lengths(lengths, direction, dim):
    q, f, v, gamma, _ = draw(batch=3, time=300, dim=dim)
    lengths = torch.tensor(lengths, device="cuda")
    padded = torch.arange(300, device="cuda") >= lengths[:, None]
    leaves = [x.masked_fill(padded[:, :, None, None], math.nan).requires_grad_() for x in (q, f, v)]
    d_out = torch.randn_like(q).masked_fill(padded[:, :, None, None], math.nan)
    options = dict(direction=direction, lengths=lengths, q_act="silu", v_act="sigmoid")
    o, _ = hgrn2_scan(*leaves, gamma, impl="triton", **options)
    grads = torch.autograd.grad(o, leaves, d_out)
    wide = [x.double().requires_grad_() for x in (q, f, v)]
    want, _ = hgrn2_scan(*wide, gamma.double(), impl="torch", **options)
    d_wide = d_out.nan_to_num(0).double()
    for got, ref in zip((o, *grads), (want, *torch.autograd.grad(want, wide, d_wide)), strict=True):
        assert not got[padded].any()
        assert (got.double() - ref).norm() <= 1e-2 * ref.norm()


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("dim", DIMS)
def test_documents(dim, direction):
    bounds = torch.tensor([0, 0, 1, 64, 65, 2000, 2000, 2063, 5000], device="cuda", dtype=torch.int32)
    inputs = draw(batch=1, time=5000, dim=dim, rows=8)
    d_out = torch.randn_like(inputs[0])
    d_final = None if direction == "both" else torch.randn_like(inputs[4])
    options = dict(direction=direction, cu_seqlens=bounds, output_final_state=direction != "both")
    truth = run(hgrn2_scan, inputs, d_out, d_final, torch.float64, impl="torch", **options)
    agree(run(ours, inputs, d_out, d_final, BF16, **options), truth)


@pytest.mark.parametrize("size", [(1, 300), (32, 32), (7, 33), (500, 3)])
@pytest.mark.parametrize("dim", DIMS)
def test_grid(dim, size):
    packed = torch.randn(2, *size, 3, 5, dim, device="cuda").to(BF16)
    gamma = 0.5 * torch.rand(5, dim, device="cuda")
    d_out = torch.randn(2, *size, 5, dim, device="cuda")

    def call(impl, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in packed.unbind(3)]
        bound = gamma.detach().to(torch.float64 if dtype == torch.float64 else FP32).requires_grad_()
        o = hgrn2_scan_2d(*leaves, bound, q_act="silu", v_act="sigmoid", impl=impl)
        return [o, *torch.autograd.grad(o, [*leaves, bound], d_out.to(o.dtype))]

    for got, want in zip(call("triton", BF16), call("torch", torch.float64), strict=True):
        assert (got.double() - want).norm() < 1e-2 * want.norm()


@pytest.mark.parametrize("bound", [None, 0.0, 1e-3])
@pytest.mark.parametrize("dim", DIMS)
def test_extreme_gates(bound, dim):
    extremes = torch.tensor([100.0, -100.0, 60.0, -60.0, math.inf, -math.inf, 15.0, -15.0], device="cuda")
    q, f, v, _, _ = draw(time=200, dim=dim)
    f = extremes[torch.randint(0, 8, f.shape, device="cuda")].to(BF16)
    leaves = [x.requires_grad_() for x in (q, f, v)]
    if bound is not None:
        leaves.append(torch.full((5, dim), bound, device="cuda", requires_grad=True))
    o, _ = hgrn2_scan(*leaves, impl="triton", direction="both")
    assert all(x.isfinite().all() for x in (o, *torch.autograd.grad(o.sum(), leaves)))


def test_a_nan_is_not_hidden():
    q, f, v, _, _ = draw()
    f[0, 3, 2, 1] = math.nan
    o, _ = hgrn2_scan(q, f, v, impl="triton")
    assert o[0, 3:, 2].isnan().all()
    assert o[1].isfinite().all()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dim", DIMS)
def test_bitwise_repeatable_on_poisoned_scratch(dim, direction):
    inputs = draw(time=700, dim=dim, mean=-1.5, spread=2.0)
    d_out = torch.randn_like(inputs[0])
    first = run(ours, inputs, d_out, None, BF16, direction=direction)
    again = run(ours, inputs, d_out, None, BF16, direction=direction)
    assert all(x.isfinite().all() for x in first.values())
    assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_compile_checkpoint_and_graphs():
    q, f, v, gamma, _ = (x.requires_grad_() for x in draw(time=200))

    def model(q, f, v):
        return hgrn2_scan(q, f, v, gamma, q_act="silu", direction="both")[0] * 2

    want = torch.autograd.grad(model(q, f, v).float().square().sum(), [q, f, v])
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    again = checkpoint(model, q, f, v, use_reentrant=False)
    for o in (compiled(q, f, v), again):
        got = torch.autograd.grad(o.float().square().sum(), [q, f, v])
        assert all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=1e-2) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        static = [x.detach().clone() for x in (q, f, v)]
        with torch.cuda.graph(graph):
            o = model(*static)
        for x in static:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(o, model(*static))


def test_nothing_recompiles_for_other_batches_and_lengths():
    from hgrn2.ops.lane import backward as scan_bwd
    from hgrn2.ops.lane import forward as scan_fwd

    kernels = (
        scan_fwd.scan_segment_kernel, scan_fwd.scan_carry_kernel, scan_fwd.scan_out_kernel, scan_bwd.scan_grad_kernel,
    )  # fmt: skip

    def call(batch, time):
        q, f, v, gamma, _ = (x.requires_grad_() for x in draw(batch=batch, time=time, heads=8))
        hgrn2_scan(q, f, v, gamma, impl="triton", direction="both")[0].sum().backward()
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    call(2, 8)  # one segment a line: kernels without states that enter
    first = call(2, 64)
    assert all(call(*size) == first for size in ((1, 33), (3, 77), (2, 129), (1, 1024), (5, 2048)))


@pytest.mark.slow
def test_a_million_tokens():
    inputs = draw(batch=1, time=2**20, heads=4, mean=2.0)
    d_out = torch.randn_like(inputs[0])
    leaves = [x.requires_grad_() for x in inputs[:4]]
    o, _ = hgrn2_scan(*leaves, impl="triton", direction="both")
    got = [o, *torch.autograd.grad(o, leaves, d_out)]
    wide = [x.detach().double().requires_grad_() for x in inputs[:4]]
    want, _ = hgrn2_scan(*wide, impl="torch", direction="both")
    want = [want, *torch.autograd.grad(want, wide, d_out.double())]
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()
