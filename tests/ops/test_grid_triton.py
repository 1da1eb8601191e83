"""Both directions and grids on the chunked Triton kernels, in Triton's interpreter (on a GPU: test_chunk_gpu).

The interpreter has to be chosen before Triton is imported, so these tests run in a process of their own.
"""

import dataclasses
import functools
import os

import pytest
import torch
from scans import in_the_interpreter

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.timeout(1800)  # minutes of one core, more where cores are shared
    def test_in_the_interpreter():
        in_the_interpreter(__file__)

else:
    from hgrn2.config import HGRN2Config
    from hgrn2.mixer import HGRN2Mixer
    from hgrn2.ops import grid_scan, hgrn2_scan, hgrn2_scan_2d
    from hgrn2.ops.chunk import pair_host as pair
    from hgrn2.ops.chunk import plan as call
    from hgrn2.ops.chunk import tiles
    from hgrn2.ops.chunk.op import triton_scan
    from hgrn2.ops.launch import Plan
    from hgrn2.ops.sequences import DIRECTIONS

    ACTS = dict(q_act="silu", v_act="sigmoid")

    def leaves(*shape, dim=16, dtype=torch.float32):
        """`[..., 3, H, K]`, packed, and a lower bound."""
        packed, gamma = torch.randn(*shape[:-1], 3, shape[-1], dim), 0.5 * torch.rand(shape[-1], dim)
        return packed.to(dtype).requires_grad_(), gamma.to(dtype).requires_grad_()

    def check(scan, shape, dim=16, mean=0.0, **options):
        packed, gamma = leaves(*shape, dim=dim)
        d_out = torch.randn(*shape, dim)
        found = []
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            whole, bound = (x.detach().to(dtype).requires_grad_() for x in (packed, gamma))
            v, q, f = whole.unbind(-3)
            o = scan(q, f + mean, v, bound, impl=impl, **ACTS, **options)
            o = o[0] if isinstance(o, tuple) else o
            found.append([o, *torch.autograd.grad(o, [whole, bound], d_out.to(dtype))])
        for got, want in zip(*found, strict=True):
            assert (got - want).norm() <= 3e-6 * want.norm()

    @pytest.mark.parametrize(("shape", "dim"), [((2, 2, 3, 2), 16), ((1, 2, 33, 1), 16), ((1, 33, 1, 1), 32)])
    def test_grid(shape, dim):
        check(hgrn2_scan_2d, shape, dim)

    @pytest.mark.parametrize("mean", [-8.0, 3.0])
    def test_grid_of_safe_and_of_fast_chunks(mean):
        check(hgrn2_scan_2d, (1, 2, 3, 1), mean=mean)

    @pytest.mark.parametrize("direction", ["rows", "columns"])
    @pytest.mark.parametrize("dim", [2, 16])
    def test_one_axis(dim, direction):
        check(grid_scan, (2, 2, 3, 1), dim, direction=direction)

    @pytest.mark.parametrize("name", ["lengths", "cu_seqlens"])
    def test_both_directions(name):
        given = dict(lengths=torch.tensor([20, 37]), cu_seqlens=torch.tensor([0, 20, 20, 37], dtype=torch.int32))
        check(hgrn2_scan, (2 if name == "lengths" else 1, 37, 1), direction="both", **{name: given[name]})

    @pytest.mark.parametrize(("mean", "limit", "sub"), [(0.0, -1.0, 0), (-1.5, None, 0), (0.0, -1.0, 4), (3.0, 1e9, 0)])
    @pytest.mark.parametrize("documents", [False, True])
    def test_both_directions_of_chunks_of_two_halves(mean, limit, sub, documents, monkeypatch):
        """Chunks of 64 tokens, as bf16 has them, partly filled; documents are split into segments of one chunk."""
        monkeypatch.setattr(tiles, "arithmetic", lambda _: ("ieee", 0, sub))
        monkeypatch.setitem(tiles._FP32, 16, dataclasses.replace(tiles._FP32[16], chunk=64))
        monkeypatch.setattr(pair, "_forward_plans", {})
        monkeypatch.setattr(pair, "_backward_plans", {})
        monkeypatch.setattr(call, "_MIN_SPLIT", 2)
        monkeypatch.setattr(call, "multiprocessors", lambda _: 64)
        packed, gamma = leaves(1, 140, 1)
        d_out = torch.randn(1, 140, 1, 16)
        bounds = torch.tensor([0, 70, 70, 140], dtype=torch.int32) if documents else None
        options = dict(direction="both", cu_seqlens=bounds, **ACTS)
        found = []
        for scan, dtype in (
            (functools.partial(triton_scan, fast_limit=limit), torch.float32),
            (functools.partial(hgrn2_scan, impl="reference"), torch.float64),
        ):
            whole, bound = (x.detach().to(dtype).requires_grad_() for x in (packed, gamma))
            v, q, f = whole.unbind(-3)
            o = scan(q, f + mean, v, bound, **options)[0]
            found.append([o, *torch.autograd.grad(o, [whole, bound], d_out.to(dtype))])
        for got, want in zip(*found, strict=True):
            assert (got - want).norm() <= (2e-4 if sub else 3e-6) * want.norm()

    @pytest.mark.parametrize("strided", [False, True])
    def test_grids_are_read_and_written_in_place(strided, monkeypatch):
        """The kernels get the caller's memory, and one tensor for each result whatever the number of scans."""
        seen, run = [], Plan.run

        def watch(plan, tensors, *buffers):
            seen.append({n: x for n, x in tensors.items() if x is not None and "mask" not in n})
            run(plan, tensors, *buffers)

        monkeypatch.setattr(Plan, "run", watch)
        if strided:
            packed, _ = leaves(2, 2, 3, 1)
            q, f, v = (x.requires_grad_() for x in packed.detach().unbind(-3))
        else:
            q, f, v = torch.randn(3, 2, 2, 3, 1, 16).requires_grad_().unbind()
        d_out = torch.randn(2, 2, 3, 1, 16)
        o = hgrn2_scan_2d(q, f, v, impl="triton")
        grads = torch.autograd.grad(o, [q, f, v], d_out)
        assert len(seen) == 4  # two axes, forward and backward
        known = dict(q=q, f=f, v=v, o=o, do=d_out, **dict(zip(("dq", "df", "dv"), grads, strict=True)))
        for tensors in seen:
            assert all(x.data_ptr() == known[n].data_ptr() for n, x in tensors.items())
        assert len({x.untyped_storage().data_ptr() for x in grads}) == (1 if strided else 3)

    def test_without_gradients_scans_share_their_buffer():
        packed, gamma = leaves(1, 2, 3, 1)
        v, q, f = packed.unbind(-3)
        o = hgrn2_scan_2d(q, f, v, gamma, impl="triton")
        with torch.no_grad():
            assert torch.equal(hgrn2_scan_2d(q, f, v, gamma, impl="triton"), o)

    @pytest.mark.usefixtures("poisoned_empty")
    def test_scratch_may_hold_anything():
        packed, gamma = leaves(1, 2, 3, 1)
        v, q, f = packed.unbind(-3)
        o = hgrn2_scan_2d(q, f, v, gamma, impl="triton")
        assert all(x.isfinite().all() for x in (o, *torch.autograd.grad(o.sum(), [packed, gamma])))

    # what is saved has places that nothing writes: the fixture makes them equal in every run
    @pytest.mark.usefixtures("poisoned_empty")
    @pytest.mark.parametrize("direction", ["both", "2d", "columns"])
    def test_registration(direction):
        shape = (1, 20, 1, 16) if direction == "both" else (1, 2, 3, 1, 16)
        q, f, v = (torch.randn(shape).requires_grad_() for _ in range(3))
        bounds = torch.tensor([0, 12, 20], dtype=torch.int32) if direction == "both" else None
        gamma = (0.5 * torch.rand(1, 16)).requires_grad_()
        args = (q, f, v, gamma, None, None, bounds, DIRECTIONS.index(direction), False, 1, 0, None, False)
        torch.library.opcheck(torch.ops.hgrn2.chunk_scan.default, args)

    def test_life_with_torch():
        packed, gamma = leaves(1, 2, 3, 1)
        v, q, f = packed.unbind(-3)

        def model(q, f, v):
            return hgrn2_scan_2d(q, f, v, gamma, impl="triton", q_act="silu") * 2

        o = torch.compile(model, fullgraph=True, backend="aot_eager")(q, f, v)
        again = torch.utils.checkpoint.checkpoint(model, q, f, v, use_reentrant=False)
        first = model(q, f, v)
        assert torch.equal(o, first)
        (want,) = torch.autograd.grad(first.square().sum(), packed, retain_graph=True)
        for other in (o, again):
            torch.testing.assert_close(torch.autograd.grad(other.square().sum(), packed, retain_graph=True)[0], want)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(model(q, f, v).sum(), packed, create_graph=True)
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.func.vmap(lambda x: triton_scan(x, f, v, direction="2d")[0])(torch.randn(2, *q.shape))

    @pytest.mark.parametrize("scan", ["2d_parallel", "2d_series"])
    @pytest.mark.parametrize("ratio", [2, 16])
    def test_mixer(scan, ratio):
        config = dict(dim=32, depth=1, expand_ratio=ratio, scan=scan, q_act="silu")
        mixers = [HGRN2Mixer(HGRN2Config(impl=impl, **config)) for impl in ("triton", "reference")]
        mixers[1].load_state_dict(mixers[0].state_dict())
        mixers[1].double()
        x = torch.randn(2, 6, 32)
        for mixer, dtype in zip(mixers, (torch.float32, torch.float64), strict=True):
            o, _ = mixer(x.to(dtype), grid=(2, 3))
            o.square().sum().backward()
        for ours, theirs in zip(mixers[0].parameters(), mixers[1].parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
