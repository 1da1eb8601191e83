"""Every private attribute of Lightning and jsonargparse that we use is still there: one test each, which names it."""

import inspect

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import csv_logs
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, launchers
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from tasks import internals
from tasks.cli import parser_internals


@pytest.fixture(scope="module")
def trainer():
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.mark.parametrize(
    "path",
    [
        "_accelerator_connector.cluster_environment",
        "_signal_connector.register_signal_handlers",
        "fit_loop._data_fetcher",
        "fit_loop._should_accumulate",
        "fit_loop.epoch_loop._batches_that_stepped",
        "fit_loop.epoch_loop._should_check_val_epoch",
        "fit_loop.epoch_loop._should_check_val_fx",
    ],
)
def test_the_trainer_has(path, trainer):
    owner = trainer
    for name in path.split("."):
        assert hasattr(owner, name), f"Trainer.{path}"
        owner = getattr(owner, name)


def test_lightning_reads_what_we_set():
    assert "_batches_that_stepped" in inspect.getsource(_TrainingEpochLoop)
    assert "register_signal_handlers" in dir(_SignalConnector)
    assert list(inspect.signature(_TrainingEpochLoop._should_check_val_fx).parameters) == ["self", "data_fetcher"]
    assert not list(inspect.signature(_FitLoop._should_accumulate).parameters)[1:]
    assert "_check_log_dir_exists" in dir(csv_logs.ExperimentWriter)  # overridden
    assert "self._layer_sync" in inspect.getsource(ParallelStrategy) + inspect.getsource(DDPStrategy)
    assert inspect.isclass(launchers._MultiProcessingLauncher)


def test_layer_sync(trainer):
    plugin = TorchSyncBatchNorm()
    internals.set_layer_sync(trainer, plugin)
    assert internals.layer_sync(trainer) is plugin
    assert not internals.forks(trainer)
    assert internals.cluster_environment(trainer).world_size() == 1


def test_argument_parsers_list_their_actions_with_types():
    parser = ArgumentParser()
    parser.add_argument("--width", type=int | None)
    hints = {action.dest: parser_internals.type_hint(action) for action in parser_internals.actions(parser)}
    assert hints["width"] == int | None
