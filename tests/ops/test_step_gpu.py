"""Decoding on a real GPU: `pytest -m gpu`. The step of every head dim, the fused mixer step, CUDA graphs."""

import math

import pytest
import torch
import torch.nn.functional as F

from hgrn2 import HGRN2Backbone, HGRN2Config, HGRN2Mixer, fused
from hgrn2.backbone import Block
from hgrn2.ops import hgrn2_scan, hgrn2_step
from hgrn2.ops.decode import matvec
from hgrn2.ops.decode.graph import GraphedStep
from hgrn2.ops.decode.step import step_supported, torch_step
from tasks.lm.model import LanguageModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ACTS = {"q_act": "silu", "v_act": None}


def draw(batch=2, heads=5, dim=64, dtype=BF16):
    """Views of a packed projection, a state and a lower bound."""
    v, q, f = torch.randn(batch, 3, heads, dim, device="cuda").to(dtype).unbind(1)
    return q, f, v, torch.randn(batch, heads, dim, dim, device="cuda"), 0.9 * torch.rand(heads, dim, device="cuda")


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dim", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_error_against_plain_torch(dtype, dim):
    _, _, _, state, gamma = draw(3, max(3, 700 // dim), dim)
    states = {"ours": state.clone(), "plain": state.clone(), "truth": state.double()}
    errors = {"ours": [], "plain": []}
    for _ in range(6):
        q, f, v, _, _ = draw(3, state.shape[1], dim, dtype)
        assert step_supported(q, state, gamma, *ACTS.values()) is None
        want = hgrn2_step(q.double(), f.double(), v.double(), states["truth"], gamma.double(), **ACTS)
        errors["ours"].append(error(hgrn2_step(q, f, v, states["ours"], gamma, **ACTS), want))
        errors["plain"].append(error(torch_step(q, f, v, states["plain"], gamma, *ACTS.values()), want))
    assert max(errors["ours"]) <= 2 * max(errors["plain"]), errors
    assert error(states["ours"], states["truth"]) <= 2 * error(states["plain"], states["truth"])


@pytest.mark.parametrize("bound", [None, 0.0, 1e-3])
@pytest.mark.parametrize("dim", [4, 128])
def test_extreme_gates(dim, bound):
    q, f, v, state, _ = draw(dim=dim)
    extremes = torch.tensor([100.0, -100.0, 60.0, -60.0, math.inf, -math.inf, 15.0, -15.0], device="cuda")
    f = extremes[torch.randint(0, 8, f.shape, device="cuda")].to(BF16)
    gamma = None if bound is None else torch.full((5, dim), bound, device="cuda")
    want = hgrn2_step(q.double(), f.double(), v.double(), wide := state.double(), gamma)
    assert error(hgrn2_step(q, f, v, state, gamma), want) < 1e-2
    assert error(state, wide) < 1e-6


@pytest.mark.parametrize("dim", [2, 16, 128])
def test_views_and_graphs(dim):
    q, f, v, state, gamma = draw(dim=dim)
    start = state.clone()
    want = hgrn2_step(q.contiguous(), f.contiguous(), v.contiguous(), state, gamma, **ACTS)
    graph, static = torch.cuda.CUDAGraph(), start.clone()
    with torch.cuda.graph(graph):
        o = hgrn2_step(q, f, v, static, gamma, **ACTS)
    graph.replay()
    assert torch.equal(o, want)
    assert torch.equal(static, state)
    graph.replay()
    assert torch.equal(o, hgrn2_step(q, f, v, state, gamma, **ACTS))
    assert torch.equal(static, state)


def test_compiles_without_a_break():
    q, f, v, state, gamma = draw(dim=128)

    def model(q, f, v, state):
        return hgrn2_step(q * 2, f, v, state, gamma, **ACTS) + 1

    other = state.clone()
    o = torch.compile(model, fullgraph=True)(q, f, v, state)
    assert error(o, model(q, f, v, other)) < 1e-2
    assert error(state, other) < 1e-6


@pytest.mark.parametrize("dim", [4, 128])
def test_two_hundred_steps_equal_the_scan(dim):
    q, f, v = torch.randn(3, 2, 200, 4, dim, device="cuda").to(BF16)
    gamma = 0.9 * torch.rand(4, dim, device="cuda")
    want, final = hgrn2_scan(
        q.double(), f.double(), v.double(), gamma.double(), output_final_state=True, impl="torch", **ACTS
    )
    state = torch.zeros_like(final, dtype=FP32)
    o = torch.stack([hgrn2_step(q[:, t], f[:, t], v[:, t], state, gamma, **ACTS) for t in range(200)], 1)
    assert error(o, want) < 4e-3
    assert error(state, final) < 1e-6


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 2048, 6144), (2, 768, 100), (1, 2560, 2560), (2, 5632, 64)])
@pytest.mark.parametrize("norm", [None, "rms", "layer", "gate"])
def test_matvec(dtype, rows, width, out, norm):
    x, weight, bias = (torch.randn(s, device="cuda").to(dtype) for s in ((rows, width), (out, width), (out,)))
    g, shift = torch.randn(2, width, device="cuda").to(dtype)
    residual = torch.randn(rows, out, device="cuda").to(dtype)
    if norm == "gate":
        x = torch.cat([x, torch.randn_like(x)], 1)

    def plain(x, weight, bias, g, shift, residual):
        if norm == "rms":
            x = F.rms_norm(x, (width,), g, 1e-5)
        elif norm == "layer":
            x = F.layer_norm(x, (width,), g, shift, 1e-5)
        elif norm == "gate":
            x = F.silu(x[:, :width]) * x[:, width:]
        return F.linear(x, weight, bias) + residual

    want = plain(*(a.double() for a in (x, weight, bias, g, shift, residual)))
    allowed = error(plain(x, weight, bias, g, shift, residual), want)
    parts = (norm, g, shift if norm == "layer" else None, 1e-5) if norm in ("rms", "layer") else None
    options = dict(norm=parts, gate="silu" if norm == "gate" else "no", residual=residual)
    starts = (0, 1, 2, 3) if matvec.early_start(0) else (0,)
    for start in starts:
        assert error(matvec.matvec(x, weight, bias, start=start, **options), want) <= 2 * allowed + 1e-7


