"""The chunked torch form of the scan against the plain loop, on the CPU; writes benchmarks/results/cpu_scan.json.

    python benchmarks/cpu_scan.py

Times count only after the two agree (outputs and gradients, against the fp64 loop). Medians of alternating runs.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from hgrn2.ops import hgrn2_scan

B, T, H, D = 4, 2048, 4, 64
THREADS, RUNS, TOLERANCE = 2, 7, 1e-5
OUT = Path(__file__).parent / "results" / "cpu_scan.json"


def scan(impl: str, dtype: torch.dtype, backward: bool, inputs: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Seconds and results of one forward, or forward and backward."""
    leaves = [x.to(dtype).requires_grad_(backward) for x in inputs]
    start = time.perf_counter()
    o, _ = hgrn2_scan(*leaves, impl=impl)
    grads = torch.autograd.grad(o.square().sum(), leaves) if backward else ()
    return time.perf_counter() - start, [o, *grads]


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    inputs = [torch.randn(B, T, H, D) for _ in range(3)]
    _, truth = scan("reference", torch.float64, True, inputs)
    _, got = scan("torch", torch.float32, True, inputs)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True)]
    if max(errors) > TOLERANCE:
        sys.exit(f"the torch form is wrong, nothing is timed: relative errors {errors}")
    medians = {}
    for backward in (False, True):
        times = {"torch": [], "reference": []}
        for run in range(RUNS + 1):
            for impl in times:
                seconds, _ = scan(impl, torch.float32, backward, inputs)
                if run:  # the first warms up
                    times[impl].append(seconds * 1e3)
        medians["forward_backward_ms" if backward else "forward_ms"] = {
            impl: round(statistics.median(values), 1) for impl, values in times.items()
        }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "device": f"{platform.processor() or platform.machine()} CPU, {THREADS} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "command": "python benchmarks/cpu_scan.py",
        "shape": {"B": B, "T": T, "H": H, "D": D, "dtype": "float32"},
        "relative_errors": dict(zip(["o", "dq", "df", "dv"], errors, strict=True)),
        **medians,
        "speedup": {key[:-3]: round(m["reference"] / m["torch"], 1) for key, m in medians.items()},
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
