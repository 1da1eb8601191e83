"""The Triton scan against flash-linear-attention's `chunk_gla` (if installed) and the memory floor, on one GPU.

    python benchmarks/ops.py [--quick] [--peer SHAPE ...] [--no-layer]

A shape is timed only after its outputs and gradients agree with the fp64 torch form. fla gets its gates ready made,
ours are computed inside and counted. Medians; ceilings are measured in the same run. Writes results/ops.json, ops.md
and ops.png beside this file.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import triton

from hgrn2.ops import hgrn2_scan

OUT = Path(__file__).parent / "results"
TOLERANCE = 1e-2
# name: (B, T, H, D, mean and spread of f, lower bound)
SHAPES = {
    "1.3B LM layer": (8, 2048, 16, 128, 0.0, 1.0, True),
    "340M LM layer": (16, 2048, 8, 128, 0.0, 1.0, True),
    "long": (1, 16384, 16, 128, 0.0, 1.0, True),
    "WikiText-103": (64, 512, 4, 128, 0.0, 1.0, True),
    "ViT tiny": (512, 196, 6, 32, 0.0, 1.0, True),
    "D32": (64, 1024, 4, 32, 0.0, 1.0, True),
    "strong decay": (8, 2048, 16, 128, -4.0, 2.0, False),
}
LENGTHS = {f"{2**17 // b}": (b, 2**17 // b) for b in (64, 16, 4, 1)}  # 131,072 tokens, H16 D128


def commit_of() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def draw(batch, time, heads, dim, mean, spread, bound, dtype=torch.bfloat16):
    """q, f, v, do and the lower bound (or None)."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, f, v, do = (torch.randn(batch, time, heads, dim, device="cuda", generator=generator) for _ in range(4))
    gamma = 0.5 * torch.rand(heads, dim, device="cuda", generator=generator) if bound else None
    return *((x.to(dtype)) for x in (q, f * spread + mean, v, do)), gamma


def milliseconds(run, count: int = 30) -> float:
    """Median time of `run` on the device, of `count` runs after 5."""
    for _ in range(5):
        run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def peak_gib(run) -> float:
    """Device memory that `run` needs beyond what is there before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def ceilings() -> dict:
    """Copy bandwidth (read and write) and the bf16 matrix rate of this device, now."""
    a = torch.empty(2**30, dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / milliseconds(lambda: b.copy_(a), 5) / 1e9
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"copy TB/s": copy, "bf16 TFLOP/s": 2 * 8192**3 / milliseconds(lambda: m @ m, 10) / 1e9}


def limit_tuning(limit_ms: float | None) -> None:
    """Give Triton's autotuner, which fla uses, that time for each candidate in place of its own 125 ms."""
    if limit_ms is None:
        return
    from triton.runtime.autotuner import Autotuner

    bench = functools.partial(triton.testing.do_bench, warmup=3, rep=limit_ms)
    Autotuner.do_bench = property(lambda self: bench, lambda self, value: None)


def gate(batch, time, heads, dim, mean, spread, bound) -> dict:
    """Relative errors of outputs and gradients on one row and two heads of the shape; raises where one is too large."""
    q, f, v, do, gamma = draw(1, min(time, 2048), 2, dim, mean, spread, bound)

    def run(impl, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, f, v)]
        if gamma is not None:
            leaves.append(gamma.to(dtype if dtype == torch.float64 else torch.float32).requires_grad_())
        o, _ = hgrn2_scan(*leaves, impl=impl)
        return [o, *torch.autograd.grad(o, leaves, do.to(o.dtype))]

    names = ("o", "dq", "df", "dv", "d lower_bound")
    pairs = zip(names, run("triton", torch.bfloat16), run("torch", torch.float64), strict=False)
    errors = {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in pairs}
    if not all(error < TOLERANCE for error in errors.values()):
        raise SystemExit(f"the kernels are wrong, nothing is timed: {errors}")
    return errors


def ours(q, f, v, do, gamma) -> dict:
    leaves = [x.requires_grad_() for x in (q, f, v)] + ([] if gamma is None else [gamma.requires_grad_()])

    def forward():
        with torch.no_grad():
            hgrn2_scan(q, f, v, gamma, impl="triton")

    def both():
        torch.autograd.grad(hgrn2_scan(q, f, v, gamma, impl="triton")[0], leaves, do)

    return {"forward ms": milliseconds(forward), "fwd+bwd ms": milliseconds(both), "peak GiB": peak_gib(both)}


