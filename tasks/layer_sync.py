"""`trainer.sync_batchnorm=true`: the batch norms of our models synchronise themselves, others become torch's."""

from lightning import Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from hgrn2.layers import MaskedBatchNorm, convert_sync_batchnorm
from tasks.internals import layer_sync, set_layer_sync


class SyncMaskedBatchNorm(TorchSyncBatchNorm):
    """Lightning's conversion, which would turn `MaskedBatchNorm` into a norm of other dimensions, made to spare it."""

    def apply(self, model: nn.Module) -> nn.Module:
        self._set = [m for m in model.modules() if isinstance(m, MaskedBatchNorm) and not m.sync]
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        for norm in self._set:
            norm.sync = False
        return super().revert(model)


def keep_masked_norms(trainer: Trainer) -> None:
    """Where the trainer converts batch norms by torch's rules, have it convert them by ours.

    Lightning has no hook for it: strategies take the conversion from a plugin, made by `Trainer(sync_batchnorm=True)`.
    """
    if type(layer_sync(trainer)) is TorchSyncBatchNorm:
        set_layer_sync(trainer, SyncMaskedBatchNorm())
