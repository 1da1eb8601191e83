"""One decoding step: the torch form and (in Triton's interpreter) the kernels, against the fp64 loop; fp32 on a CPU.

The interpreter has to be chosen before Triton is imported, so its tests run in a process of their own.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hgrn2.ops import hgrn2_step
from hgrn2.ops.decode.step import DTYPES, torch_step, triton_step
from hgrn2.ops.gates import ACTIVATIONS, triton
from hgrn2.ops.reference import recurrent_scan

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and triton is not None
DIMS = tuple(2**i for i in range(9))


def draw(batch, heads, dim, dtype=torch.float32):
    packed = torch.randn(batch, 3, heads, dim).to(dtype)
    v, q, f = packed.unbind(1)
    return q, f, v, torch.randn(batch, heads, dim, dim), 0.9 * torch.rand(heads, dim)


def check(step, q, f, v, state, gamma, q_act=None, v_act=None):
    """Errors of o and state stay at the rounding of fp32, and of q's dtype for o."""
    wide = [x.double().unsqueeze(1) for x in (q, f, v)]
    bound = None if gamma is None else gamma.double()
    want, final = recurrent_scan(*wide, bound, initial_state=state.double(), q_act=q_act, v_act=v_act)
    running = state.clone()
    o = step(q, f, v, running, gamma, q_act, v_act)
    assert o.dtype == q.dtype
    assert o.shape == q.shape
    assert (running - final).norm() <= 1e-6 * final.norm()
    assert (o - want[:, 0]).norm() <= (1e-6 + torch.finfo(q.dtype).eps) * want.norm() + 1e-30


def public_step(q, f, v, state, gamma, q_act, v_act):
    return hgrn2_step(q, f, v, state, gamma, q_act=q_act, v_act=v_act)


STEPS = {"public": public_step, "torch": torch_step} | ({"triton": triton_step} if INTERPRET else {})


if not INTERPRET and triton is not None:

    @pytest.mark.timeout(1800)  # minutes of one core, more where cores are shared
    def test_in_the_interpreter():
        env = os.environ | {"TRITON_INTERPRET": "1"}
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", STEPS)
def test_every_head_dim(name, dim):
    check(STEPS[name], *draw(2, 3, dim), "silu", "sigmoid")


@settings(max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 70), st.sampled_from(DIMS[:6]), st.sampled_from(DTYPES),
    st.sampled_from(ACTIVATIONS), st.sampled_from(ACTIVATIONS), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@pytest.mark.parametrize("name", STEPS)
def test_any_call(name, batch, heads, dim, dtype, q_act, v_act, bounded, seed):
    torch.manual_seed(seed)
    *inputs, gamma = draw(batch, heads, dim, dtype)
    check(STEPS[name], *inputs, gamma if bounded else None, q_act, v_act)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("bound", [None, 0.0, 1e-3])
def test_extreme_gates(name, bound):
    q, _, v, state, _ = draw(1, 2, 16)
    extremes = torch.tensor([100.0, -100.0, 60.0, -60.0, math.inf, -math.inf, 15.0, -15.0])
    gamma = None if bound is None else torch.full((2, 16), bound)
    check(STEPS[name], q, extremes.repeat(4).view(1, 2, 16), v, state, gamma)


@pytest.mark.parametrize("name", STEPS)
def test_a_slice_of_a_batch_of_states(name):
    states = torch.randn(2, 4, 3, 8, 8)
    untouched = states.clone()
    q, f, v, _, gamma = draw(2, 3, 8)
    STEPS[name](q, f, v, states[1, 1:3], gamma, None, None)
    changed = (states != untouched).flatten(2).any(-1)
    assert changed.tolist() == [[False] * 4, [False, True, True, False]]


def test_a_state_in_another_order():
    q, f, v, state, gamma = draw(2, 3, 8)
    twisted = state.transpose(2, 3).contiguous().transpose(2, 3)
    o = hgrn2_step(q, f, v, twisted, gamma)
    torch.testing.assert_close(o, hgrn2_step(q, f, v, state, gamma))
    torch.testing.assert_close(twisted, state)


if INTERPRET:

    def test_opcheck():
        q, f, v, state, gamma = draw(2, 3, 8)
        torch.library.opcheck(torch.ops.hgrn2.step.default, (q, f, v, state, gamma, 1, 2))

    def test_compiles_without_a_break():
        q, f, v, state, gamma = draw(2, 3, 8)

        def model(q, f, v, state):
            return triton_step(q, f, v, state, gamma, "silu", None) * 2

        other = state.clone()
        o = torch.compile(model, fullgraph=True, backend="aot_eager")(q, f, v, state)
        assert torch.equal(o, model(q, f, v, other))
        assert torch.equal(state, other)
