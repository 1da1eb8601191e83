"""The fused decoding steps in Triton's interpreter (on a GPU: ops/test_step_gpu.py) against the modules' plain code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.timeout(1800)  # minutes of one core, more where cores are shared
    def test_in_the_interpreter():
        env = os.environ | {"TRITON_INTERPRET": "1"}
        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    from hgrn2 import HGRN2Config, HGRN2Mixer
    from hgrn2.backbone import Block
    from hgrn2.fused import fused_glu_step, fused_mixer_step
    from hgrn2.ops.decode.matvec import matvec
    from hgrn2.ops.gates import ACTIVATIONS, activate

    @pytest.mark.parametrize("norm", [None, "rms", "layer"])
    @pytest.mark.parametrize("shape", [(1, 64, 128), (2, 100, 45), (2, 768, 5), (1, 1, 3), (2, 5000, 7)])
    def test_matvec_and_norms(shape, norm):
        rows, width, out = shape
        x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
        g, shift = torch.randn(2, width)
        normed = {
            None: x,
            "rms": F.rms_norm(x, (width,), g, 1e-5),
            "layer": F.layer_norm(x, (width,), g, shift, 1e-5),
        }[norm]
        parts = None if norm is None else (norm, g, shift if norm == "layer" else None, 1e-5)
        y = matvec(x, weight, bias, norm=parts)
        torch.testing.assert_close(y, F.linear(normed, weight, bias), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_gating_and_residual(act):
        x, weight, residual = torch.randn(2, 80), torch.randn(9, 40), torch.randn(2, 9)
        want = F.linear(activate(x[:, :40], act) * x[:, 40:], weight) + residual
        torch.testing.assert_close(matvec(x, weight, gate=act, residual=residual), want, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simple_rmsnorm"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("glu_act", ["silu", None])
    def test_block(norm, bias, glu_act):
        config = HGRN2Config(
            dim=48, expand_ratio=16, norm=norm, mixer_norm=norm, bias=bias, glu_bias=bias, glu_act=glu_act
        )
        block = Block(config).eval()
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
        x, state, gamma = torch.randn(2, 48), torch.randn(2, 3, 16, 16), 0.5 * torch.rand(3, 16)
        other = state.clone()
        want = block.step(x, state, gamma)
        y = fused_mixer_step(block.mixer, x, other, gamma, block.mixer_norm)
        got = fused_glu_step(block.glu, y, block.glu_norm)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, state, rtol=1e-4, atol=1e-5)

    def test_mixer_alone():
        mixer = HGRN2Mixer(HGRN2Config(dim=32, expand_ratio=8)).requires_grad_(False)
        x, state = torch.randn(1, 32), torch.randn(1, 4, 8, 8)
        other = state.clone()
        torch.testing.assert_close(fused_mixer_step(mixer, x, other, None), mixer.step(x, state), rtol=1e-4, atol=1e-5)
