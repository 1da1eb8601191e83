"""The model: parameter counts, variants, padding, decoding, the authors' weights, initialisation."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hgrn2 import ConfigError, HGRN2Backbone, HGRN2Config, HGRN2Mixer
from hgrn2.ops.decode.graph import GraphedStep
from tasks.lm.model import LanguageModel
from tasks.vision.model import ImageClassifier

FIXTURES = Path(__file__).parent / "fixtures"


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(**changes) -> HGRN2Config:
    return HGRN2Config(**{"dim": 16, "depth": 2, "expand_ratio": 4, "glu_width": 24} | changes)


def randomised(config: HGRN2Config, dtype=torch.float32) -> HGRN2Backbone:
    """A backbone whose norms, biases and lower bounds are not at their initial values."""
    torch.manual_seed(1)
    backbone = HGRN2Backbone(config).to(dtype)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return backbone


def test_wikitext103_model_has_the_papers_size():
    config = HGRN2Config(dim=512, depth=6, expand_ratio=128, glu_width=int(512 * 8 / 3), glu_act=None)
    assert parameters(LanguageModel(config, vocab_size=50_264, tie_embeddings=True)) == 44_660_732


@pytest.mark.parametrize(("dim", "count"), [(192, 6_098_344), (384, 23_697_256)])
def test_imagenet_models_have_the_papers_size(dim, count):
    config = HGRN2Config(
        dim=dim, depth=12, expand_ratio=32, scan="bidirectional", lower_bound="exclusive", glu_width=3 * dim,
        final_norm="simple_rmsnorm",
    )  # fmt: skip
    model = ImageClassifier(config, img_size=224, patch_size=14, in_chans=3, num_classes=1000)
    assert parameters(model) == count
    assert model.patch_embed.num_patches == 256


@pytest.mark.parametrize("form", ["cumsum", "exclusive"])
def test_lower_bounds_start_at_k_over_depth(form):
    backbone = HGRN2Backbone(tiny(depth=5, lower_bound=form))
    first, *rest = backbone.gammas()
    assert first is None
    for k, gamma in enumerate(rest, start=1):
        assert gamma.shape == (4, 4)
        torch.testing.assert_close(gamma, torch.full_like(gamma, k / 5))


def test_lower_bound_forms_differ_after_training():
    share = torch.randn(3, 16).softmax(0)
    gammas = {}
    for form in ("cumsum", "exclusive"):
        backbone = HGRN2Backbone(tiny(depth=3, lower_bound=form))
        backbone.lower_bounds.data = share.log()
        gammas[form] = torch.stack(backbone.gammas()[1:]).flatten(1)
    torch.testing.assert_close(gammas["cumsum"], share.cumsum(0)[1:] - share[0])
    torch.testing.assert_close(gammas["exclusive"], share.cumsum(0)[:-1])


@pytest.mark.parametrize("form", ["cumsum", "exclusive"])
def test_lower_bounds_stay_below_one(form):
    """One layer takes nearly all of the softmax: rounding must not carry a sum past 1."""
    for seed in range(5):
        torch.manual_seed(seed)
        backbone = HGRN2Backbone(tiny(depth=12, lower_bound=form))
        with torch.no_grad():
            backbone.lower_bounds.add_(torch.randn(12, 16))[0 if form == "exclusive" else 5] += 18
        gammas = torch.stack(backbone.gammas()[1:])
        assert gammas.min() >= 0
        assert gammas.max() < 1
        backbone(torch.randn(1, 6, 16)).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


def test_initialisation_table():
    backbone = HGRN2Backbone(tiny())
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
            assert module.bias.abs().max() <= bound
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
    assert backbone.lower_bounds.eq(1).all()
    embed = LanguageModel(tiny(), 1000, tie_embeddings=True).embed.weight
    assert embed.std().item() == pytest.approx(16**-0.5, rel=0.05)


def test_checkpoint_keys_are_pinned():
    keys = set(HGRN2Backbone(tiny(depth=2)).state_dict())
    block = {
        f"{part}.{kind}"
        for part in ("mixer_norm", "mixer.in_proj", "mixer.norm", "mixer.out_proj", "glu_norm", "glu.fc1", "glu.fc2")
        for kind in ("weight", "bias")
    }
    assert keys == {f"blocks.{i}.{key}" for i in range(2) for key in block} | {
        "lower_bounds",
        "norm.weight",
        "norm.bias",
    }


# every field, the value it takes, and what else that value needs; norm_eps is large enough to see
VARIANTS = [
    ("dim", 32, {}),
    ("depth", 3, {}),
    ("expand_ratio", 8, {}),
    ("scan", "bidirectional", {}),
    ("scan", "2d_parallel", {}),
    ("scan", "2d_series", {}),
    *[("q_act", act, {}) for act in (None, "silu")],
    *[("v_act", act, {}) for act in (None, "sigmoid")],
    *[("lower_bound", form, {}) for form in (None, "exclusive")],
    ("bias", False, {}),
    *[("norm", norm, {}) for norm in ("rmsnorm", "simple_rmsnorm", "batchnorm", "sync_batchnorm")],
    *[("mixer_norm", norm, {}) for norm in ("rmsnorm", "simple_rmsnorm")],
    *[("final_norm", norm, {}) for norm in (None, "rmsnorm", "simple_rmsnorm", "batchnorm", "sync_batchnorm")],
    ("norm_eps", 0.5, {}),
    *[("glu_width", width, {}) for width in (None, 0, 32)],
    *[("glu_act", act, {}) for act in (None, "sigmoid", "gelu", "relu")],
    ("glu_bias", False, {}),
    ("dropout", 0.5, {}),
    ("drop_path", 0.5, {}),
    ("impl", "reference", {}),
]


def test_variants_cover_every_field():
    missing = {field.name for field in dataclasses.fields(HGRN2Config)} - {name for name, _, _ in VARIANTS}
    assert not missing, f"tests/test_backbone.py: VARIANTS needs a row for each of {missing}"


def test_every_field_has_its_line_of_help():
    missing = [f.name for f in dataclasses.fields(HGRN2Config) if f"        {f.name}: " not in HGRN2Config.__doc__]
    assert not missing, f"hgrn2/config.py: no line in HGRN2Config's Args for {missing}"


@pytest.mark.parametrize(("field", "value", "more"), VARIANTS, ids=lambda x: str(x))
def test_every_field_changes_the_model(field, value, more):
    def build(**changes):
        backbone = randomised(tiny(**changes))
        grid = (3, 4) if backbone.config.scan.startswith("2d") else None
        torch.manual_seed(2)
        x = torch.randn(4, 12, backbone.config.dim)
        out = backbone(x, grid=grid)
        out.square().sum().backward()
        # with one exception every parameter is used: the DDP default
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in backbone.parameters())
        return {k: v.shape for k, v in backbone.state_dict().items()}, out, backbone

    shapes, out, _ = build()
    other_shapes, other_out, changed = build(**{field: value}, **more)
    if field == "impl":
        assert changed.config.impl == "reference"
        torch.testing.assert_close(out, other_out)
        return
    assert shapes != other_shapes or not torch.allclose(out, other_out), (
        f"{field} changes nothing: hgrn2/mixer.py (or backbone.py, layers.py) has to use it"
    )
    if value == "sync_batchnorm":
        assert any(getattr(module, "sync", False) for module in changed.modules())


@torch.no_grad()
@pytest.mark.parametrize(
    ("field", "value", "more"), [row for row in VARIANTS if row[0] != "scan"], ids=lambda x: str(x)
)
def test_decoding_knows_every_field(field, value, more):
    backbone = randomised(tiny(**{field: value}, **more)).eval()
    x = torch.randn(2, 5, backbone.config.dim)
    state = backbone.init_state(2)
    steps = torch.stack([backbone.step(x[:, t], state) for t in range(5)], 1)
    message = f"hgrn2/mixer.py: step() and forward() differ with {field}={value}"
    torch.testing.assert_close(steps, backbone(x), rtol=1e-4, atol=1e-5, msg=lambda text: f"{message}\n{text}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expand_ratio": 3}, "expand_ratio=3 must be a power of two"),
        ({"expand_ratio": 32}, "expand_ratio=32 must divide dim=16"),
        ({"expand_ratio": 512, "dim": 1024}, "expand_ratio=512 must be a power of two from 1 to 256"),
        ({"dim": 0}, "dim=0 must be a whole number of at least 1"),
        ({"norm": "groupnorm"}, "norm='groupnorm' is unknown; valid: layernorm"),
        ({"q_act": "relu"}, "q_act='relu' is unknown; valid: None, silu, sigmoid"),
        ({"glu_width": 0, "glu_act": None}, "glu_act=None has no effect with glu_width=0"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"depth": 1, "drop_path": 0.1}, "drop_path=0.1 has no effect with depth=1"),
        ({"dim": -1, "dropout": 2}, "dim=-1 .*; .*dropout=2"),
    ],
    ids=lambda x: str(x),
)
def test_bad_configs_name_the_key_and_the_value(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("ratio", [2**i for i in range(9)])
def test_every_expand_ratio_runs(ratio):
    config = HGRN2Config(dim=256, depth=1, expand_ratio=ratio, glu_width=0)
    assert HGRN2Backbone(config)(torch.randn(1, 3, 256)).shape == (1, 3, 256)


def test_causality():
    backbone = randomised(tiny()).eval()
    x = torch.randn(2, 12, 16)
    y = x.clone()
    y[:, 7:] = torch.randn(2, 5, 16)
    before, after = backbone(x), backbone(y)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("scan", ["causal", "bidirectional", "2d_parallel", "2d_series"])
def test_training_and_evaluation_compute_the_same(scan):
    backbone = randomised(tiny(scan=scan))
    x, grid = torch.randn(2, 12, 16), (3, 4) if scan.startswith("2d") else None
    assert torch.equal(backbone.train()(x, grid=grid), backbone.eval()(x, grid=grid))


@pytest.mark.parametrize("form", ["cumsum", None])
def test_decoding_equals_the_parallel_forward(form):
    backbone = randomised(tiny(lower_bound=form, norm="rmsnorm")).eval()
    x = torch.randn(3, 17, 16)
    want = backbone(x)
    state = backbone.init_state(3)
    steps = torch.stack([backbone.step(x[:, t], state) for t in range(17)], dim=1)
    torch.testing.assert_close(steps, want, rtol=1e-5, atol=1e-5)
    head, state = backbone(x[:, :6], return_state=True)
    tail = [backbone.step(x[:, t], state) for t in range(6, 11)]
    rest, _ = backbone(x[:, 11:], state=state, return_state=True)
    pieces = torch.cat([head, torch.stack(tail, dim=1), rest], dim=1)
    torch.testing.assert_close(pieces, want, rtol=1e-5, atol=1e-5)
    other = backbone.init_state(3)
    decode = GraphedStep(backbone.step, other, backbone.gammas())
    again = torch.stack([decode(x[:, t]) for t in range(17)], dim=1)
    assert torch.equal(again, steps)
    assert other.any()


@pytest.mark.parametrize("scan", ["causal", "bidirectional"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simple_rmsnorm", "batchnorm", "sync_batchnorm"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_padding_changes_nothing(scan, norm, training):
    lengths = torch.tensor([5, 12, 1])

    def run(fill):
        backbone = randomised(tiny(scan=scan, norm=norm, final_norm=norm)).train(training)
        torch.manual_seed(3)
        x = torch.randn(3, 12, 16)
        for row, length in zip(x, lengths, strict=True):
            row[length:] = fill
        y = backbone(x, lengths=lengths)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        return y, {name: p.grad for name, p in backbone.named_parameters()}, backbone

    want, want_grads, _ = run(0.0)
    got, grads, backbone = run(math.nan)
    assert torch.equal(got, want)
    assert not got[0, 5:].any()
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name]), name
    if not training:  # rows do not see each other: a padded row equals the row alone
        torch.manual_seed(3)
        x = torch.randn(3, 12, 16)
        torch.testing.assert_close(backbone(x[:1, :5]), got[:1, :5])


def test_batch_norm_statistics_are_those_of_the_real_tokens():
    backbone = HGRN2Backbone(tiny(norm="batchnorm"))
    x = 3 + 2 * torch.randn(4, 9, 16)
    lengths = torch.tensor([9, 4, 1, 6])
    backbone(x.clone(), lengths=lengths)
    real = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
    norm, plain = backbone.blocks[0].mixer_norm, nn.BatchNorm1d(16)
    plain(real)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


@pytest.mark.filterwarnings("error")  # a norm that misses its fused kernel under autocast warns
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simple_rmsnorm", "batchnorm"])
def test_autocast_runs_every_norm(norm):
    backbone = randomised(tiny(norm=norm, final_norm=norm, mixer_norm="rmsnorm"))
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(2, 6, 16)).float().square().sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simple_rmsnorm", "batchnorm", "sync_batchnorm"])
def test_bf16_parameters(norm, training):
    """trainer.precision=bf16-true: parameters in bf16, gates and states still in fp32."""
    config = tiny(norm=norm, final_norm=norm)
    x = torch.randn(3, 12, 16)
    want = randomised(config).train(training)(x)
    got = randomised(config).bfloat16().train(training)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.05


def test_a_mixer_without_gradients_from_above():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    mixer = HGRN2Mixer(HGRN2Config(dim=8, depth=1, expand_ratio=2))
    q, f, v = mixer._project(torch.randn(1, 3, 8))
    (sum(Stop.apply(x).sum() for x in (q, f, v)) + mixer.in_proj.weight.sum()).backward()
    assert torch.equal(mixer.in_proj.weight.grad, torch.ones_like(mixer.in_proj.weight))


def test_packed_documents_equal_separate_rows():
    backbone = randomised(tiny()).eval()
    a, b = torch.randn(1, 5, 16), torch.randn(1, 9, 16)
    packed = backbone(torch.cat([a, b], dim=1), cu_seqlens=torch.tensor([0, 5, 14], dtype=torch.int32))
    torch.testing.assert_close(packed, torch.cat([backbone(a), backbone(b)], dim=1))


def test_two_dimensional_series_is_the_mixer_twice():
    mixer = HGRN2Mixer(tiny(scan="2d_series"))
    line = HGRN2Mixer(tiny(scan="bidirectional"))
    line.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 12, 16)
    columns = x.view(2, 3, 4, 16).transpose(1, 2).reshape(8, 3, 16)
    down = line(columns)[0].view(2, 4, 3, 16).transpose(1, 2)
    across = line(down.reshape(6, 4, 16))[0].view(2, 12, 16)
    torch.testing.assert_close(mixer(x, grid=(3, 4))[0], across)


def test_the_authors_weights_load():
    """The fixture holds weights, input and output in the form of the authors' Hgru2_1d: packed V, Q, F; their names.

    The output was computed with their formulas, written out in tests/fixtures/make_hgru2.py.
    """
    fixture = torch.load(FIXTURES / "hgru2_1d.pt", weights_only=True)
    mixer = HGRN2Mixer(HGRN2Config(dim=32, depth=1, expand_ratio=8))
    mixer.load_state_dict(fixture["state_dict"])
    out, _ = mixer(fixture["x"], fixture["lower_bound"].view(4, 8))
    torch.testing.assert_close(out, fixture["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scan", "call", "message"),
    [
        ("causal", {"grid": (3, 4)}, "has no effect"),
        ("2d_parallel", {}, "needs grid"),
        ("2d_parallel", {"grid": (5, 5)}, "Y \\* X = T = 12"),
        ("2d_series", {"grid": (3, 4), "lengths": torch.tensor([1, 2])}, "no lengths"),
        ("bidirectional", {"return_state": True}, "scan='causal'"),
    ],
    ids=str,
)
def test_bad_calls_are_refused(scan, call, message):
    with pytest.raises(ValueError, match=message):
        HGRN2Backbone(tiny(scan=scan))(torch.randn(2, 12, 16), **call)


def test_the_model_imports_without_lightning():
    code = "import sys; sys.modules['lightning'] = None; import hgrn2; assert 'tasks' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export_and_compile():
    backbone = randomised(tiny()).eval()
    x = torch.randn(2, 20, 16)
    want = backbone(x)
    torch.testing.assert_close(torch.export.export(backbone, (x,)).module()(x), want)
    backbone.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(backbone(x), want)
    assert not any("_orig_mod" in key for key in backbone.state_dict())
