"""Every option of Lightning's Trainer works on our modules and data, or is refused in words.

A new version of Lightning with an option that is not in `TABLE` fails here: find out what it does to us first.
"""

import csv
import hashlib
import inspect
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from in_process import VISION, fit_once, refused, run
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import AsyncCheckpointIO, DoublePrecision, TorchSyncBatchNorm

from hgrn2.config import ConfigError
from tasks.cli.settings import check_trainer

# option -> the tests that know it; those without a file are in this one
TABLE = {
    "accelerator": ["test_refused_by_lightning", "test_cli.py::test_every_demo_runs"],
    "strategy": [
        "test_changes_nothing",
        "test_refused_by_lightning",
        "test_ddp.py::test_two_ranks_train_and_evaluate_as_one",
    ],
    "devices": ["test_refused_by_lightning", "test_ddp.py::test_two_ranks_train_and_evaluate_as_one"],
    "num_nodes": ["test_refused_by_lightning"],
    "precision": ["test_precision", "test_refused", "test_refused_by_lightning"],
    "logger": ["test_logger"],
    "callbacks": ["test_refused_callbacks", "test_resume.py::test_kill_9_and_resume"],
    "fast_dev_run": ["test_fast_dev_run", "test_refused"],
    "max_epochs": ["test_length", "test_refused"],
    "min_epochs": ["test_refused", "test_refused_by_the_epochs_length"],
    "max_steps": ["test_length", "test_refused"],
    "min_steps": ["test_min_steps_outlast_an_early_stop", "test_refused"],
    "max_time": ["test_max_time", "test_refused"],
    "limit_train_batches": ["test_length", "test_refused"],
    "limit_val_batches": ["test_validations", "test_no_validation_is_said"],
    "limit_test_batches": ["test_limited_evaluation", "test_refused"],
    "limit_predict_batches": ["test_limited_evaluation", "test_refused"],
    "overfit_batches": [
        "test_overfit_batches",
        "test_overfit_a_fraction",
        "test_refused",
        "test_refused_by_the_epochs_length",
    ],
    "val_check_interval": ["test_validations", "test_validation_by_time", "test_refused", "test_no_validation_is_said"],
    "check_val_every_n_epoch": ["test_validations", "test_refused"],
    "num_sanity_val_steps": ["test_changes_nothing", "test_refused"],
    "log_every_n_steps": ["test_log_every_n_steps", "test_a_run_that_logs_no_step_says_so", "test_refused"],
    "enable_checkpointing": ["test_enable_checkpointing"],
    "enable_progress_bar": ["test_changes_nothing"],
    "enable_model_summary": ["test_changes_nothing"],
    "accumulate_grad_batches": ["test_accumulation", "test_refused", "test_refused_by_the_epochs_length"],
    "gradient_clip_val": ["test_clipping", "test_refused"],
    "gradient_clip_algorithm": ["test_clipping", "test_refused", "test_refused_by_lightning"],
    "deterministic": ["test_switches", "test_changes_nothing"],
    "benchmark": ["test_switches", "test_changes_nothing"],
    "inference_mode": ["test_switches", "test_changes_nothing"],
    "use_distributed_sampler": ["test_changes_nothing"],
    "profiler": ["test_profiler", "test_refusals.py::test_a_report_that_cannot_be_written"],
    "detect_anomaly": ["test_switches", "test_changes_nothing"],
    "barebones": ["test_refused"],
    "plugins": ["test_refused_plugins", "test_changes_nothing", "test_refusals.py::test_before_the_first_step"],
    "sync_batchnorm": ["test_sync_batchnorm.py::test_trainer_sync_batchnorm"],
    "reload_dataloaders_every_n_epochs": ["test_changes_nothing", "test_refused_by_lightning"],
    "default_root_dir": ["test_refused"],
    "enable_autolog_hparams": ["test_changes_nothing"],
    "model_registry": ["test_refused"],
}
DEFAULTS = {name: option.default for name, option in inspect.signature(Trainer).parameters.items()}