def fla(q, f, v, do, gamma) -> dict | None:
    """fla's time for the same problem with k and the fp32 log-gates precomputed; None where fla is not installed."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None
    low = 0.0 if gamma is None else gamma.detach()
    k = ((1 - low) * torch.sigmoid(-f.detach().float())).to(q.dtype)
    g = torch.nn.functional.logsigmoid(f.detach().float()) if gamma is None else torch.log1p(-k.float())
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]

    def forward():
        with torch.no_grad():
            chunk_gla(*leaves, scale=1.0)

    def both():
        torch.autograd.grad(chunk_gla(*leaves, scale=1.0)[0], leaves, do)

    return {"forward ms": milliseconds(forward), "fwd+bwd ms": milliseconds(both), "peak GiB": peak_gib(both)}


def layer(dim: int = 2048, batch: int = 8, time: int = 2048) -> dict:
    """The whole mixer, projections and norm included, forward and backward, against fla's `HGRN2Attention`."""
    from hgrn2.config import HGRN2Config
    from hgrn2.mixer import HGRN2Mixer

    config = HGRN2Config(dim=dim, depth=1, expand_ratio=128, q_act="silu", v_act=None, mixer_norm="rmsnorm")
    x = torch.randn(batch, time, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gamma = torch.rand(dim // 128, 128, device="cuda").requires_grad_()
    mixer = HGRN2Mixer(config).to("cuda", torch.bfloat16)
    result = {"ours ms": milliseconds(lambda: mixer(x, gamma)[0].backward(x.detach()))}
    try:
        from fla.layers import HGRN2Attention
    except ImportError:
        return result
    peer = HGRN2Attention(hidden_size=dim, expand_ratio=128, layer_idx=1).to("cuda", torch.bfloat16)
    low = gamma.detach().flatten()
    return result | {"fla ms": milliseconds(lambda: peer(x, lower_bound=low)[0].backward(x.detach()))}


def directions(batch, time, heads, dim, mean, spread, bound) -> dict:
    """Forward and backward of one direction and of both in one call, in ms."""
    q, f, v, do, gamma = draw(batch, time, heads, dim, mean, spread, bound)
    leaves = [x.requires_grad_() for x in (q, f, v)] + ([] if gamma is None else [gamma.requires_grad_()])

    def run(direction):
        o, _ = hgrn2_scan(q, f, v, gamma, direction=direction, impl="triton")
        torch.autograd.grad(o, leaves, do)

    return {name: milliseconds(functools.partial(run, name)) for name in ("forward", "both")}


def floor(batch, time, heads, dim, copy: float) -> tuple[float, float]:
    """Milliseconds to move the least bytes at copy speed: q f v o, and with backward q f v do dq df dv besides."""
    one = batch * time * heads * dim * 2
    return 4 * one / copy / 1e9, 11 * one / copy / 1e9


def table(result: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}, fla {result['fla']}, commit "
        f"{result['commit']}; device copy {result['ceilings']['copy TB/s']:.2f} TB/s. Times in ms.",
        "",
        "| shape | B, T, H, D | forward | floor | fla | ratio | fwd+bwd | floor | fla | ratio | peak GiB | fla |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["shapes"].items():
        mine, peer = row["ours"], row["fla"]
        cells = [name, ", ".join(map(str, row["shape"][:4]))]
        for key, low in zip(("forward ms", "fwd+bwd ms"), row["floor ms"], strict=True):
            cells += [f"{mine[key]:.3f}", f"{low:.3f}"]
            cells += [f"{peer[key]:.3f}", f"{peer[key] / mine[key]:.2f}x"] if peer else ["", ""]
        cells += [f"{mine['peak GiB']:.2f}", f"{peer['peak GiB']:.2f}" if peer else ""]
        lines.append("| " + " | ".join(cells) + " |")
    times = ", ".join(f"T {t}: {ms:.2f}" for t, ms in result["131072 tokens, H16 D128: fwd+bwd ms by T"].items())
    lines += ["", f"131,072 tokens, H16 D128, fwd+bwd ms by length: {times}."]
    times = ", ".join(f"{n} {ms['both'] / ms['forward']:.2f}x" for n, ms in result["directions"].items())
    lines += ["", f"Both directions in one call against one, fwd+bwd: {times}."]
    if "layer" in result:
        ours, fla = result["layer"]["ours ms"], result["layer"]["fla ms"]
        lines += ["", f"Mixer layer, hidden 2048, B8 T2048, fwd+bwd: {ours:.2f} ms, fla's {fla:.2f} ms."]
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(result["shapes"])
    rows = list(result["shapes"].values())
    series = {"memory floor": [r["floor ms"][1] for r in rows], "ours": [r["ours"]["fwd+bwd ms"] for r in rows]}
    if any(r["fla"] for r in rows):
        series["fla chunk_gla"] = [r["fla"]["fwd+bwd ms"] if r["fla"] else float("nan") for r in rows]
    fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, (label, values) in enumerate(series.items()):
        ax.bar([x + 0.27 * (i - 1) for x in range(len(names))], values, 0.25, label=label)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("forward + backward, ms")
    ax.set_title(f"{result['device']}, bf16")
    fig.legend(loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="our shapes only: no fla, no layer")
    parser.add_argument(
        "--peer", nargs="*", choices=SHAPES, default=list(SHAPES), help="shapes where fla is timed, too"
    )
    parser.add_argument("--no-layer", action="store_true", help="do not time the mixer layer")
    parser.add_argument("--tune-ms", type=float, help="time for each candidate of fla's autotuner (default: Triton's)")
    parser.add_argument("--commit", help="recorded as the code's version (default: asked of git)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    limit_tuning(args.tune_ms)
    fla_version = None if args.quick else version_of("flash-linear-attention")
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "commit": args.commit or commit_of(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fla": fla_version,
        "ceilings": ceilings(),
        "shapes": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, shape in SHAPES.items():
        row = {"shape": shape, "errors": gate(*shape), "floor ms": floor(*shape[:4], result["ceilings"]["copy TB/s"])}
        row["ours"] = ours(*draw(*shape))
        row["fla"] = fla(*draw(*shape)) if fla_version and name in args.peer else None
        result["shapes"][name] = row
        print(name, json.dumps(row), flush=True)
        torch.cuda.empty_cache()
        (args.out / "ops.json").write_text(json.dumps(result, indent=1) + "\n")
    result["131072 tokens, H16 D128: fwd+bwd ms by T"] = {
        name: ours(*draw(batch, time, 16, 128, 0.0, 1.0, True))["fwd+bwd ms"] for name, (batch, time) in LENGTHS.items()
    }
    result["directions"] = {name: directions(*SHAPES[name]) for name in ("1.3B LM layer", "ViT tiny")}
    (args.out / "ops.json").write_text(json.dumps(result, indent=1) + "\n")
    if not (args.quick or args.no_layer):
        result["layer"] = layer()
    (args.out / "ops.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (args.out / "ops.md").write_text(text)
    plot(result, args.out / "ops.png")
    print(text)


if __name__ == "__main__":
    main()
