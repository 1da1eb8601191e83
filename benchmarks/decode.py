"""Decoding on one GPU: the mixer steps of a model in a CUDA graph against the time to read its weights and states.

    python benchmarks/decode.py [--batches 1 ...]

The stack is 24 mixers of width 2048, head dim 128, bf16; the floor reads their weights once and their states twice at
the speed of a large copy in the same run. Timed only after each mixer's step agrees with fp64. Peers: our step between
torch's products and norm, the torch form of the step there, and fla's `HGRN2Attention` (if installed), all in a graph
too. Also a whole 1.3B language model.
Writes results/decode.json beside this file.
"""

import argparse
import datetime
import functools
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton
from ops import OUT, milliseconds

from hgrn2 import HGRN2Config, HGRN2Mixer
from hgrn2.ops import hgrn2_step
from hgrn2.ops.decode.graph import GraphedStep
from hgrn2.ops.decode.step import torch_step
from tasks.lm.model import LanguageModel

DEPTH, WIDTH, DIM = 24, 2048, 128
BATCHES = (1, 2, 4, 8, 16, 64)
CONFIG = dict(dim=WIDTH, depth=DEPTH, expand_ratio=DIM, q_act="silu", v_act=None, mixer_norm="rmsnorm", bias=False)


def graphed(run) -> float:
    """Milliseconds of one replay of `run` captured in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay, 30)


def copy_rate() -> float:
    """Bytes a second that a large copy reads and writes."""
    a = torch.empty(2**30, dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a), 5) * 1e3


def plain_mixer(mixer: HGRN2Mixer, x, state, gamma):
    """The mixer's step in torch."""
    q, f, v = mixer._project(x)
    o = torch_step(q, f, v, state, gamma, mixer.config.q_act, mixer.config.v_act)
    return mixer._output(o)


def unfused_mixer(mixer: HGRN2Mixer, x, state, gamma):
    """The mixer's step from torch's products and norm around our step."""
    q, f, v = mixer._project(x)
    return mixer._output(hgrn2_step(q, f, v, state, gamma, q_act=mixer.config.q_act, v_act=mixer.config.v_act))


def stack(step, mixers, x, states, gammas):
    for mixer, state, gamma in zip(mixers, states, gammas, strict=True):
        x = step(mixer, x, state, gamma)
    return x


def inputs(batch: int):
    heads = WIDTH // DIM
    states = torch.randn(DEPTH, batch, heads, DIM, DIM, device="cuda")
    gammas = 0.9 * torch.rand(DEPTH, heads, DIM, device="cuda")
    return torch.randn(batch, WIDTH, device="cuda", dtype=torch.bfloat16), states, gammas


def gate(mixers, batch: int) -> dict:
    """Relative errors of each mixer's step against fp64, ours and plain torch's; raises where ours is too large."""
    x, states, gammas = inputs(batch)
    worst = {"ours": 0.0, "plain": 0.0}
    for mixer, state, gamma in zip(mixers, states, gammas, strict=True):
        wide = HGRN2Mixer(mixer.config).to("cuda", torch.float64)
        wide.load_state_dict(mixer.state_dict())
        want = wide.step(x.double(), state.double(), gamma.double())
        for name, run in (("ours", HGRN2Mixer.step), ("plain", plain_mixer)):
            y = run(mixer, x, state.clone(), gamma)
            worst[name] = max(worst[name], ((y.double() - want).norm() / want.norm()).item())
    if not worst["ours"] <= 2 * worst["plain"]:
        raise SystemExit(f"the step is wrong, nothing is timed: {worst}")
    return worst


