"""Two processes on gloo: synchronised batch norm against the batch norm of all rows in one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hgrn2.layers import MaskedBatchNorm

REPO = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.ddp


def _normalise(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    case = torch.load(f"{folder}/case.pt")
    norm = MaskedBatchNorm(6, eps=1e-5, sync=True)
    norm.load_state_dict(case["norm"])
    x = case["x"][rank::world].clone().requires_grad_()
    y = norm(x, case["pad"][rank::world])
    (y * case["weight"][rank::world]).masked_fill(case["pad"][rank::world], 0).sum().backward()
    torch.save({"y": y.detach(), "dx": x.grad, "norm": norm.state_dict()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_synchronised_batch_norm_is_batch_norm_of_all_ranks(tmp_path):
    x, weight = 2 + 3 * torch.randn(6, 5, 6), torch.randn(6, 5, 6)
    pad = (torch.arange(5) >= torch.tensor([5, 1, 3, 2, 5, 4])[:, None]).unsqueeze(-1)
    plain = nn.BatchNorm1d(6)
    with torch.no_grad():
        plain.weight.copy_(torch.rand(6) + 0.5)
    torch.save({"x": x, "weight": weight, "pad": pad, "norm": plain.state_dict()}, tmp_path / "case.pt")
    torch.multiprocessing.spawn(_normalise, args=(2, str(tmp_path)), nprocs=2)

    leaf, real = x.clone().requires_grad_(), ~pad.squeeze(-1)
    want = plain(leaf[real])
    (want * weight[real]).sum().backward()
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for rank, part in enumerate(parts):
        rows = real[rank::2]
        spread = torch.zeros(6, 5, 6).masked_scatter(~pad, want.detach())
        torch.testing.assert_close(part["y"][rows], spread[rank::2][rows])
        torch.testing.assert_close(part["dx"][rows], leaf.grad[rank::2][rows])
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(part["norm"][key], value)


def test_two_ranks_train_and_evaluate_as_one(tmp_path):
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(REPO / "train.py"), *arguments],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    # 180 samples a rank: the last batch of rank 1 is one filler
    tiny = ["task=vision", "model.backbone.depth=1", "trainer.accelerator=cpu", "data.eval_batch_size=179"]
    fit = ["trainer.max_steps=3", "model.optim.warmup_steps=0", "trainer.limit_val_batches=0"]
    run(*tiny, *fit, "model.backbone.dropout=0", "trainer.devices=2", "trainer.strategy=ddp", "run_root=two")
    run(*tiny, *fit, "model.backbone.dropout=0")
    weights = [
        torch.load(next(tmp_path.glob(f"{root}/vision/*/checkpoints/last.ckpt")), weights_only=True)["state_dict"]
        for root in ("runs", "two")
    ]
    for name, value in weights[0].items():  # the same batches and the mean of the gradients: the same training
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    one, two = (
        dict(re.findall(r"(test/\w+)\s+│\s+([\d.]+)", run("test", *tiny, "ckpt_path=last", *more)))
        for more in ([], ["trainer.devices=2", "trainer.strategy=ddp"])
    )
    assert {"test/acc", "test/loss"} <= one.keys()
    for name, value in one.items():
        assert float(two[name]) == pytest.approx(float(value), rel=1e-5)