class Probe(Callback):
    """What a run did, kept on the class: the command line makes the object."""

    seen: ClassVar[dict[str, list]] = defaultdict(list)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        self.seen["switches"].append(
            {
                "deterministic": "warn" if warns else deterministic,
                "benchmark": torch.backends.cudnn.benchmark,
                "detect_anomaly": torch.is_anomaly_enabled(),
            }
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen["loss"].append(outputs["loss"].item())
        self.seen["samples"].append(hashlib.md5(batch["image"].float().numpy().tobytes()).hexdigest())
        self.seen["step"].append(trainer.global_step)
        self.seen["grad"] = [p.grad for p in pl_module.parameters()]
        self.seen["dtype"] = [p.dtype for p in pl_module.parameters()]

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            self.seen["validated"].append(len(self.seen["loss"]))
            self.seen["inference_mode"].append(torch.is_inference_mode_enabled())

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen["tested"].append(args[-1])

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen["predicted"].append(args[-1])


PROBE = "trainer.callbacks+={class_path: test_trainer_options.Probe}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*argv: str) -> dict[str, list]:
    Probe.seen.clear()
    run(*VISION, "trainer.max_steps=7", *argv, PROBE)
    return dict(Probe.seen)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Seven steps of 256 samples, five an epoch, without any option."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        return fit()


def the_run(folder: Path) -> Path:
    (made,) = folder.glob("runs/vision/*")
    return made


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_every_option():
    assert set(TABLE) == set(DEFAULTS)


@pytest.mark.parametrize("option", TABLE)
def test_the_tables_tests_exist_and_name_the_option(option):
    for name in TABLE[option]:
        file, _, function = name.rpartition("::")
        text = (Path(__file__).parent / (file or __file__)).read_text()
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), name
        if not file:
            assert option in text.split("# -- refused", 2)[2], option


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "command", "fragment"),
    [
        ({"limit_train_batches": 0}, "fit", "limit_train_batches=0 leaves nothing to train on"),
        ({"limit_val_batches": 0}, "validate", "limit_val_batches=0 leaves nothing to validate"),
        ({"limit_test_batches": 0.0}, "test", "limit_test_batches=0 leaves nothing to test"),
        ({"limit_predict_batches": 0}, "predict", "limit_predict_batches=0 leaves nothing to predict"),
        ({"max_steps": 0}, "fit", "max_steps=0"),
        ({"max_steps": -2}, "fit", "max_steps=-2 must be at least -1"),
        ({"max_epochs": 0}, "fit", "max_epochs=0"),
        ({"max_time": "00:00:00:00"}, "fit", "max_time=00:00:00:00"),
        ({"max_time": {"seconds": 0}}, "fit", "max_time="),
        ({"min_steps": 9, "max_steps": 8}, "fit", "min_steps=9 exceeds trainer.max_steps=8"),
        ({"min_epochs": 9, "max_epochs": 8}, "fit", "min_epochs=9 exceeds trainer.max_epochs=8"),
        ({"min_steps": -1}, "fit", "min_steps=-1 must be at least 0"),
        ({"min_epochs": -1}, "fit", "min_epochs=-1 must be at least 0"),
        ({"val_check_interval": 0}, "fit", "val_check_interval=0 must be positive"),
        ({"val_check_interval": 0.0}, "fit", "val_check_interval=0.0 must be positive"),
        ({"val_check_interval": "00:00:00:00"}, "fit", "val_check_interval=00:00:00:00 must be positive"),
        ({"check_val_every_n_epoch": 0}, "fit", "check_val_every_n_epoch=0 must be at least 1"),
        ({"num_sanity_val_steps": -2}, "fit", "num_sanity_val_steps=-2 must be at least -1"),
        ({"log_every_n_steps": -1}, "fit", "log_every_n_steps=-1 must be at least 0"),
        ({"accumulate_grad_batches": 0}, "fit", "accumulate_grad_batches=0 must be at least 1"),
        ({"gradient_clip_val": -1.0}, "fit", "gradient_clip_val=-1.0 must be at least 0"),
        ({"gradient_clip_algorithm": "value"}, "fit", "gradient_clip_algorithm=value clips nothing"),
        ({"overfit_batches": 2, "limit_train_batches": 3}, "fit", "exclude each other"),
        ({"precision": "16-true"}, "fit", "precision=16-true"),
        ({"barebones": True}, "fit", "barebones=true keeps neither checkpoints nor metrics"),
        ({"default_root_dir": "there"}, "fit", "run_root"),
        ({"model_registry": "name"}, "test", "model_registry=name"),
    ],
)
def test_refused(settings, command, fragment):
    with pytest.raises(ConfigError, match=re.escape(fragment)) as refusal:
        check_trainer(command, DEFAULTS | settings, resumes=False)
    assert "object at" not in str(refusal.value)
    assert str(refusal.value).count("trainer.") <= 5


