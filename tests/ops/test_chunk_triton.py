"""The chunked Triton kernels in Triton's interpreter: fp32, small, against the fp64 loop (on a GPU: test_chunk_gpu).

The interpreter has to be chosen before Triton is imported, so these tests run in a process of their own.
"""

import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch
from scans import errors, in_the_interpreter, plain_scan

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.timeout(1800)  # minutes of one core, more where cores are shared
    def test_in_the_interpreter():
        in_the_interpreter(__file__)

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from torch.utils.checkpoint import checkpoint

    from hgrn2.config import HGRN2Config
    from hgrn2.mixer import HGRN2Mixer
    from hgrn2.ops import hgrn2_scan
    from hgrn2.ops.chunk import host as chunk
    from hgrn2.ops.chunk import pair_host as pair
    from hgrn2.ops.chunk import plan as call
    from hgrn2.ops.chunk import tiles
    from hgrn2.ops.chunk.op import triton_scan
    from hgrn2.ops.reference import recurrent_scan

    NAMES = ("q", "f", "v", "lower_bound", "initial_state")

    @pytest.fixture
    def split_early(monkeypatch):
        """Call it to have sequences split into segments of two chunks."""

        def set_it():
            monkeypatch.setattr(call, "_MIN_SPLIT", 4)
            monkeypatch.setattr(call, "multiprocessors", lambda _: 64)
            for module in (chunk, pair):
                monkeypatch.setattr(module, "_forward_plans", {})
                monkeypatch.setattr(module, "_backward_plans", {})

        return set_it

    def draw(batch=1, time=40, heads=2, dim=16, mean=0.0, rows=None):
        q, v = torch.randn(2, batch, time, heads, dim)
        f = torch.randn(batch, time, heads, dim) + mean
        state = torch.randn(rows or batch, heads, dim, dim)
        return [q, f, v, 0.5 * torch.rand(heads, dim), state]

    def run(scan, inputs, d_out, d_final, dtype, **options):
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
        o, final = scan(*leaves[:4], initial_state=leaves[4], **options)
        torch.autograd.backward([o, final], [d_out.to(dtype), d_final.to(dtype)])
        return {"o": o, "final_state": final} | {
            f"d {name}": x.grad for name, x in zip(NAMES, leaves, strict=True) if x is not None
        }

    def check(inputs, fast_limit=None, **options):
        """Ours errs at most twice as much as the fp32 loop, against the fp64 loop."""
        d_out, d_final = torch.randn(inputs[2].shape), torch.randn_like(inputs[4] if inputs[4] is not None else STATE)
        truth = run(recurrent_scan, inputs, d_out, d_final, torch.float64, **options)
        plain = run(recurrent_scan, inputs, d_out, d_final, torch.float32, **options)
        got = run(triton_scan, inputs, d_out, d_final, torch.float32, fast_limit=fast_limit, **options)
        for name, want in truth.items():
            scale = want.norm() + 1e-30
            error, allowed = (got[name] - want).norm() / scale, (plain[name] - want).norm() / scale
            assert error <= 2 * allowed + 1e-6, f"{name}: {error:.1e}, the fp32 loop {allowed:.1e}"
        return got

    STATE = torch.empty(1, 2, 16, 16)

    @pytest.mark.parametrize("time", [1, 31, 33])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_lengths_of_time(time, reverse):
        check(draw(time=time), reverse=reverse)

    @pytest.mark.parametrize(("dim", "heads"), [(32, 3), (64, 1)])
    def test_head_dims(dim, heads):
        check(draw(time=35, heads=heads, dim=dim))

    @pytest.mark.parametrize(("q_act", "v_act"), [("silu", None), ("sigmoid", "silu"), (None, "sigmoid")])
    def test_activations(q_act, v_act):
        check(draw(time=20, heads=1), q_act=q_act, v_act=v_act)

    @pytest.mark.parametrize("mean", [0.0, -8.0])
    def test_error_against_plain_torch(mean):
        inputs = draw(batch=2, time=100, heads=4, mean=mean)
        d_out, d_final = torch.randn(inputs[0].shape), torch.randn_like(inputs[4])
        truth = run(recurrent_scan, inputs, d_out, d_final, torch.float64)
        ours = errors(run(triton_scan, inputs, d_out, d_final, torch.float32), truth)
        plain = errors(run(plain_scan, inputs, d_out, d_final, torch.float32), truth)
        ratios = {n: ours[n] / plain[n] for n in truth}
        assert all(ratio <= 2 for ratio in ratios.values()), ratios

    def test_no_lower_bound_and_no_state():
        inputs = draw()
        inputs[3] = inputs[4] = None
        check(inputs)

    @pytest.mark.parametrize(("mean", "fast_limit"), [(-8.0, None), (3.0, None), (0.0, -1.0), (0.0, 1e9)])
    def test_decays(mean, fast_limit):
        check(draw(time=50, mean=mean), fast_limit=fast_limit)

    @pytest.mark.parametrize("size", [32, 64])
    @pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (-4.0, 2.0), (-8.0, 1.0), (-20.0, 20.0)])
    def test_safe_chunks_of_16_bit_inputs(mean, spread, size, monkeypatch):
        """Blocks of 16 and chunks of two halves, in fp32: more exact than 16-bit rounding."""
        monkeypatch.setattr(tiles, "arithmetic", lambda _: ("ieee", 0, 4))
        monkeypatch.setitem(tiles._FP32, 16, dataclasses.replace(tiles._FP32[16], chunk=size))
        monkeypatch.setattr(chunk, "_forward_plans", {})
        monkeypatch.setattr(chunk, "_backward_plans", {})
        inputs = draw(time=140)
        inputs[1] = inputs[1] * spread + mean
        d_out, d_final = torch.randn(inputs[2].shape), torch.randn_like(inputs[4])
        options = dict(reverse=True, lengths=torch.tensor([131]), q_act="silu", v_act="silu")
        truth = run(recurrent_scan, inputs, d_out, d_final, torch.float64, **options)
        got = run(triton_scan, inputs, d_out, d_final, torch.float32, fast_limit=-1.0, **options)
        for name, want in truth.items():
            assert (got[name] - want).norm() <= 2e-4 * want.norm(), name

    @pytest.mark.parametrize("time", [1, 64])
    def test_tokens_too_far_apart(time):
        q = torch.empty_strided((1, time, 2, 16), (0, 2**27, 16, 1), device="meta")
        about = SimpleNamespace(tiles=tiles.tiles_for(16, torch.float32), time=time, values={})
        if time == 1:
            call.Call.strides(about, "q", q)
            assert about.values["q_stride_t"] == 2**27
        else:
            with pytest.raises(ValueError, match=r"tokens of q lie 134217728 values apart.*at most 69273666"):
                call.Call.strides(about, "q", q)

    @pytest.mark.parametrize(("mean", "safe"), [(-8.0, 1), (8.0, 0)])
    def test_which_scores_run(mean, safe):
        q, f, v, gamma, _ = draw(time=64, mean=mean)
        saved = chunk.forward(q, f, v, 0.01 * gamma, None, None, None, False, False, 0, 0)[2]
        slots = chunk.saved_slots(2, 2, 16, torch.float32, True, False)
        assert slots.view(saved, "safe").unique().tolist() == [safe]

    @pytest.mark.parametrize("bound", [None, 0.0, 1e-3])
    def test_extreme_gates(bound):
        q, f, v, _, state = draw(time=34)
        extremes = torch.tensor([100.0, -100.0, 60.0, -60.0, float("inf"), float("-inf"), 15.0, -15.0])
        f = extremes[torch.randint(0, 8, f.shape)]
        gamma = None if bound is None else torch.full((2, 16), bound)
        got = run(triton_scan, [q, f, v, gamma, state], torch.randn(q.shape), torch.randn(state.shape), torch.float32)
        assert all(x.isfinite().all() for x in got.values())
        finite = f.clamp(-100, 100)
        want = run(recurrent_scan, [q, finite, v, gamma, state], torch.ones(q.shape), state, torch.float64)
        got = run(triton_scan, [q, finite, v, gamma, state], torch.ones(q.shape), state, torch.float32)
        for name in ("o", "d q", "d f", "d v", "d initial_state"):
            assert (got[name] - want[name]).norm() <= 2e-5 * want[name].norm()

    @pytest.mark.parametrize("bound", [None, 1e-3])
    @pytest.mark.parametrize("value", [None, -2.0])
    def test_extreme_gates_of_both_directions(bound, value):
        q, f, v, _, _ = draw(time=34)
        extremes = torch.tensor([100.0, -100.0, 60.0, -60.0, float("inf"), float("-inf"), 15.0, -15.0])
        # or fast chunks down to 2^-98
        f = extremes[torch.randint(0, 8, f.shape)] if value is None else torch.full_like(f, value)
        limit = None if value is None else 100.0

        def run(scan, f, dtype, **options):
            leaves = [x.to(dtype).requires_grad_() for x in (q, f, v)]
            gamma = None if bound is None else torch.full((2, 16), bound, dtype=dtype)
            o, _ = scan(*leaves, gamma, direction="both", **options)
            return o, *torch.autograd.grad(o.sum(), leaves)

        assert all(x.isfinite().all() for x in run(triton_scan, f, torch.float32, fast_limit=limit))
        got = run(triton_scan, f.clamp(-100, 100), torch.float32, fast_limit=limit)
        for x, want in zip(got, run(hgrn2_scan, f.clamp(-100, 100), torch.float64, impl="torch"), strict=True):
            assert (x - want).norm() <= 2e-5 * want.norm()

    @settings(max_examples=3)
    @given(st.lists(st.integers(0, 36), min_size=2, max_size=2), st.booleans())
    def test_lengths(lengths, reverse):
        inputs = draw(batch=2, time=36, heads=1)
        lengths = torch.tensor(lengths, dtype=torch.int32)
        got = check(inputs, lengths=lengths, reverse=reverse, v_act="sigmoid", q_act="sigmoid")
        padded = torch.arange(36) >= lengths[:, None]
        for x in inputs[:3]:
            x[padded] = float("nan")
        d_out = torch.randn(2, 36, 1, 16).masked_fill(padded[:, :, None, None], float("nan"))
        again = run(
            triton_scan, inputs, d_out, torch.zeros_like(inputs[4]), torch.float32,
            lengths=lengths, reverse=reverse, v_act="sigmoid", q_act="sigmoid",
        )  # fmt: skip
        assert torch.equal(again["o"], got["o"])
        for name in ("o", "d q", "d f", "d v"):
            assert again[name].isfinite().all()
            assert not again[name][padded].any()

    @pytest.mark.parametrize("reverse", [False, True])
    def test_documents(reverse, split_early):
        bounds = torch.tensor([0, 0, 40, 41, 100, 100, 110], dtype=torch.int32)
        inputs = draw(time=110, heads=1, rows=6)
        check(inputs, cu_seqlens=bounds, reverse=reverse)
        # segments of two chunks, whose ends are no document's ends
        split_early()
        check(inputs, cu_seqlens=bounds, reverse=reverse)

    def test_split_sequences(split_early):
        split_early()
        check(draw(batch=2, time=140, heads=1))

    def test_views_of_a_packed_projection():
        packed = torch.randn(1, 40, 3, 2, 16, requires_grad=True)
        v, q, f = packed.unbind(2)
        o, _ = triton_scan(q, f, v)
        o.sum().backward()  # an expanded gradient
        copies = [x.detach().clone().requires_grad_() for x in (q, f, v)]
        triton_scan(*copies)[0].sum().backward()
        assert torch.equal(packed.grad, torch.stack([copies[2].grad, copies[0].grad, copies[1].grad], dim=2))

    def test_mixer_writes_its_gradient_packed():
        mixer = HGRN2Mixer(HGRN2Config(dim=32, depth=1, expand_ratio=16, impl="triton", q_act="silu"))
        x = torch.randn(2, 40, 32)
        slots, whole = [], []

        def watch(module, args, packed):
            packed.register_hook(whole.append)
            return packed

        handle = mixer.in_proj.register_forward_hook(watch)
        o, _ = mixer(x)
        unpack = o.grad_fn
        while "Unpack" not in unpack.name():
            unpack = next(fn for fn, _ in unpack.next_functions if fn is not None and "Accumulate" not in fn.name())
        unpack.register_prehook(lambda grads: slots.extend(grads))
        o.sum().backward()
        handle.remove()
        assert {g.untyped_storage().data_ptr() for g in slots} == {whole[0].untyped_storage().data_ptr()}
        grad = mixer.in_proj.weight.grad.clone()
        mixer.zero_grad()
        compiled = torch.compile(lambda x: mixer(x)[0], fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        torch.testing.assert_close(mixer.in_proj.weight.grad, grad)
        mixer.zero_grad()
        checkpoint(lambda x: mixer(x)[0], x, use_reentrant=False).sum().backward()
        assert torch.equal(mixer.in_proj.weight.grad, grad)

    @pytest.mark.usefixtures("poisoned_empty")
    def test_scratch_may_hold_anything():
        inputs, bounds = draw(time=70, rows=3), torch.tensor([0, 35, 35, 70], dtype=torch.int32)
        got = run(triton_scan, inputs, torch.ones(1, 70, 2, 16), inputs[4], torch.float32, cu_seqlens=bounds)
        assert all(x.isfinite().all() for x in got.values())

    def test_same_gradients_twice():
        q, f, v, gamma, state = (x.requires_grad_() for x in draw())
        o, final = triton_scan(q, f, v, gamma, initial_state=state)
        loss = o.square().sum() + final.sum()
        first = torch.autograd.grad(loss, [q, f, v, gamma, state], retain_graph=True)
        again = torch.autograd.grad(loss, [q, f, v, gamma, state])
        o = checkpoint(
            lambda *x: triton_scan(*x[:4], initial_state=x[4])[0], q, f, v, gamma, state, use_reentrant=False
        )
        recomputed = torch.autograd.grad(o.square().sum() + final.detach().sum(), [v])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert recomputed[0].isfinite().all()

    @pytest.mark.parametrize("options", [("lengths", None, True, False), (None, "cu_seqlens", False, True)])
    def test_registration(options):
        q, f, v, gamma, state = (x.requires_grad_() for x in draw(time=20, heads=1))
        lengths = None if options[0] is None else torch.tensor([12], dtype=torch.int32)
        bounds = None if options[1] is None else torch.tensor([0, 20], dtype=torch.int32)
        args = (q, f, v, gamma, state, lengths, bounds, int(options[2]), options[3], 1, 0, None, True)
        torch.library.opcheck(torch.ops.hgrn2.chunk_scan.default, args)

    def test_a_gradient_penalty_raises():
        q, f, v = (torch.randn(1, 8, 2, 32)[..., ::2].requires_grad_() for _ in range(3))
        with pytest.raises(NotImplementedError, match=r"second derivatives.*impl='reference'"):
            torch.autograd.grad(triton_scan(q, f, v)[0].sum(), q, create_graph=True)

    def test_no_second_derivative_no_vmap():
        q, f, v, gamma, _ = (x.requires_grad_() for x in draw(time=20, heads=1))
        with pytest.raises(NotImplementedError, match="second derivatives"):
            triton_scan(q, f, v, gamma)[0].sum().backward(create_graph=True)
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.func.vmap(lambda x: triton_scan(x, f, v)[0])(torch.randn(2, *q.shape))

    def test_compiles_without_a_graph_break():
        def model(q, f, v):
            return hgrn2_scan(q, f, v, impl="triton", direction="both", q_act="silu")[0] * 2

        inputs = [x.requires_grad_() for x in draw(time=20, heads=1)[:3]]
        o = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(o, model(*inputs))
        o.sum().backward()

    def test_autocast_leaves_dtypes_alone():
        q, f, v, gamma, _ = draw(time=20, heads=1)
        with torch.autocast("cpu", torch.bfloat16):
            o, final = triton_scan(q, f, v, gamma)
        assert torch.equal(o, triton_scan(q, f, v, gamma)[0])
        assert o.dtype == final.dtype == torch.float32