def test_early_start_after_a_copy_in_a_graph():
    if not matvec.early_start(0):
        pytest.skip("needs compute capability 9.0")
    weight, x = torch.randn(64, 256, device="cuda"), torch.randn(1, 256, device="cuda")
    static = torch.zeros_like(x)
    matvec.matvec(static, weight, start=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.copy_(x)
        y = matvec.matvec(static, weight, start=2)
    x.normal_()
    graph.replay()
    assert torch.equal(y, matvec.matvec(x, weight))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("norm", "bias"), [("rmsnorm", False), ("layernorm", True), ("simple_rmsnorm", False)])
@pytest.mark.parametrize("rows", [1, matvec.MAX_ROWS])
def test_fused_block(dtype, norm, bias, rows):
    config = HGRN2Config(
        dim=512, depth=1, expand_ratio=128, norm=norm, mixer_norm=norm, bias=bias, glu_bias=bias, glu_width=1408
    )
    block, wide = (Block(config).eval().to("cuda", d) for d in (dtype, torch.float64))
    wide.load_state_dict(block.state_dict())
    x, gamma = torch.randn(rows, 512, device="cuda").to(dtype), 0.9 * torch.rand(4, 128, device="cuda")
    state = torch.randn(rows, 4, 128, 128, device="cuda")
    before = state.clone()
    assert fused.block_consists(block, Block)
    assert fused.mixer_supported(block.mixer, HGRN2Mixer, x, state, gamma)
    assert fused.glu_supported(block.glu, x)
    for part, module in ((wide.mixer, block.mixer), (wide, block)):
        want = part.step(x.double(), before.double(), gamma.double())
        got, plain = state.copy_(before), before.clone()
        ours = error(module.step(x, got, gamma), want)
        with torch.enable_grad():  # gradients: the plain way
            assert ours <= 2 * error(module.step(x, plain, gamma).detach(), want)
        assert error(got, plain) < 1e-2


class Scaled(HGRN2Mixer):
    """A mixer with a scale per head, which the fused step knows nothing of."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.rand(config.heads, 1))

    def _output(self, o):
        return super()._output(o * self.scale)


@torch.no_grad()
def test_a_mixer_with_more_to_it_takes_its_plain_step():
    block = Block(HGRN2Config(dim=256, depth=1, expand_ratio=128)).eval().cuda()
    block.mixer = Scaled(block.mixer.config).cuda()
    x, state = torch.randn(1, 256, device="cuda"), torch.randn(1, 2, 128, 128, device="cuda")
    for module in (block, block.mixer):
        want = module.double().step(x.double(), state.double(), None)
        assert error(module.float().step(x, state.clone(), None), want) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_graphed_backbone(autocast):
    config = HGRN2Config(dim=256, depth=3, expand_ratio=64, mixer_norm="rmsnorm", bias=False)
    backbone = HGRN2Backbone(config).cuda().eval()
    x = torch.randn(20, 2, 256, device="cuda")
    if not autocast:
        backbone, x = backbone.to(BF16), x.to(BF16)
    with torch.autocast("cuda", BF16, enabled=autocast):
        state, other = backbone.init_state(2), backbone.init_state(2)
        decode, gammas = GraphedStep(backbone.step, state, backbone.gammas()), backbone.gammas()
        for token in x:
            assert torch.equal(decode(token), backbone.step(token, other, gammas))
        assert torch.equal(state, other)
    with pytest.raises(ValueError, match="the graph is for"):
        decode(x[0, :1])


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation(temperature):
    config = HGRN2Config(dim=128, depth=2, expand_ratio=32)
    model = LanguageModel(config, 50, False).cuda().eval()
    prompt = torch.randint(0, 50, (2, 9), device="cuda")
    first, again = (model.generate(prompt, 30, temperature, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    if temperature == 0:  # each token is the likeliest after those before it
        logits = model(first)[:, 8:-1]
        best = logits.max(-1).values - logits.gather(-1, first[:, 9:, None])[..., 0]
        assert best.max() < 1e-2