def test_all_defaults_pass_and_all_problems_are_named_at_once():
    for command in ("fit", "validate", "test", "predict"):
        check_trainer(command, DEFAULTS, resumes=False)
    check_trainer("test", DEFAULTS | {"precision": "16-true", "max_steps": 0}, resumes=True)  # not of a test
    with pytest.raises(ConfigError, match=r"max_steps=0.*max_epochs=0"):
        check_trainer("fit", DEFAULTS | {"max_steps": 0, "max_epochs": 0}, resumes=False)


@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder", "StochasticWeightAveraging"])
def test_refused_callbacks(name, folder, capsys):
    """They change what the run's record says, or what a resume repeats."""
    more = ["trainer.callbacks.swa_lrs=0.1"] if "Averaging" in name else []
    assert f"trainer.callbacks={name}: " in refused(capsys, *VISION, f"trainer.callbacks={name}", *more)


@pytest.mark.parametrize("plugin", [AsyncCheckpointIO(), TorchSyncBatchNorm(), DoublePrecision()])
def test_refused_plugins(plugin):
    name = type(plugin).__name__
    with pytest.raises(ConfigError, match=rf"^trainer.plugins={name}: [^<]*$"):  # no object's repr
        check_trainer("fit", DEFAULTS | {"plugins": [LightningEnvironment(), plugin], "precision": "32-true"}, False)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["trainer.devices=0"], "devices"),
        (["trainer.strategy=dp"], "dp"),
        (["trainer.strategy=ddp_fork"], "use ddp"),
        (["trainer.strategy=fsdp"], "requires a GPU accelerator"),
        (["trainer.strategy=deepspeed"], "deepspeed"),
        (["trainer.accelerator=tpu"], "torch_xla"),
        (["trainer.accelerator=hpu"], "hpu"),
        (["trainer.num_nodes=0"], "num_nodes"),
        (["trainer.num_nodes=2"], "trainer.num_nodes=2"),
        (["trainer.precision=transformer-engine"], "transformer_engine"),
        (["trainer.precision=16-mixed"], "precision=16-mixed cannot run on the CPU"),
        (["trainer.gradient_clip_algorithm=x", "trainer.gradient_clip_val=1"], "x"),
        (["trainer.reload_dataloaders_every_n_epochs=-1"], "-1"),
        (["trainer.barebones=true"], "barebones"),
        (["trainer.limit_train_batches=0"], "limit_train_batches=0"),
    ],
)
def test_refused_by_lightning(argv, fragment, folder, capsys):
    """Or by us, by way of the command line: one line, and nothing stays."""
    assert fragment in refused(capsys, *VISION, *argv)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["trainer.accumulate_grad_batches=6"], "accumulate_grad_batches=6 exceeds the 5 batches of an epoch"),
        (["trainer.overfit_batches=2", "trainer.accumulate_grad_batches=3"], "exceeds the 2 batches"),
        (["trainer.min_epochs=3"], "trainer.min_epochs=3 is more than trainer.max_steps=7 reaches"),
        (["trainer.overfit_batches=0.1"], "trainer.overfit_batches=0.1 of 1 validation batches is none"),
    ],
)
def test_refused_by_the_epochs_length(argv, fragment, folder, capsys):
    assert fragment in refused(capsys, *VISION, "trainer.max_steps=7", *argv)
    assert not (folder / "runs").exists()


def test_a_callback_that_waits_for_a_validation(folder, capsys):
    stop = ["trainer.callbacks=EarlyStopping", "trainer.callbacks.monitor=val/loss"]
    assert "leaves no validation" in refused(capsys, *VISION, *stop, "trainer.limit_val_batches=0")
    assert not (folder / "runs").exists()


# -- works -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["trainer.strategy=ddp", "trainer.use_distributed_sampler=true"],
        [
            "trainer.num_sanity_val_steps=0",
            "trainer.benchmark=true",
            "trainer.inference_mode=false",
            "trainer.plugins=LightningEnvironment",
            "trainer.enable_autolog_hparams=false",
        ],
        [
            "trainer.num_sanity_val_steps=-1",
            "trainer.enable_progress_bar=true",
            "trainer.enable_model_summary=true",
            "trainer.deterministic=true",
            "trainer.detect_anomaly=true",
        ],
        ["trainer.reload_dataloaders_every_n_epochs=1"],
        ["trainer.reload_dataloaders_every_n_epochs=1", "data.num_workers=1"],
    ],
)
def test_changes_nothing(argv, plain):
    other = fit(*argv)
    assert other["samples"] == plain["samples"]
    assert other["loss"] == plain["loss"]
    assert other["validated"] == plain["validated"] == [2, 4, 6]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("bf16-mixed", None)]
)
def test_precision(precision, dtype, plain):
    other = fit(f"trainer.precision={precision}", "trainer.enable_model_summary=true")
    assert set(other["dtype"]) == {dtype or torch.float32}
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5 if dtype == torch.float64 else 0.02)
    assert other["loss"] != plain["loss"]


