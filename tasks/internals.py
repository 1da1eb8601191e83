"""What we use of Lightning beyond its public interface, all of it, in one place.

tests/test_internals.py names what a new version drops; the upper bound in pyproject.toml moves once it passes there.
"""

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def layer_sync(trainer: Trainer) -> LayerSync | None:
    """How the strategy makes batch norms synchronous, or None."""
    return getattr(trainer.strategy, "_layer_sync", None)


def set_layer_sync(trainer: Trainer, plugin: LayerSync) -> None:
    trainer.strategy._layer_sync = plugin


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """What starts the processes: torchrun, SLURM, Lightning itself."""
    return trainer._accelerator_connector.cluster_environment


def forks(trainer: Trainer) -> bool:
    """Whether ranks are forked or spawned from this process, not started anew."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def keep_signal_handlers(trainer: Trainer) -> None:
    """Lightning installs none of its own."""
    trainer._signal_connector.register_signal_handlers = _nothing


def _nothing() -> None:
    pass


def set_logged_step(trainer: Trainer, step: int) -> None:
    """The step that loggers are given."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def validates_now(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that ends."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def validates_this_epoch(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._should_check_val_epoch()


def accumulates(trainer: Trainer) -> bool:
    """Whether the batch that ends is inside an accumulation."""
    return trainer.fit_loop._should_accumulate()
