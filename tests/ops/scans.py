"""What the tests of the kernels share: plain torch to compare with, gradients by name, Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from hgrn2.ops.gates import activate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("q", "f", "v", "lower_bound", "initial_state")


def in_the_interpreter(file: str) -> None:
    """Run a file's tests in a process of their own: the interpreter has to be chosen before Triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def plain_scan(q, f, v, lower_bound, *, initial_state, q_act=None, v_act=None):
    """Plain torch in the test's dtype: the loop with q, k, v and o in it, gates and state in fp32."""
    q, v = activate(q, q_act), activate(v, v_act)
    lam = lower_bound + (1 - lower_bound) * torch.sigmoid(f.float())
    k = ((1 - lower_bound) * torch.sigmoid(-f.float())).to(f.dtype).float()
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = lam[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :].float()
        outputs.append((q[:, t, :, None, :].float() @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(q.dtype), state


def run(scan, inputs, d_out, d_final, dtype, **options):
    wide = torch.float64 if dtype == torch.float64 else FP32
    leaves = [x.detach().to(dtype if i < 3 else wide).requires_grad_() for i, x in enumerate(inputs)]
    states = {} if d_final is None else {"initial_state": leaves[4]}
    o, final = scan(*leaves[:4], **states, **options)
    if d_final is None:
        o.backward(d_out.to(o.dtype))
        return {"o": o} | {f"d {n}": x.grad for n, x in zip(NAMES[:4], leaves[:4], strict=True)}
    torch.autograd.backward([o, final], [d_out.to(o.dtype), d_final.to(final.dtype)])
    return {"o": o, "final_state": final} | {f"d {n}": x.grad for n, x in zip(NAMES, leaves, strict=True)}


def errors(got, want):
    return {name: ((got[name].double() - x).norm() / x.norm().clamp(min=1e-30)).item() for name, x in want.items()}
