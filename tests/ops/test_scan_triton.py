"""The Triton kernels for small states in Triton's interpreter: fp32, small, against fp64 (on a GPU: test_scan_gpu).

The interpreter has to be chosen before Triton is imported, so these tests run in a process of their own.
"""

import os

import pytest
import scans
import torch
from scans import errors, in_the_interpreter

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.timeout(1800)  # minutes of one core, more where cores are shared
    def test_in_the_interpreter():
        in_the_interpreter(__file__)

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d
    from hgrn2.ops.lane import host as scan

    NAMES = ("q", "f", "v", "lower_bound", "initial_state")

    @pytest.fixture(autouse=True)
    def short_segments(monkeypatch):
        """Segments of eight tokens, worked on as those of 16-bit inputs are."""
        monkeypatch.setattr(scan, "_is_exact", lambda dtype, initial: False)
        monkeypatch.setattr(scan, "_MIN_SEGMENT", 8)
        monkeypatch.setattr(scan, "_MAX_SEGMENT", dict.fromkeys((1, 2, 4, 8), 8))
        yield
        scan._forward_plans.clear()
        scan._backward_plans.clear()

    def draw(batch=2, time=18, heads=3, dim=2, mean=0.0, rows=None):
        q, v = torch.randn(2, batch, time, heads, dim)
        f = torch.randn(batch, time, heads, dim) + mean
        return [q, f, v, 0.5 * torch.rand(heads, dim), torch.randn(rows or batch, heads, dim, dim)]

    def run(impl, inputs, d_out, d_final, dtype, **options):
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
        state = {} if d_final is None else dict(initial_state=leaves[4], output_final_state=True)
        o, final = hgrn2_scan(*leaves[:4], impl=impl, **state, **options)
        found = {"o": o}
        if d_final is None:
            o.backward(d_out.to(dtype))
        else:
            torch.autograd.backward([o, final], [d_out.to(dtype), d_final.to(dtype)])
            found["final_state"] = final
        grads = {f"d {n}": None if x is None else x.grad for n, x in zip(NAMES, leaves, strict=True)}
        return found | {n: x for n, x in grads.items() if x is not None}

    def check(inputs, states=True, **options):
        d_out = torch.randn(inputs[0].shape)
        d_final = torch.randn(inputs[4].shape) if states and options.get("direction") != "both" else None
        want = run("reference", inputs, d_out, d_final, torch.float64, **options)
        got = run("triton", inputs, d_out, d_final, torch.float32, **options)
        for name, x in want.items():
            assert (got[name] - x).norm() <= 3e-6 * x.norm(), name
        return got

    @pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
    @pytest.mark.parametrize("dim", [1, 2, 4, 8])
    def test_head_dims(dim, direction):
        check(draw(dim=dim), direction=direction)

    @pytest.mark.parametrize(("dim", "direction"), [(8, "forward"), (4, "reverse"), (2, "both"), (8, "both")])
    def test_fp32(dim, direction, monkeypatch):
        monkeypatch.setattr(scan, "_is_exact", lambda dtype, initial: True)
        check(draw(dim=dim), direction=direction, v_act="sigmoid")

    @pytest.mark.parametrize(("mean", "dim"), [(0, 1), (-4, 8)])
    def test_error_against_plain_torch(mean, dim, monkeypatch):
        monkeypatch.undo()
        inputs = draw(time=40, heads=64 // dim, dim=dim, mean=mean)
        d_out, d_final = torch.randn(inputs[0].shape), torch.randn(inputs[4].shape)
        options = dict(q_act="silu", v_act="sigmoid")
        truth = run("reference", inputs, d_out, d_final, torch.float64, **options)
        ours = errors(run("triton", inputs, d_out, d_final, torch.float32, **options), truth)
        plain = errors(scans.run(scans.plain_scan, inputs, d_out, d_final, torch.float32, **options), truth)
        ratios = {n: ours[n] / plain[n] for n in truth}
        assert all(ratio <= 2 for ratio in ratios.values()), ratios

    @pytest.mark.parametrize("time", [1, 7, 8, 9])
    @pytest.mark.parametrize("direction", ["forward", "both"])
    def test_lengths_of_time(time, direction):
        check(draw(time=time), direction=direction)

    @pytest.mark.parametrize(("q_act", "v_act"), [("silu", None), ("sigmoid", "silu"), (None, "sigmoid")])
    def test_activations(q_act, v_act):
        check(draw(time=10), q_act=q_act, v_act=v_act, direction="both")

    def test_no_lower_bound():
        inputs = draw()
        inputs[3] = None
        check(inputs, states=False)

    @pytest.mark.parametrize("bound", [None, 0.0, 1e-3])
    def test_extreme_gates(bound):
        q, f, v, _, state = draw()
        extremes = torch.tensor([100.0, -100.0, 60.0, -60.0, float("inf"), float("-inf"), 15.0, -15.0])
        f = extremes[torch.randint(0, 8, f.shape)]
        gamma = None if bound is None else torch.full((3, 2), bound)
        got = run("triton", [q, f, v, gamma, state], torch.randn(q.shape), torch.randn(state.shape), torch.float32)
        assert all(x.isfinite().all() for x in got.values())
        inputs = [q, f.clamp(-100, 100), v, gamma, state]
        want = run("reference", inputs, torch.ones(q.shape), state, torch.float64)
        got = run("triton", inputs, torch.ones(q.shape), state, torch.float32)
        for name in ("o", "d q", "d f", "d v", "d initial_state"):
            # nearly all gradients of shut gates are 0; x is a running sum with fp32's absolute error
            slack = 2e-7 * want[name].numel() ** 0.5 if name == "d f" else 0.0
            assert (got[name] - want[name]).norm() <= 2e-5 * want[name].norm() + slack, name

    @settings(max_examples=4, deadline=None)
    @given(st.lists(st.integers(0, 18), min_size=2, max_size=2), st.sampled_from(["forward", "reverse", "both"]))
    def test_lengths(lengths, direction):
        inputs = draw()
        options = dict(
            lengths=torch.tensor(lengths, dtype=torch.int32), direction=direction, q_act="sigmoid", v_act="sigmoid"
        )
        check(inputs, **options)
        padded = torch.arange(18) >= options["lengths"][:, None]
        for x in inputs[:3]:
            x[padded] = float("nan")
        d_out = torch.randn(inputs[0].shape).masked_fill(padded[:, :, None, None], float("nan"))
        got = run("triton", inputs, d_out, None, torch.float32, **options)
        for name in ("o", "d q", "d f", "d v"):
            assert got[name].isfinite().all()
            assert not got[name][padded].any()

    @pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
    def test_documents(direction):
        bounds = torch.tensor([0, 0, 10, 11, 27, 27, 30], dtype=torch.int32)
        check(draw(batch=1, time=30, rows=6), cu_seqlens=bounds, direction=direction)

    @pytest.mark.parametrize("size", [(3, 5), (1, 9), (9, 2)])
    @pytest.mark.parametrize("dim", [1, 4])
    def test_grid(dim, size):
        packed, gamma = torch.randn(2, *size, 3, 2, dim), 0.5 * torch.rand(2, dim)
        d_out = torch.randn(2, *size, 2, dim)

        def call(impl, dtype):
            whole, bound = packed.to(dtype).requires_grad_(), gamma.to(dtype).requires_grad_()
            o = hgrn2_scan_2d(*whole.unbind(3), bound, q_act="silu", v_act="sigmoid", impl=impl)
            return [o, *torch.autograd.grad(o, [whole, bound], d_out.to(dtype))]

        for got, want in zip(call("triton", torch.float32), call("reference", torch.float64), strict=True):
            assert (got - want).norm() <= 3e-6 * want.norm()

    @pytest.mark.usefixtures("poisoned_empty")
    def test_scratch_may_hold_anything():
        bounds = torch.tensor([0, 10, 10, 18], dtype=torch.int32)
        inputs = draw(batch=1, rows=3)
        got = run("triton", inputs, torch.ones(1, 18, 3, 2), inputs[4], torch.float32, cu_seqlens=bounds)
        assert all(x.isfinite().all() for x in got.values())

    def test_gradients_of_a_packed_projection_are_packed():
        q, f, v = torch.randn(2, 18, 3, 3, 2).requires_grad_().unbind(2)
        o, _ = hgrn2_scan(q, f, v, impl="triton", direction="both")
        grads = torch.autograd.grad(o.sum(), [q, f, v])
        assert len({x.untyped_storage().data_ptr() for x in grads}) == 1
        copies = [x.detach().clone().requires_grad_() for x in (q, f, v)]
        o, _ = hgrn2_scan(*copies, impl="triton", direction="both")
        for a, b in zip(grads, torch.autograd.grad(o.sum(), copies), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(("direction", "packed_documents"), [(0, True), (1, False), (2, False), (3, False)])
    def test_registration(direction, packed_documents):
        q, f, v, gamma, state = (x.requires_grad_() for x in draw(batch=1, time=9))
        if direction == 3:
            q, f, v = (x.detach().unflatten(1, (3, 3)).requires_grad_() for x in (q, f, v))
        bounds = torch.tensor([0, 9], dtype=torch.int32) if packed_documents else None
        lengths = torch.tensor([5], dtype=torch.int32) if direction == 2 else None
        state = state if direction < 2 else None
        args = (q, f, v, gamma, state, lengths, bounds, direction, direction < 2, 1, 0)
        torch.library.opcheck(torch.ops.hgrn2.lane_scan.default, args)

    def test_life_with_torch():
        q, f, v, gamma, _ = (x.requires_grad_() for x in draw())

        def model(q, f, v):
            return hgrn2_scan(q, f, v, gamma, impl="triton", direction="both", q_act="silu")[0] * 2

        o = torch.compile(model, fullgraph=True, backend="aot_eager")(q, f, v)
        assert torch.equal(o, model(q, f, v))
        again = torch.utils.checkpoint.checkpoint(model, q, f, v, use_reentrant=False)
        first = torch.autograd.grad(o.square().sum(), [q, f, v], retain_graph=True)
        for other in (o, again):
            grads = torch.autograd.grad(other.square().sum(), [q, f, v])
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(first, grads, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(q, f, v).dtype == torch.float32

    @pytest.mark.parametrize("strided", [False, True])
    def test_a_gradient_penalty_raises(strided):
        q, f, v = (torch.randn(1, 8, 2, 4)[..., ::2] if strided else torch.randn(1, 8, 2, 2) for _ in range(3))
        q, f, v = (x.requires_grad_() for x in (q, f, v))
        with pytest.raises(NotImplementedError, match=r"second derivatives.*impl='reference'"):
            torch.autograd.grad(hgrn2_scan(q, f, v, impl="triton")[0].sum(), q, create_graph=True)

    def test_no_second_derivative_no_vmap():
        q, f, v, gamma, _ = (x.requires_grad_() for x in draw(time=8))
        o, _ = hgrn2_scan(q, f, v, gamma, impl="triton")
        with pytest.raises(NotImplementedError, match="second derivatives"):
            o.sum().backward(create_graph=True)
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.func.vmap(lambda x: hgrn2_scan(x, f, v, impl="triton")[0])(torch.randn(2, *q.shape))
