"""What the op counts as in `torch.utils.flop_counter`, and the backbone on the meta device."""

import itertools
import os

import pytest
import torch
from scans import in_the_interpreter
from torch.utils.flop_counter import FlopCounterMode

from hgrn2 import HGRN2Backbone, HGRN2Config
from hgrn2.layers import DropPath
from hgrn2.loss import linear_cross_entropy
from hgrn2.ops import grid_scan, hgrn2_scan, hgrn2_scan_2d, hgrn2_step

META = torch.device("meta")


def flops(run, *shape, **options) -> tuple[int, int]:
    """(forward, backward)"""
    q, f, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as forward:
        o = run(q, f, v, **options)
        o = o[0] if isinstance(o, tuple) else o
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


if os.environ.get("TRITON_INTERPRET") == "1":

    @pytest.mark.parametrize(("direction", "scans"), [("reverse", 1), ("both", 2)])
    @pytest.mark.parametrize(("dim", "chunk"), [(4, 0), (16, 32)])
    def test_the_kernels_count_as_their_formula(direction, scans, dim, chunk):
        once = 4 * 2 * 5 * 1 * dim * (chunk + dim)
        found = flops(hgrn2_scan, 2, 5, 1, dim, direction=direction, impl="triton")
        assert found == (scans * once, 2 * scans * once)

    def test_grids():
        once = 4 * 2 * 3 * 1 * 2 * 2
        assert flops(hgrn2_scan_2d, 1, 2, 3, 1, 2, impl="triton") == (4 * once, 8 * once)
        for direction in ("rows", "columns"):
            found = flops(grid_scan, 1, 2, 3, 1, 2, lower_bound=None, direction=direction, impl="triton")
            assert found == (2 * once, 4 * once)

    def test_a_step_counts():
        q, state = torch.randn(2, 3, 8), torch.zeros(2, 3, 8, 8)
        from hgrn2.ops.decode.step import triton_step

        with FlopCounterMode(display=False) as counted:
            triton_step(q, q, q, state, None, None, None)
        assert counted.get_total_flops() == 4 * 2 * 3 * 8 * 8

else:

    @pytest.mark.timeout(1800)  # minutes of one core, more where cores are shared
    def test_in_the_interpreter():
        pytest.importorskip("triton")
        in_the_interpreter(__file__)

    def test_the_torch_form_counts_its_products():
        """In chunks of C tokens: scores (the halves below the diagonal), values by them; the state in and out."""
        tokens, dim, size = 2 * 64 * 3, 16, 32
        forward, backward = flops(hgrn2_scan, 2, 64, 3, 16, impl="torch")
        assert forward == tokens * ((size - 1) * dim + 2 * size * dim + 4 * dim * dim)
        # rows of one token are multiplied element by element: they are no products
        assert 1.5 * forward < backward < 2.5 * forward
        assert flops(hgrn2_scan, 2, 64, 3, 16, impl="torch", direction="both")[0] == 2 * forward
        formula = 4 * tokens * dim * (size + dim)
        assert 0.7 < forward / formula < 1

    @pytest.mark.parametrize("scan", ["causal", "bidirectional", "2d_parallel", "2d_series"])
    @pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "batchnorm", "sync_batchnorm"])
    def test_the_backbone_on_meta(scan, norm):
        config = HGRN2Config(dim=16, depth=2, expand_ratio=4, glu_width=16, scan=scan, norm=norm)
        with META:
            backbone = HGRN2Backbone(config)
        real = HGRN2Backbone(config)
        grid = dict(grid=(2, 4)) if scan.startswith("2d") else {}
        found = []
        for model, device in ((backbone, META), (real, torch.device("cpu"))):
            x = torch.randn(2, 8, 16, device=device, requires_grad=True)
            with FlopCounterMode(display=False) as counted:
                y = model(x, **grid)
                y.sum().backward()
            assert y.shape == x.grad.shape == x.shape
            assert all(p.grad.shape == p.shape for p in model.parameters())
            found.append(counted.get_total_flops())
        assert found[0] == found[1]
        assert found[0] > 6 * 2 * 8 * sum(p.numel() for p in backbone.parameters() if p.ndim == 2) * 0.9

    def test_the_loss_of_a_vocabulary_on_meta_and_counted():
        for device in ("cpu", META):
            x, weight = (torch.randn(rows, 8, device=device, requires_grad=True) for rows in (6, 10))
            with FlopCounterMode(display=False) as counted:
                total, each = linear_cross_entropy(x, weight, torch.arange(6, device=device))
                total.backward()
            assert each.shape == (6,)
            assert counted.get_total_flops() == 3 * 2 * 6 * 8 * 10

    def test_drop_path_survives_deferred_initialisation():
        with META:
            drop = DropPath(0.25)
        assert "rate=0.25" in repr(drop)
        drop.to_empty(device="cpu").reset_parameters()
        assert drop.keep == 0.75

    def test_every_other_call_on_meta():
        backbone = HGRN2Backbone(HGRN2Config(dim=16, depth=2, expand_ratio=4, glu_width=16)).to(META)
        x, state = torch.randn(2, 8, 16, device=META), backbone.init_state(2)
        y, final = backbone(x, state=state, return_state=True)
        assert (y.shape, final.shape) == (x.shape, state.shape)
        assert backbone(x, lengths=torch.tensor([3, 8], device=META)).shape == x.shape
        assert backbone(x[:1], cu_seqlens=torch.tensor([0, 3, 8], device=META)).shape == (1, 8, 16)
        assert backbone.step(x[:, 0], state).shape == (2, 16)
        assert len(backbone.gammas()) == 2
        q = torch.randn(2, 8, 3, 4, device=META)
        for impl, direction in itertools.product(("auto", "torch", "reference"), ("forward", "reverse", "both")):
            assert hgrn2_scan(q, q, q, direction=direction, impl=impl)[0].shape == q.shape
        assert hgrn2_step(q[:, 0], q[:, 0], q[:, 0], torch.zeros(2, 3, 4, 4, device=META)).shape == (2, 3, 4)
        assert backbone.to_empty(device="cpu")(torch.randn(1, 3, 16)).shape == (1, 3, 16)  # deferred initialisation
