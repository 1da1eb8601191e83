"""Parameter groups and schedules."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from hgrn2 import ConfigError
from tasks import TASKS
from tasks.optim import OptimConfig, build_optimizer, learning_rate, may_fuse, parameter_groups


@pytest.mark.parametrize("domain", TASKS)
def test_every_parameter_is_in_one_group(domain):
    task, data = TASKS[domain]
    task = task(**data().info)
    decayed, plain = parameter_groups(task, OptimConfig())
    assert sum(len(g["params"]) for g in (decayed, plain)) == len(list(task.parameters()))
    names = {p: name for name, p in task.named_parameters()}
    assert {names[p].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert all(p.dim() >= 2 for p in decayed["params"])
    undecayed = {names[p] for p in plain["params"]}
    assert any("lower_bounds" in name for name in undecayed)
    if domain != "vision":
        assert "model.embed.weight" in undecayed


def test_weight_decay_on_everything():
    task = TASKS["lm"][0](vocab_size=256)
    config = OptimConfig(decay_embeddings=True, decay_lower_bounds=True, decay_norms_and_biases=True)
    (group,) = parameter_groups(task, config)
    assert len(group["params"]) == len(list(task.parameters()))


class Scaled(nn.Linear):
    """Parameters that no rule names, of one dimension and of two."""

    def __init__(self):
        super().__init__(4, 4)
        self.scale, self.head_scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))
        self.weight_g = nn.Parameter(torch.ones(4, 1))
        self.extra_weight = nn.Parameter(torch.ones(4))


def test_what_no_rule_names_is_not_decayed():
    module = nn.ModuleDict({"own": Scaled(), "conv": nn.Conv2d(3, 4, 2), "attention": nn.MultiheadAttention(4, 2)})
    groups = parameter_groups(module, OptimConfig(weight_decay=0.3))
    names = {p: name for name, p in module.named_parameters()}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {names[p] for p in groups[0]["params"]} == {
        "own.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip


def test_frozen_and_shared_parameters():
    module = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "norm": nn.LayerNorm(4)})
    module["head"].weight = module["embed"].weight
    module["norm"].bias.requires_grad_(False)
    groups = parameter_groups(module, OptimConfig())
    assert [len(g["params"]) for g in groups] == [2]


def test_schedules():
    cosine = OptimConfig(lr=1.0, warmup_steps=10, warmup_lr=0.1, min_lr=0.2, total_steps=110)
    assert learning_rate(0, cosine) == 0.1
    assert learning_rate(5, cosine) == pytest.approx(0.55)
    assert learning_rate(10, cosine) == 1.0
    assert learning_rate(60, cosine) == pytest.approx(0.6)
    assert learning_rate(110, cosine) == pytest.approx(0.2)
    assert learning_rate(500, cosine) == pytest.approx(0.2)
    root = OptimConfig(lr=1.0, warmup_steps=100, schedule="inverse_sqrt")
    assert learning_rate(100, root) == 1.0
    assert learning_rate(400, root) == pytest.approx(0.5)
    assert learning_rate(400, OptimConfig(lr=1.0, warmup_steps=100, schedule="constant")) == 1.0


def test_the_optimizer_follows_the_schedule():
    config = OptimConfig(lr=0.5, warmup_steps=4, total_steps=8)
    built = build_optimizer(nn.Linear(2, 2), config, fused=False)
    rates = []
    for _ in range(8):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([learning_rate(step, config) for step in range(8)])
    assert math.isclose(rates[4], 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"schedule": "linear"}, "schedule='linear' is unknown; valid: cosine"),
        ({"warmup_steps": 1000, "total_steps": 1000}, "total_steps=1000 must exceed warmup_steps=1000"),
    ],
    ids=str,
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**changes)


def test_adamw_sees_the_betas():
    built = build_optimizer(nn.Linear(2, 2), OptimConfig(betas=[0.8, 0.95], schedule="constant"), fused=False)
    assert built["optimizer"].defaults["betas"] == (0.8, 0.95)
    assert isinstance(built["optimizer"], torch.optim.AdamW)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_fused_only_where_nothing_else_unscales(precision):
    assert may_fuse("cuda", precision) == (precision != "16-mixed")
    assert not may_fuse("cpu", precision)


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 1e-3), ("value", 1e-4), ("norm", None)])
def test_clipping(algorithm, limit, tmp_path):
    """Gradients reach the optimiser clipped; the logged norm is theirs before."""
    seen = {}

    class Look(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                seen["norm"] = torch.nn.utils.get_total_norm(grads).item()
                seen["value"] = max(g.abs().max().item() for g in grads)

    data = TASKS["vision"][1](batch_size=64)
    task = TASKS["vision"][0](**data.info)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=2, limit_val_batches=0, log_every_n_steps=1,
        gradient_clip_val=limit, gradient_clip_algorithm=algorithm, callbacks=[Look()], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(task, data)
    logged = trainer.callback_metrics["train/grad_norm"].item()
    assert logged > 0.01
    if limit is not None:
        assert 0.9 * limit < seen[algorithm] <= 1.001 * limit


def test_lightning_refuses_to_clip_the_shards_of_fsdp_by_their_own_norm(monkeypatch):
    """The norm of one rank's shards is not the gradients'."""
    task = TASKS["vision"][0](num_classes=2, img_size=8, in_chans=1)
    strategy = FSDPStrategy(precision_plugin=FSDPPrecision("32-true"))
    monkeypatch.setattr(
        type(task),
        "trainer",
        SimpleNamespace(
            strategy=strategy,
            precision_plugin=strategy.precision_plugin,
            gradient_clip_val=1.0,
            gradient_clip_algorithm=None,
        ),
    )
    with pytest.raises(MisconfigurationException, match="gradient_clip_algorithm='norm'"):
        task.configure_gradient_clipping(torch.optim.SGD(task.parameters(), 0.1), 1.0, "norm")
