"""Compiled blocks compute what plain ones do, share their graphs, and leave checkpoints' keys alone."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hgrn2 import HGRN2Backbone, HGRN2Config
from tasks.compilation import Compile


class Counted:
    """A backend that runs what dynamo traced, and counts it."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(device="cpu", **config):
    """A backbone, its twin with the same weights, and an input."""
    torch.manual_seed(0)
    config = HGRN2Config(**(dict(dim=32, depth=4, expand_ratio=16, glu_width=32) | config))
    plain, compiled = HGRN2Backbone(config).to(device), HGRN2Backbone(config).to(device)
    compiled.load_state_dict(plain.state_dict())
    return plain, compiled, torch.randn(2, 40, 32, device=device)


def run(backbone, x, **options):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = backbone(x, **options)
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *backbone.parameters()])
    return [out.detach(), *gradients]


def same(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_layers_share_two_graphs_and_keys_stay():
    plain, compiled, x = pair(drop_path=0.2, dropout=0.1, impl="torch")
    backend = Counted()
    compiled.compile_blocks(backend=backend)
    same(run(compiled, x), run(plain, x), rtol=1e-4, atol=1e-5)
    assert backend.graphs == 3  # a block without a lower bound, one with, the final norm
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize(("mode", "device", "means"), [("auto", "cpu", "off"), ("auto", "cuda", "block")])
def test_auto(mode, device, means):
    assert Compile(mode).resolved(device) == means
    assert Compile("model").resolved(device) == "model"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        dict(norm="rmsnorm", drop_path=0.2),
        dict(scan="bidirectional", norm="batchnorm", final_norm="batchnorm", expand_ratio=4),
        dict(scan="2d_parallel", glu_act="gelu"),
        dict(expand_ratio=1, glu_width=0, lower_bound=None),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_on_the_device(config, dtype):
    plain, compiled, x = pair("cuda", **config)
    compiled.compile_blocks()
    grid = {"grid": (5, 8)} if config.get("scan") == "2d_parallel" else {}
    cases = [grid]
    if not grid:
        cases.append({"lengths": torch.tensor([40, 7], device="cuda")})
    # dropout's numbers are inductor's own
    plain.eval(), compiled.eval()
    if config.get("norm") == "batchnorm":
        plain.train(), compiled.train()
    loose = dict(rtol=2e-3, atol=2e-3) if dtype == torch.float32 else dict(rtol=0.1, atol=0.15)
    for options in cases:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            same(run(compiled, x, **options), run(plain, x, **options), **loose)


@pytest.mark.gpu
def test_dropout_is_a_function_of_the_seed():
    _, compiled, x = pair("cuda", drop_path=0.3, dropout=0.2)
    compiled.compile_blocks()
    first, again = run(compiled, x), run(compiled, x)
    same(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], compiled(x))


@pytest.mark.gpu
def test_no_further_compilation_for_other_lengths_batches_and_modes():
    """Two sizes make the sizes dynamic; after them nothing compiles, for evaluation neither once it has run."""
    _, compiled, _ = pair("cuda", drop_path=0.2)
    compiled.compile_blocks()

    def everything(rows, tokens):
        x = torch.randn(rows, tokens, 32, device="cuda")
        lengths = torch.full((rows,), tokens - 1, dtype=torch.int32, device="cuda")
        for options in ({}, {"lengths": lengths}):
            run(compiled.train(), x, **options)
            with torch.no_grad():
                compiled.eval()(x, **options)

    everything(4, 64)
    everything(6, 96)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows, tokens in ((3, 64), (7, 33), (2, 513)):
        everything(rows, tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.gpu
def test_documents_and_activation_checkpointing():
    plain, compiled, x = pair("cuda")
    compiled.compile_blocks()
    documents = {"cu_seqlens": torch.tensor([0, 9, 40], dtype=torch.int32, device="cuda")}
    same(run(compiled, x[:1], **documents), run(plain, x[:1], **documents), rtol=2e-3, atol=2e-3)
    again = [
        torch.autograd.grad(f(x.clone().requires_grad_()).sum(), list(compiled.parameters()))
        for f in (compiled, lambda y: checkpoint(compiled, y, use_reentrant=False))
    ]
    same(*again, rtol=1e-5, atol=1e-5)
