"""The tasks through Lightning's Trainer: loss at init, one batch learnt, metrics, TensorBoard, checkpoints."""

import contextlib
import csv
import gc
import json
import math
import os
import re
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hgrn2 import ConfigError, HGRN2Backbone, HGRN2Config
from tasks.base import MeanLoss
from tasks.callbacks import (
    GarbageCollection,
    MemoryHorizon,
    ModelParts,
    Progress,
    SampleViewer,
    Startup,
    ThroughputLogger,
    describe,
)
from tasks.lm.data import LMData
from tasks.lm.module import LMTask
from tasks.lra.data import LRAData
from tasks.lra.module import LRATask
from tasks.optim import OptimConfig
from tasks.seeds import Stream, seed_globals, sequence
from tasks.vision.data import VisionData
from tasks.vision.module import VisionTask

DOMAINS = ["lm", "vision", "lra"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small folder of Python files, the same on every machine."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(150):
        body = "".join(f"def function_{i}_{j}(x):\n    return x * {i} + {j}\n\n\n" for j in range(4))
        (root / f"module_{i}.py").write_text(body)
    return root


@pytest.fixture
def make(corpus):
    """domain -> (task, data), tiny."""

    def build(domain, seed=0, **options):
        seed_everything(seed)
        size = {"dim": 32, "depth": 2, "expand_ratio": 8, "glu_width": 32, **options.pop("backbone", {})}
        optim = OptimConfig(lr=5e-3, schedule="constant", **options.pop("optim", {}))
        if domain == "lm":
            data = LMData(path=str(corpus), options={"seq_len": 32}, batch_size=8, seed=seed, **options)
            return LMTask(HGRN2Config(**size), optim, sample_tokens=8, seed=seed, **data.info), data
        size |= {"scan": "bidirectional", "lower_bound": "exclusive"}
        if domain == "vision":
            data = VisionData(batch_size=32, seed=seed, **options)
            return VisionTask(HGRN2Config(**size), optim, seed=seed, **data.info), data
        small = {"train_size": 256, "eval_size": 50, "max_length": 20}
        data = LRAData(options=small, batch_size=16, seed=seed, **options)
        return LRATask(HGRN2Config(**size), optim, seed=seed, **data.info), data

    return build


def quiet_trainer(root, **options) -> Trainer:
    defaults = dict(
        default_root_dir=root, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=1,
    )  # fmt: skip
    return Trainer(**(defaults | options))


@pytest.mark.parametrize(("domain", "classes"), [("lm", 256), ("vision", 10), ("lra", 10)])
def test_the_loss_starts_at_the_logarithm_of_the_classes(make, domain, classes):
    task, data = make(domain)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    # a tied embedding starts with logits of unit size: half a nat above, at most
    assert task.compute(batch)["loss"].item() == pytest.approx(math.log(classes), abs=0.7)


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_batch_is_learnt(make, domain):
    task, data = make(domain)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    first = task.compute(batch)["loss"].item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = task.compute(batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


@pytest.mark.parametrize("domain", DOMAINS)
def test_fast_dev_run(make, domain, tmp_path):
    task, data = make(domain)
    quiet_trainer(tmp_path, fast_dev_run=True).fit(task, data)
    results = quiet_trainer(tmp_path, fast_dev_run=True).test(task, data, verbose=False)[0]
    assert {"test/loss"} < results.keys()
    quiet_trainer(tmp_path, fast_dev_run=True).predict(task, data)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_model_summary_counts_flops(make, domain):
    task, data = make(domain)
    for module in task.modules():
        if isinstance(module, HGRN2Backbone):
            module.compile_blocks(backend="aot_eager")  # which the summary has to leave alone
    data.setup()
    task.example_input_array = data.example()
    summary = ModelSummary(task, max_depth=2)
    products = 2 * sum(p.numel() for p in task.model.backbone.parameters() if p.dim() == 2)
    assert summary.flop_counts["model.backbone"]
    assert sum(summary.flop_counts["model.backbone"].values()) > products  # one token's, at least


def test_the_model_summary_shows_flops(make, tmp_path, capsys):
    task, data = make("vision")
    limits = dict(max_steps=1, limit_val_batches=0, enable_model_summary=True, callbacks=[ModelParts()])
    quiet_trainer(tmp_path, **limits).fit(task, data)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "HGRN2Backbone" in line)
    assert re.search(r"[1-9][\d.]* [KMG]$", row.strip())


@pytest.mark.parametrize(
    ("domain", "key", "value"),
    [
        ("vision", "num_classes", 5), ("vision", "img_size", 16), ("vision", "in_chans", 3),
        ("lra", "vocab_size", 5), ("lra", "num_classes", 9), ("lm", "vocab_size", 100),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_the_data_is_refused(make, domain, key, value, tmp_path):
    task, data = make(domain)
    misfit = type(task)(task.backbone_config, task.optim_config, **{**data.info, key: value})
    with pytest.raises(ConfigError, match=rf"model.{key}={value} does not fit .* needs {key}="):
        quiet_trainer(tmp_path, fast_dev_run=True).fit(misfit, data)


def test_triton_on_a_cpu_is_refused(make, tmp_path):
    task, data = make("vision", backbone={"impl": "triton"})
    with pytest.raises(ConfigError, match=r"model.backbone.impl=triton .* trainer.accelerator=cpu"):
        quiet_trainer(tmp_path, fast_dev_run=True).fit(task, data)


def test_bad_model_values_are_named(make):
    with pytest.raises(ConfigError, match=r"model.seed=-1"):
        VisionTask(seed=-1, num_classes=10, img_size=8, in_chans=1)
    with pytest.raises(ConfigError, match=r"model.temperature=-1"):
        LMTask(temperature=-1, vocab_size=256)


def test_a_nan_in_evaluation_shows(make, tmp_path):
    task, data = make("vision", eval_batch_size=100)
    compute = task.compute

    def broken_on_the_last_batch(batch):
        out = compute(batch)
        return out | {"sum": out["sum"] * (math.nan if len(batch["label"]) < 100 else 1)}

    task.compute = broken_on_the_last_batch
    results = quiet_trainer(tmp_path).test(task, data, verbose=False)[0]
    assert math.isnan(results["test/loss"])


def test_the_mean_loss_of_a_bf16_model_is_of_all_batches():
    (losses,) = torch.nn.ModuleList([MeanLoss()]).to(torch.bfloat16)
    for _ in range(2):  # also after a reset
        for _ in range(1000):
            losses.update(torch.tensor(3.0), torch.tensor(1))
        assert losses.compute() == 3
        losses.reset()


def test_logging_can_be_switched_off(make, tmp_path):
    task, data = make("vision")
    options = dict(max_steps=2, log_every_n_steps=0, limit_val_batches=0)
    trainer = quiet_trainer(tmp_path, callbacks=[ThroughputLogger()], **options)
    trainer.fit(task, data)
    assert trainer.global_step == 2


def test_throughput_leaves_validation_out(make, tmp_path):
    """A slow sanity check and slow validations do not show in samples a second."""

    class Slow(Callback):
        def on_validation_batch_start(self, *args, **kwargs):
            time.sleep(0.5)

    class Rates(Callback):
        values = []

        def on_train_batch_end(self, trainer, *args):
            self.values.append(trainer.callback_metrics.get("train/samples_per_s"))

    task, data = make("vision")
    rates = Rates()
    start = time.perf_counter()
    trainer = quiet_trainer(
        tmp_path, max_steps=8, limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None,
        callbacks=[ThroughputLogger(), Slow(), rates],
    )  # fmt: skip
    trainer.fit(task, data)
    training = time.perf_counter() - start - 5 * 0.5
    rates = [float(rate) for rate in rates.values if rate is not None]
    # no window is faster than the whole run's arithmetic allows by far, none as slow as a validation
    assert rates
    assert max(rates) < 100 * 8 * 32 / training
    assert min(rates) > 32 / 0.5


def expected_evaluation(task, data, split):
    """Loss and accuracy over a whole split, sample by sample."""
    losses, counts, hits = 0.0, 0, 0
    for i in range(len(data.splits[split])):
        batch = data.collate([{**data.splits[split].get(i, None), "valid": True}])
        with torch.no_grad():
            out = task.eval().compute(batch)
        losses, counts = losses + out["sum"].item(), counts + out["count"].item()
        hits += (out["preds"] == out["target"]).sum().item() if "preds" in out else 0
    return losses / counts, hits / counts


@pytest.mark.parametrize("domain", DOMAINS)
def test_evaluation_is_that_of_every_sample(make, domain, tmp_path):
    task, data = make(domain, eval_batch_size=7)
    results = quiet_trainer(tmp_path).test(task, data, verbose=False)[0]
    loss, accuracy = expected_evaluation(task, data, "test")
    assert results["test/loss"] == pytest.approx(loss, rel=1e-4)
    if domain == "lm":
        assert results["test/ppl"] == pytest.approx(math.exp(loss), rel=1e-3)
        assert results["test/bpb"] == pytest.approx(loss / math.log(2), rel=1e-4)
    else:
        assert results["test/acc"] == pytest.approx(accuracy)
    if domain == "lra":
        assert results["test/majority_acc"] == pytest.approx(data.majority("test"))


@pytest.mark.parametrize("domain", DOMAINS)
def test_tensorboard_shows_what_it_promises(make, domain, tmp_path):
    task, data = make(domain)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callbacks = [MemoryHorizon(), SampleViewer(count=8), ThroughputLogger(), Startup()]
    trainer = quiet_trainer(
        tmp_path, logger=logger, callbacks=callbacks, max_steps=4, limit_val_batches=2, num_sanity_val_steps=0,
        val_check_interval=2, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(task, data)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    wanted = {"train/loss", "train/grad_norm", "train/tokens_per_s", "train/samples_per_s", "val/loss"}
    wanted |= {"val/ppl", "val/bpb"} if domain == "lm" else {"val/acc", "train/acc"}
    wanted |= {"val/majority_acc"} if domain == "lra" else set()
    assert wanted <= set(tags["scalars"])
    assert {f"viz/memory_horizon/layer_{i:02d}_log10_tokens" for i in range(2)} <= set(tags["histograms"])
    assert "viz/memory_horizon/map" in tags["images"]
    samples = {"lm": "viz/generated", "vision": "viz/held-out images", "lra": "viz/expressions"}[domain]
    assert any(samples in tag for tag in (*tags["images"], *tags["tensors"]))


def test_the_memory_horizon_is_the_half_life(make, tmp_path):
    """With gates set by hand the recorded half-life is ln 2 / -log lam."""
    task, _ = make("lra")
    with torch.no_grad():
        mixer = task.model.backbone.blocks[0].mixer
        mixer.in_proj.weight.zero_()
        mixer.in_proj.bias.fill_(2.0)
    recorder = MemoryHorizon()
    record = recorder._recorder(0)
    record(mixer, (torch.randn(2, 5, 32), None), {"lengths": torch.tensor([5, 3])})
    want = math.log(2) / -math.log(1 / (1 + math.exp(-2.0)))
    assert recorder._half_lives[0].shape == (4, 8 * 8)  # heads, real tokens x channels
    torch.testing.assert_close(recorder._half_lives[0], torch.full((4, 64), want))


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_collected_between_steps_and_the_collector_comes_back(fails, make, tmp_path):
    task, data = make("vision")
    seen, frozen = [], gc.get_freeze_count()

    class Look(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(gc.isenabled())
            if fails and len(seen) == 3:
                raise SystemExit(1)

    trainer = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[GarbageCollection(2), Look()])
    with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
        trainer.fit(task, data)
    assert seen == [False] * 3
    assert gc.isenabled()
    assert gc.get_freeze_count() in (0, frozen)


def test_no_step_but_those_that_log_reads_a_value(make, tmp_path, monkeypatch):
    """On a device each would wait."""
    from lightning.pytorch.trainer.connectors.logger_connector import result

    task, data = make("vision")
    read = []
    kept = result.convert_tensors_to_scalars
    monkeypatch.setattr(result, "convert_tensors_to_scalars", lambda value: read.append(value) or kept(value))
    callbacks = [ThroughputLogger(), Progress()]
    options = dict(max_steps=9, log_every_n_steps=4, limit_val_batches=0, enable_progress_bar=True)
    quiet_trainer(tmp_path, callbacks=callbacks, logger=CSVLogger(tmp_path), **options).fit(task, data)
    assert read == []
    steps = [row["step"] for row in csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()) if row["train/loss"]]
    assert steps == ["3", "7"]


def test_the_startup_line_says_what_runs(make, tmp_path):
    task, _ = make("vision")
    line = describe(quiet_trainer(tmp_path), task)
    assert "cpu" in line
    assert "32-true" in line
    assert "parameters" in line
    assert "hgrn2_scan runs torch" in line


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_checkpoint_loads_without_its_config(make, domain, tmp_path):
    task, data = make(domain)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(task).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.backbone_config == task.backbone_config
    assert loaded.optim_config == task.optim_config
    for (name, a), b in zip(task.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_step_seeds_differ_by_position_and_rank():
    draws = set()
    for position in range(3):
        for rank in range(2):
            seed_globals(sequence(0, Stream.STEP, position, rank), devices=True)
            draws.add(torch.rand(1).item())
    assert len(draws) == 6
    seed_globals(sequence(0, Stream.STEP, 2, 1), devices=True)
    assert torch.rand(1).item() in draws


def test_generation_continues_the_prompt(make):
    task, _ = make("lm")
    prompt = torch.tensor([[10, 20, 30]])
    model = task.model.eval()
    greedy = model.generate(prompt, 6, 0.0, torch.Generator())
    assert greedy.shape == (1, 9)
    tokens = prompt
    for _ in range(6):  # the slow way: the whole prefix again for each token
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy, tokens)
    drawn = [model.generate(prompt, 6, 1.0, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_generation_leaves_training_randomness_alone(make):
    task, _ = make("lm")
    before = torch.get_rng_state()
    task.model.generate(torch.tensor([[1]]), 4, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


GOLDEN = Path(__file__).parent / "fixtures" / "golden_losses.json"


class Losses(Callback):
    """The training loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_first_losses_are_the_golden_ones(make, domain, tmp_path):
    """A change here changes what every user's run computes: regenerate with WRITE_GOLDEN=1 only if that is meant."""
    task, data = make(domain, backbone={"dropout": 0.1})
    losses = Losses()
    quiet_trainer(tmp_path, callbacks=[losses], max_steps=25, limit_val_batches=0).fit(task, data)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {domain: [round(x, 6) for x in losses.values]}, indent=1) + "\n")
    assert losses.values == pytest.approx(json.loads(GOLDEN.read_text())[domain], rel=2e-3)
    assert min(losses.values[-5:]) < losses.values[0]
