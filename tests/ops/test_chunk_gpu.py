"""The chunked Triton kernels on a real GPU: `pytest -m gpu`. Accuracy, dtypes, long sequences, and life with torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import BF16, FP16, FP32, errors, plain_scan, run
from torch.utils.checkpoint import checkpoint

from hgrn2.ops import grid_scan, hgrn2_scan, hgrn2_scan_2d
from hgrn2.ops.reference import recurrent_scan

ACTIVATED = dict(q_act="silu", v_act="sigmoid")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(batch=1, time=150, heads=2, dim=64, dtype=BF16, mean=0.0, spread=1.0, rows=None):
    q, v = torch.randn(2, batch, time, heads, dim, device="cuda").to(dtype)
    f = (torch.randn(batch, time, heads, dim, device="cuda") * spread + mean).to(dtype)
    state = torch.randn(rows or batch, heads, dim, dim, device="cuda")
    return [q, f, v, 0.5 * torch.rand(heads, dim, device="cuda"), state]


def triton_scan(*args, fast_limit=None, **options):
    from hgrn2.ops.chunk.op import triton_scan

    return triton_scan(*args, fast_limit=fast_limit, **options)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("mean", "limit", "acts"),
    [
        (0, None, {}),
        (3, None, {}),
        (-4, None, {}),
        (-8, None, {}),
        (0, -1.0, {}),
        (0, None, ACTIVATED),
        (3, None, ACTIVATED),
    ],
)
def test_error_against_plain_torch(dtype, dim, mean, limit, acts):
    inputs = draw(batch=2, heads=max(2, 128 // dim), dim=dim, dtype=dtype, mean=mean)
    d_out, d_final = torch.randn_like(inputs[0]), torch.randn_like(inputs[4])
    truth = run(recurrent_scan, inputs, d_out, d_final, torch.float64, **acts)
    ours = errors(run(triton_scan, inputs, d_out, d_final, dtype, fast_limit=limit, **acts), truth)
    plain = errors(run(plain_scan, inputs, d_out, d_final, dtype, **acts), truth)
    ratios = {n: ours[n] / plain[n] for n in truth}
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("mean", "limit", "acts"),
    [(0, None, {}), (-2, None, {}), (-8, None, {}), (0, -1.0, {}), (0, None, ACTIVATED), (3, None, ACTIVATED)],
)
def test_error_of_both_directions_against_plain_torch(dtype, dim, mean, limit, acts):
    inputs = draw(batch=2, heads=max(2, 128 // dim), dim=dim, dtype=dtype, mean=mean)
    d_out = torch.randn_like(inputs[0])

    def plain(*inputs, **acts):
        state = torch.zeros_like(states)
        ahead, _ = plain_scan(*inputs, initial_state=state, **acts)
        back, _ = plain_scan(*(x.flip(1) for x in inputs[:3]), inputs[3], initial_state=state, **acts)
        return ahead + back.flip(1), None

    states = inputs[4]
    truth = run(hgrn2_scan, inputs, d_out, None, torch.float64, direction="both", impl="torch", **acts)
    ours = errors(run(triton_scan, inputs, d_out, None, dtype, direction="both", fast_limit=limit, **acts), truth)
    other = errors(run(plain, inputs, d_out, None, dtype, **acts), truth)
    ratios = {n: ours[n] / other[n] for n in truth}
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 1000, 16385])
@pytest.mark.parametrize(("heads", "dim"), [(3, 128), (5, 32)])
def test_lengths_of_time(time, heads, dim):
    inputs = draw(time=time, heads=heads, dim=dim)
    d_out, d_state = torch.randn_like(inputs[0]), torch.randn_like(inputs[4])
    for direction in ("forward", "reverse", "both"):
        d_final = None if direction == "both" else d_state
        options = dict(direction=direction, output_final_state=direction != "both")
        truth = run(hgrn2_scan, inputs, d_out, d_final, torch.float64, impl="torch", **options)
        got = run(hgrn2_scan, inputs, d_out, d_final, BF16, impl="triton", **options)
        assert all(e < 1e-2 for e in errors(got, truth).values()), errors(got, truth)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 300), min_size=3, max_size=3), st.sampled_from(["forward", "reverse", "both"]))
def test_lengths(lengths, direction):
    q, f, v, gamma, _ = draw(batch=3, time=300)
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
@pytest.mark.parametrize("dim", [32, 128])
def test_documents(dim, direction):
    bounds = torch.tensor([0, 0, 1, 64, 65, 2000, 2000, 2063, 5000], device="cuda", dtype=torch.int32)
    inputs = draw(time=5000, dim=dim, rows=8)
    d_out, d_final = torch.randn_like(inputs[0]), None if direction == "both" else torch.randn_like(inputs[4])
    options = dict(direction=direction, cu_seqlens=bounds, output_final_state=direction != "both")
    truth = run(hgrn2_scan, inputs, d_out, d_final, torch.float64, impl="torch", **options)
    got = run(hgrn2_scan, inputs, d_out, d_final, BF16, impl="triton", **options)
    assert all(e < 1e-2 for e in errors(got, truth).values()), errors(got, truth)


@pytest.mark.parametrize("size", [(1, 300), (32, 32), (7, 33), (150, 3)])
@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("direction", ["2d", "rows", "columns"])
def test_grid(direction, dim, size):
    packed = torch.randn(2, *size, 3, 3, dim, device="cuda").to(BF16)
    gamma = 0.5 * torch.rand(3, dim, device="cuda")
    d_out = torch.randn(2, *size, 3, dim, device="cuda")

    def call(impl, dtype):
        whole = packed.detach().to(dtype).requires_grad_()
        bound = gamma.detach().to(torch.float64 if dtype == torch.float64 else FP32).requires_grad_()
        o = grid_scan(*whole.unbind(3), bound, direction, q_act="silu", v_act="sigmoid", impl=impl)
        return [o, *torch.autograd.grad(o, [whole, bound], d_out.to(o.dtype))]

    for got, want in zip(call("triton", BF16), call("torch", torch.float64), strict=True):
        assert (got.double() - want).norm() < 1e-2 * want.norm()


@pytest.mark.parametrize("dim", [32, 128])
def test_grids_are_not_copied(dim):
    """Beside results and the buffers of the kernels nothing as large as q is allocated."""
    from hgrn2.ops.chunk.directions import layout

    q, f, v = torch.randn(2, 64, 64, 3, 4, dim, device="cuda").to(BF16).unbind(3)
    hgrn2_scan_2d(q, f, v, impl="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = hgrn2_scan_2d(q, f, v, impl="triton")
    used = torch.cuda.max_memory_allocated() - before
    result = o.numel() * o.element_size()
    assert used < layout(q.shape, q.dtype, "2d", None, False, False)[1][-1] + 1.5 * result


def test_both_kinds_of_scores_run():
    from hgrn2.ops.chunk import host as chunk

    for mean, safe in ((-8.0, 1), (2.0, 0)):
        q, f, v, gamma, _ = draw(time=256, mean=mean)
        saved = chunk.forward(q, f, v, 0.01 * gamma, None, None, None, False, False, 0, 0)[2]
        slots = chunk.saved_slots(chunk.count_chunks(1, 256, 64, BF16, None), 2, 64, BF16, True, False)
        assert slots.view(saved, "safe").unique().tolist() == [safe]


@pytest.mark.parametrize("bound", [None, 0.0, 1e-3])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_extreme_gates(bound, dtype):
    extremes = torch.tensor([100.0, -100.0, 60.0, -60.0, math.inf, -math.inf, 15.0, -15.0], device="cuda")
    q, f, v, _, _ = draw(time=200, dim=128, dtype=dtype)
    f = extremes[torch.randint(0, 8, f.shape, device="cuda")].to(dtype)
    leaves = [x.requires_grad_() for x in (q, f, v)]
    if bound is not None:
        leaves.append(torch.full((2, 128), bound, device="cuda", requires_grad=True))
    o, _ = hgrn2_scan(*leaves, impl="triton")
    assert all(x.isfinite().all() for x in (o, *torch.autograd.grad(o.sum(), leaves)))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dim", [32, 128])
def test_bitwise_repeatable_on_poisoned_scratch(dim, direction):
    inputs = draw(batch=2, time=700, heads=4, dim=dim, mean=-1.5, spread=2.0)
    d_out, d_final = torch.randn_like(inputs[0]), None if direction == "both" else torch.randn_like(inputs[4])
    first = run(triton_scan, inputs, d_out, d_final, BF16, direction=direction)
    again = run(triton_scan, inputs, d_out, d_final, BF16, direction=direction)
    assert all(x.isfinite().all() for x in first.values())
    assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_views_of_a_packed_projection():
    packed = torch.randn(2, 300, 3, 2, 128, device="cuda", dtype=BF16, requires_grad=True)
    slots = packed.unbind(2)
    o = hgrn2_scan(*slots, impl="triton")[0]
    grads = torch.autograd.grad(o.sum(), slots, retain_graph=True)
    assert len({x.untyped_storage().data_ptr() for x in grads}) == 1
    o.sum().backward()
    copies = [x.detach().clone().requires_grad_() for x in packed.unbind(2)]
    hgrn2_scan(*copies, impl="triton")[0].sum().backward()
    assert torch.equal(packed.grad, torch.stack([x.grad for x in copies], dim=2))


def test_compile_checkpoint_and_graphs():
    q, f, v, gamma, _ = (x.requires_grad_() for x in draw(time=200))

    def model(q, f, v):
        return hgrn2_scan(q, f, v, gamma, q_act="silu")[0] * 2

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
    from hgrn2.ops.chunk import backward as chunk_bwd
    from hgrn2.ops.chunk import factors as chunk_factors
    from hgrn2.ops.chunk import forward as chunk_fwd
    from hgrn2.ops.chunk import safe_backward as chunk_safe_bwd
    from hgrn2.ops.chunk import safe_forward as chunk_safe

    kernels = (
        chunk_factors.chunk_factor_kernel,
        chunk_fwd.chunk_state_kernel,
        chunk_fwd.chunk_out_kernel,
        chunk_safe.chunk_score_kernel,
        chunk_bwd.chunk_value_grad_kernel,
        chunk_bwd.chunk_grad_kernel,
        chunk_safe_bwd.chunk_safe_grad_kernel,
    )

    def call(batch, time):
        q, f, v, gamma, _ = (x.requires_grad_() for x in draw(batch=batch, time=time, heads=64, dim=128))
        hgrn2_scan(q, f, v, gamma, impl="triton")[0].sum().backward()
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    hgrn2_scan(*draw(dim=128, heads=64)[:3], impl="triton", direction="reverse")  # runs what forward scans run
    first = call(2, 64)
    assert all(call(*size) == first for size in ((1, 1), (3, 77), (2, 129), (1, 1024), (5, 2048)))


@pytest.mark.slow
def test_a_million_tokens():
    """B1 H4 D128 T = 2^20 runs; one head against the chunked torch form in fp64, on a strided sample."""
    inputs = draw(time=2**20, heads=4, dim=128, mean=2.0)
    d_out = torch.randn_like(inputs[0])
    leaves = [x.requires_grad_() for x in inputs[:4]]
    o, _ = hgrn2_scan(*leaves, impl="triton")
    got = [o, *torch.autograd.grad(o, leaves, d_out)]
    one = [x[..., 1:2, :].detach().double().requires_grad_() for x in inputs[:4]]
    want, _ = hgrn2_scan(*one, impl="torch")
    want = [want, *torch.autograd.grad(want, one, d_out[:, :, 1:2].double())]
    for a, b in zip(got[:4], want[:4], strict=True):
        a, b = a[:, ::997, 1:2].double(), b[:, ::997]
        assert (a - b).norm() <= 1e-2 * b.norm()
    assert (got[4][1].double() - want[4][0]).norm() <= 2e-2 * want[4].norm()