def test_logger(folder, capsys):
    """The command line's own logger= names the loggers; Trainer's can only agree."""
    assert "write logger=NAME" in refused(capsys, *VISION, "trainer.logger=true")
    assert "contradict" in refused(capsys, *VISION, "trainer.logger=false")
    fit("logger=none", "trainer.logger=false", "trainer.max_steps=2")
    assert not (the_run(folder) / "csv").exists()


def test_fast_dev_run(folder, capsys):
    assert fit("trainer.fast_dev_run=3")["step"] == [1, 2, 3]
    assert not (folder / "runs").exists()
    made = fit_once(folder)
    assert "fast_dev_run=3 starts at step 0" in refused(capsys, *VISION, f"run={made}", "trainer.fast_dev_run=3")


@pytest.mark.parametrize(
    ("argv", "batches"),
    [
        (["trainer.max_steps=3"], 3),
        (["trainer.max_steps=-1", "trainer.max_epochs=2"], 10),
        (["trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.limit_train_batches=3"], 6),
        (["trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.limit_train_batches=0.4"], 4),
        (["trainer.max_steps=4", "trainer.max_epochs=2"], 4),
    ],
)
def test_length(argv, batches, folder):
    assert fit(*argv)["step"] == list(range(1, batches + 1))
    checkpoint = torch.load(the_run(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == batches


def test_min_steps_outlast_an_early_stop():
    stop = "trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: val/loss, divergence_threshold: -1.0}}"
    assert fit(stop)["step"] == [1, 2]  # at the first validation
    assert fit(stop, "trainer.min_steps=5")["step"] == [1, 2, 3, 4, 5]


def test_max_time(folder):
    began = time.monotonic()
    seen = fit("trainer.max_time=00:00:00:01", "trainer.max_steps=100000", "trainer.val_check_interval=50000")
    assert time.monotonic() - began < 30
    checkpoint = torch.load(the_run(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == len(seen["step"]) < 100000


def test_overfit_batches(plain, folder, capsys):
    argv = ["trainer.overfit_batches=2", "data.eval_batch_size=64", "model.optim.schedule=constant"]
    straight = fit(*argv)
    assert straight["samples"] == [plain["samples"][position % 2] for position in range(7)]
    fit(*argv, "trainer.max_steps=3", "run_root=stopped")  # within the second epoch
    (stopped,) = (folder / "stopped" / "vision").iterdir()
    assert fit(f"run={stopped}", *argv)["loss"] == straight["loss"][3:]
    message = refused(capsys, *VISION, f"run={stopped}", "trainer.overfit_batches=3", "trainer.max_steps=9")
    assert "trainer.overfit_batches=3 (there: 2)" in message


def test_overfit_a_fraction(plain):
    half = fit("trainer.overfit_batches=0.5", "data.eval_batch_size=64")  # of five batches
    assert half["samples"] == [plain["samples"][position % 2] for position in range(7)]


@pytest.mark.parametrize(
    ("argv", "validated"),
    [
        (["trainer.val_check_interval=3"], [3, 6]),
        (["trainer.val_check_interval=3", "trainer.limit_val_batches=2"], [3, 3, 6, 6]),
        (["trainer.val_check_interval=3", "trainer.limit_val_batches=0.7"], [3, 3, 6, 6]),
        (["trainer.val_check_interval=3", "trainer.check_val_every_n_epoch=1"], [3]),
        (["trainer.val_check_interval=0.4", "trainer.check_val_every_n_epoch=1"], [2, 4, 7]),
        (["trainer.val_check_interval=1.0", "trainer.check_val_every_n_epoch=2", "trainer.max_steps=10"], [10]),
    ],
)
def test_validations(argv, validated):
    assert fit("data.eval_batch_size=60", *argv)["validated"] == validated  # three batches of the 143 samples


def test_validation_by_time(monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr("lightning.pytorch.loops.training_epoch_loop.time.monotonic", lambda: next(clock))
    seen = fit("trainer.val_check_interval=00:00:00:05")
    assert len(seen["step"]) == 7
    assert 1 <= len(seen["validated"]) < 7


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["trainer.limit_val_batches=0"], "no validation (trainer.limit_val_batches=0): no best.ckpt"),
        (["trainer.val_check_interval=8"], "the run ends with batch 7, before its first validation"),
        (["trainer.val_check_interval=1.0", "trainer.check_val_every_n_epoch=2"], "before its first validation"),
        (["trainer.accumulate_grad_batches=2"], "does not divide the 5 batches of an epoch: its last step takes 1"),
    ],
)
def test_no_validation_is_said(argv, fragment, folder, caplog):
    seen = fit(*argv)
    assert fragment in caplog.text
    if "accumulate" not in argv[0]:
        assert "validated" not in seen
        assert not (the_run(folder) / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("command", ["test", "predict"])
def test_limited_evaluation(command, folder):
    made = fit_once(folder)
    Probe.seen.clear()
    limit = f"trainer.limit_{command}_batches=2"
    run(command, "task=vision", *VISION[1:5], f"run={made}", "data.eval_batch_size=100", limit, PROBE)
    assert len(Probe.seen[f"{command}ed"]) == 2
    if command == "predict":
        assert [len(batch["preds"]) for batch in torch.load(made / "predictions.pt", weights_only=True)] == [100, 100]


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [2, 5]), (0, [])])
def test_log_every_n_steps(every, steps, folder):
    fit(f"trainer.log_every_n_steps={every}")
    with (the_run(folder) / "csv" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")] == steps


def test_a_run_that_logs_no_step_says_so(folder, caplog, recwarn):
    fit("trainer.log_every_n_steps=8")
    assert "trainer.log_every_n_steps=8: none of the steps 1 to 7 is logged" in caplog.text
    assert not [warning for warning in recwarn if "logging interval" in str(warning.message)]  # an epoch's, Lightning's
    caplog.clear()
    fit(f"run={the_run(folder)}", "trainer.log_every_n_steps=8", "trainer.max_steps=8")
    assert "is logged" not in caplog.text


def test_enable_checkpointing(plain, folder):
    assert fit("trainer.enable_checkpointing=false")["loss"] == plain["loss"]
    assert not (the_run(folder) / "checkpoints").exists()


def test_accumulation():
    assert fit("trainer.accumulate_grad_batches=2")["step"][:7] == [0, 1, 1, 2, 3, 3, 4]  # and a shorter one at 5


@pytest.mark.parametrize(
    ("argv", "measure"),
    [
        (["trainer.gradient_clip_val=1e-3"], lambda grads: torch.nn.utils.get_total_norm(grads)),
        (
            ["trainer.gradient_clip_val=1e-3", "trainer.gradient_clip_algorithm=value"],
            lambda grads: max(grad.abs().max() for grad in grads),
        ),
    ],
)
def test_clipping(argv, measure, plain):
    assert float(measure(plain["grad"])) > 2e-3
    assert float(measure(fit(*argv)["grad"])) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("switch", "value"),
    [("deterministic", True), ("deterministic", "warn"), ("benchmark", True), ("detect_anomaly", True)],
)
def test_switches(switch, value, plain):
    assert all(step[switch] is False for step in plain["switches"])
    seen = fit(f"trainer.{switch}={str(value).lower()}", "trainer.max_steps=2")
    assert all(step[switch] == value for step in seen["switches"])


@pytest.mark.parametrize("mode", [True, False])
def test_inference_mode(mode, folder):
    """Of evaluation alone; validations within a fit run without gradients."""
    made = fit_once(folder)
    Probe.seen.clear()
    run("validate", "task=vision", *VISION[1:5], f"run={made}", f"trainer.inference_mode={mode}".lower(), PROBE)
    assert Probe.seen["inference_mode"] == [mode]


@pytest.mark.parametrize("profiler", ["SimpleProfiler", "AdvancedProfiler"])
def test_profiler(profiler, folder):
    """Its report goes into the run folder."""
    fit(f"trainer.profiler={profiler}", "trainer.profiler.filename=report", "trainer.max_steps=2")
    (report,) = the_run(folder).rglob("fit-report*.txt")
    assert "training_step" in report.read_text()
