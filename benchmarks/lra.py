"""The scan of small states at Long Range Arena's shapes, against what could be used instead, and the memory floor.

    python benchmarks/lra.py [--peers expanded fla] [--shapes ListOps ...]

Peers: `expanded` materialises the expanded state, as the authors' code does, and scans it with torch's compiled
`associative_scan`; `fla` is flash-linear-attention's `chunk_gla` with heads padded to 16, one call a direction. Ours
computes gates inside and they are counted; the peers get k and the decays ready made. A shape is timed only after
outputs and gradients agree with the fp64 torch form. Times are medians of calls from Python ("eager"), and of replays
of a CUDA graph, which leave out the host's work; peers are timed from Python, where the device is busy throughout.
Writes results/lra.json and lra.md beside this file.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch
import triton
from ops import OUT, ceilings, commit_of, limit_tuning, milliseconds, peak_gib, version_of

from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d

TOLERANCE = 1e-2
# name: (tokens [B, T] or [B, Y, X], width, head dim, direction); Path-X's series form runs this scan along H, then W
SHAPES = {
    "ListOps": ((128, 2048), 64, 4, "both"),
    "Text": ((64, 4096), 128, 8, "both"),
    "Retrieval": ((256, 4000), 256, 2, "both"),
    "Image": ((64, 32, 32), 512, 2, "2d"),
    "Pathfinder": ((128, 32, 32), 128, 2, "2d"),
    "Path-X": ((32 * 128, 128), 32, 1, "both"),
}


def draw(shape, width, dim, dtype=torch.bfloat16) -> list:
    """q, f, v, do and the lower bound."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (*shape, width // dim, dim)
    tensors = [torch.randn(size, device="cuda", generator=generator).to(dtype) for _ in range(4)]
    return [*tensors, 0.5 * torch.rand(width // dim, dim, device="cuda", generator=generator)]


def scan(q, f, v, gamma, direction: str, impl: str = "triton"):
    if direction == "2d":
        return hgrn2_scan_2d(q, f, v, gamma, impl=impl)
    return hgrn2_scan(q, f, v, gamma, direction=direction, impl=impl)[0]


def gate(shape, width, dim, direction) -> dict:
    """Relative errors of outputs and gradients on two rows; raises where one is too large."""
    *inputs, gamma = draw((2, *shape[1:]), width, dim)

    def run(impl, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs[:3]]
        leaves.append(gamma.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_())
        o = scan(*leaves, direction, impl)
        return [o, *torch.autograd.grad(o, leaves, inputs[3].to(dtype))]

    names = ("o", "dq", "df", "dv", "d lower_bound")
    pairs = zip(names, run("triton", torch.bfloat16), run("torch", torch.float64), strict=True)
    errors = {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in pairs}
    if not all(error < TOLERANCE for error in errors.values()):
        raise SystemExit(f"the kernels are wrong, nothing is timed: {errors}")
    return errors


def graphed(run) -> float:
    """Median time of a replay of `run` in a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay)


def timed(op, leaves, do, graphs: bool, count: int = 30) -> dict:
    def forward():
        with torch.no_grad():
            op()

    def both():
        torch.autograd.grad(op(), leaves, do)

    result = {"forward ms": milliseconds(forward, count), "fwd+bwd ms": milliseconds(both, count)}
    if graphs:
        result |= {"forward graph ms": graphed(forward), "fwd+bwd graph ms": graphed(both)}
    return result | {"peak GiB": peak_gib(both)}


def ours(shape, width, dim, direction) -> dict:
    q, f, v, do, gamma = draw(shape, width, dim)
    leaves = [x.requires_grad_() for x in (q, f, v, gamma)]
    result = timed(lambda: scan(q, f, v, gamma, direction), leaves, do, True)
    if direction == "both":
        one = timed(lambda: scan(q, f, v, gamma, "forward"), leaves, do, True)
        result["one direction, fwd+bwd graph ms"] = one["fwd+bwd graph ms"]
    elif direction == "2d":
        flat = [x.detach().flatten(1, 2).requires_grad_() for x in (q, f, v)]
        one = timed(lambda: scan(*flat, gamma, "both"), [*flat, gamma], do.flatten(1, 2), True)
        result["bidirectional 1-D, fwd+bwd graph ms"] = one["fwd+bwd graph ms"]
    return result


def directions(run, q, k, v, g, direction: str):
    """Sum of `run` (a forward scan of `[B, T, H, K]` with fp32 log-decays g) over the directions."""
    if direction == "2d":
        batch, rows, columns = q.shape[:3]
        along = directions(run, *(x.flatten(0, 1) for x in (q, k, v, g)), "both")
        down = directions(run, *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, g)), "both")
        return along.unflatten(0, (batch, rows)) + down.unflatten(0, (batch, columns)).transpose(1, 2)
    return run(q, k, v, g) + run(*(x.flip(1) for x in (q, k, v, g))).flip(1)


def _combine(a, b):
    return b[0] * a[0], b[0] * a[1] + b[1]


@torch.compile(dynamic=False)
def _scanned(decay, x, reverse: bool):
    from torch._higher_order_ops.associative_scan import associative_scan

    return associative_scan(_combine, (decay, x), dim=1, reverse=reverse)[1]


class _Expanded(torch.autograd.Function):
    """States of `S_t = decay_t S_{t-1} + x_t` along dim 1, all of them in memory; both `[B, T, H, K, V]` fp32."""

    @staticmethod
    def forward(ctx, decay, x):
        states = _scanned(decay, x, False)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx, grad):
        decay, states = ctx.saved_tensors
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        total = _scanned(later, grad.contiguous(), True)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        return total * before, total


def expanded_scan(q, k, v, g):
    decay = g.exp().unsqueeze(-1).expand(*g.shape, v.shape[-1]).contiguous()
    states = _Expanded.apply(decay, k.float().unsqueeze(-1) * v.float().unsqueeze(-2))
    return (q.float().unsqueeze(-2) @ states).squeeze(-2).to(q.dtype)


def padded_fla(q, k, v, g):
    """fla's grids have rows x heads along an axis of at most 65,535 programs: more go in several calls."""
    from fla.ops.gla import chunk_gla

    dim = q.shape[-1]
    q, k, v, g = (torch.nn.functional.pad(x, (0, 16 - dim)) for x in (q, k, v, g))
    parts = zip(*(x.split(65535 // x.shape[2]) for x in (q, k, v, g)), strict=True)
    return torch.cat([chunk_gla(*part, scale=1.0)[0][..., :dim] for part in parts])


def peer(run, shape, width, dim, direction, want: torch.Tensor) -> dict:
    q, f, v, do, gamma = draw(shape, width, dim)
    k = ((1 - gamma) * torch.sigmoid(-f.float())).to(q.dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, torch.log1p(-k.float()))]
    if run is padded_fla:  # most of its tuning is for any number of rows: on two it takes less time
        few = [x.detach()[:2].requires_grad_() for x in leaves]
        torch.autograd.grad(directions(run, *few, direction), few, do[:2])
    o = directions(run, *leaves, direction)
    error = ((o - want).norm() / want.norm()).item()
    if not error < 2e-2:
        raise SystemExit(f"the peer is wrong, nothing is timed: {error}")
    del o
    return {"error": error} | timed(lambda: directions(run, *leaves, direction), leaves, do, False, 7)


PEERS = {"expanded": expanded_scan, "fla": padded_fla}


def table(result: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}, fla {result['fla']}, commit "
        f"{result['commit']}; device copy {result['ceilings']['copy TB/s']:.2f} TB/s. Forward and backward in ms; "
        "'graph' is a replay of a CUDA graph, without the host's work.",
        "",
        "| shape | tokens, width, head dim | graph | floor | graph / floor | eager | expanded | fla, padded "
        "| best peer / eager | GiB | expanded | fla |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["shapes"].items():
        mine, low = row["ours"], row["floor ms"][1]
        shape, width, dim, _ = row["shape"]
        peers = {n: row[n] for n in PEERS if row.get(n)}
        best = min((p["fwd+bwd ms"] for p in peers.values()), default=None)
        cells = [
            name,
            f"{' x '.join(map(str, shape))}, {width}, {dim}",
            f"{mine['fwd+bwd graph ms']:.3f}",
            f"{low:.3f}",
        ]
        cells += [f"{mine['fwd+bwd graph ms'] / low:.2f}x", f"{mine['fwd+bwd ms']:.3f}"]
        cells += [f"{peers[n]['fwd+bwd ms']:.2f}" if n in peers else "" for n in PEERS]
        cells += [f"{best / mine['fwd+bwd ms']:.1f}x" if best else "", f"{mine['peak GiB']:.2f}"]
        cells += [f"{peers[n]['peak GiB']:.2f}" if n in peers else "" for n in PEERS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tune-ms", type=float, help="time for each candidate of fla's autotuner (default: Triton's)")
    parser.add_argument("--commit", help="recorded as the code's version (default: asked of git)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    limit_tuning(args.tune_ms)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "commit": args.commit or commit_of(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fla": version_of("flash-linear-attention") if "fla" in args.peers else None,
        "ceilings": ceilings(),
        "shapes": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.shapes:
        shape, width, dim, direction = SHAPES[name]
        one = torch.Size(shape).numel() * width * 2 / result["ceilings"]["copy TB/s"] / 1e9
        row = {"shape": SHAPES[name], "errors": gate(*SHAPES[name]), "floor ms": (4 * one, 11 * one)}
        row["ours"] = ours(*SHAPES[name])
        with torch.no_grad():
            *inputs, _, gamma = draw(shape, width, dim)
            want = scan(*inputs, gamma, direction)
        result["shapes"][name] = row
        for other in args.peers:
            try:
                row[other] = peer(PEERS[other], *SHAPES[name], want)
            except torch.cuda.OutOfMemoryError:
                row[other] = None
            torch.compiler.reset()  # a scan compiled for one shape is no help to the next
            torch.cuda.empty_cache()
            (args.out / "lra.json").write_text(json.dumps(result, indent=1) + "\n")  # a peer may take long
        print(name, json.dumps(row), flush=True)
        (args.out / "lra.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (args.out / "lra.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