def measure(mixers, batch: int, rate: float) -> dict:
    """All times of the stack for one batch size."""
    errors = gate(mixers, batch)
    x, states, gammas = inputs(batch)
    ours = functools.partial(stack, HGRN2Mixer.step, mixers, x, states, gammas)
    floor = (sum(p.nbytes for m in mixers for p in m.parameters()) + 2 * states.nbytes) / rate * 1e3
    times = [graphed(ours) for _ in range(2)]
    return {
        "errors": errors,
        "floor ms": floor,
        "ours ms": times[0],
        "ours again ms": times[1],
        "over floor": times[0] / floor,
        "unfused ms": graphed(functools.partial(stack, unfused_mixer, mixers, x, states, gammas)),
        "torch form of the step ms": graphed(functools.partial(stack, plain_mixer, mixers, x, states, gammas)),
        "eager ms": milliseconds(ours, 10),
        "fla": fla(batch) if batch in (1, 64) else None,
    }


class _Cache(list):
    """What fla's layers need of a cache: one entry a layer, its state replaced at each step."""

    def update(self, layer_idx: int, **entries):
        self[layer_idx] = entries


def fla(batch: int) -> dict | None:
    """fla's layer stack: eager, and captured in a graph (whose states are not carried from one replay to the next)."""
    try:
        from fla.layers import HGRN2Attention
    except ImportError:
        return None
    x, states, gammas = inputs(batch)
    layers = [
        HGRN2Attention(hidden_size=WIDTH, expand_ratio=DIM, layer_idx=i).to("cuda", torch.bfloat16).eval()
        for i in range(DEPTH)
    ]
    cache = _Cache({"recurrent_state": s} for s in states)
    bounds = gammas.flatten(1)

    def run():
        y = x[:, None]
        for layer, bound in zip(layers, bounds, strict=True):
            y = layer(y, past_key_values=cache, use_cache=True, lower_bound=bound)[0]

    result = {"eager ms": milliseconds(run, 10)}
    try:
        result["graph ms"] = graphed(run)
    except RuntimeError as error:
        result["graph"] = f"cannot be captured: {str(error)[:80]}"
    return result


def language_model(batch: int) -> dict:
    """A 24-layer, 2048-wide model with GLU and 32,000 tokens, bf16: milliseconds a greedy step, eager and graphed."""
    config = HGRN2Config(**CONFIG, norm="rmsnorm", final_norm="rmsnorm", glu_width=5632, glu_bias=False)
    with torch.device("cuda"):
        model = LanguageModel(config, 32000, False).to(torch.bfloat16).eval()
    token, state = torch.zeros(batch, dtype=torch.long, device="cuda"), model.backbone.init_state(batch)
    gammas = model.backbone.gammas()
    decode = GraphedStep(model.step, state, gammas)
    decode(token)
    # the embedding is only looked up
    size = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes + 2 * state.nbytes
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes a step": size,
        "eager ms": milliseconds(lambda: model.step(token, state, gammas), 10),
        "graph ms": milliseconds(lambda: decode(token).argmax(-1), 30),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--commit", help="recorded as the code's version (default: asked of git)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = args.commit or subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        fla_version = version("flash-linear-attention")
    except PackageNotFoundError:
        fla_version = None
    torch.manual_seed(0)
    rate = copy_rate()
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "commit": commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fla": fla_version,
        "copy TB/s": rate / 1e12,
        "stack": f"{DEPTH} mixers, width {WIDTH}, head dim {DIM}, bf16",
        "rows": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    mixers = [HGRN2Mixer(HGRN2Config(**CONFIG)).to("cuda", torch.bfloat16) for _ in range(DEPTH)]
    for batch in args.batches:
        result["rows"][f"B{batch}"] = row = measure(mixers, batch, rate)
        print(f"B{batch}", json.dumps(row), flush=True)
        (args.out / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    result["1.3B language model"] = {
        f"B{batch}": language_model(batch) for batch in (1, 4, 8, 64) if batch in args.batches
    }
    for row in result["1.3B language model"].values():
        row["floor ms"] = row["bytes a step"] / rate * 1e3
    print(json.dumps(result["1.3B language model"]))
    (args.out / "decode.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
