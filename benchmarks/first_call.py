"""Seconds of a process's first call on one GPU: compilation, self-test, forward and backward, with empty caches.

    python benchmarks/first_call.py [--cases NAME ...]

Every case is a process of its own; importing torch and starting CUDA are not counted. Writes results/first_call.json.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import triton
from ops import OUT, commit_of

# name: (dtype, head dim, direction, with lengths); heads and batch do not matter
CASES = {
    "D128": ("bfloat16", 128, "forward", False),
    "D128, both directions, lengths": ("bfloat16", 128, "both", True),
    "D64, both directions, lengths": ("bfloat16", 64, "both", True),
    "D32, two dimensions": ("bfloat16", 32, "2d", False),
    "D128, fp32": ("float32", 128, "forward", False),
    "D8, both directions, lengths": ("bfloat16", 8, "both", True),
    "D8, both directions, fp32": ("float32", 8, "both", False),
    "D2, two dimensions": ("bfloat16", 2, "2d", False),
}


def measure(case: str) -> None:
    """Print the seconds of the first call."""
    from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d

    dtype, dim, direction, lengths = CASES[case]
    size = (2, 16, 16) if direction == "2d" else (2, 256)
    leaves = list(torch.randn(3, *size, 4, dim, device="cuda").to(getattr(torch, dtype)).unbind())
    leaves = [x.detach().requires_grad_() for x in (*leaves, 0.5 * torch.rand(4, dim, device="cuda"))]
    lengths = torch.tensor([256, 77], device="cuda") if lengths else None
    torch.cuda.synchronize()
    start = time.perf_counter()
    if direction == "2d":
        o = hgrn2_scan_2d(*leaves, q_act="silu", impl="triton")
    else:
        o, _ = hgrn2_scan(*leaves, direction=direction, lengths=lengths, q_act="silu", impl="triton")
    o.float().sum().backward()
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


def first_call(case: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TRITON_CACHE_DIR": f"{folder}/triton", "HGRN2_CACHE_DIR": f"{folder}/hgrn2"}
        command = [sys.executable, __file__, "--measure", case]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="recorded as the code's version (default: asked of git)")
    parser.add_argument("--out", default=OUT)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "commit": args.commit or commit_of(),
        "device": f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": {},
    }
    for case in args.cases:
        result["seconds"][case] = round(first_call(case), 1)
        print(case, result["seconds"][case], flush=True)
        with open(f"{args.out}/first_call.json", "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
