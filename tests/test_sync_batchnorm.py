"""`sync_batchnorm` of Lightning's Trainer with our masked batch norm."""

import torch
from lightning import Trainer, seed_everything
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hgrn2 import HGRN2Config
from hgrn2.layers import MaskedBatchNorm, convert_sync_batchnorm
from tasks.lra.module import LRATask
from tasks.optim import OptimConfig


def test_conversion_keeps_masked_norms_and_converts_others():
    model = nn.ModuleDict({"ours": nn.Sequential(MaskedBatchNorm(4, 1e-5)), "theirs": nn.BatchNorm1d(4)})
    ours, keys = model["ours"][0], list(model.state_dict())
    assert convert_sync_batchnorm(model) is model
    assert model["ours"][0] is ours
    assert ours.sync
    assert type(model["theirs"]) is nn.SyncBatchNorm
    assert list(model.state_dict()) == keys
    assert type(convert_sync_batchnorm(nn.BatchNorm1d(4))) is nn.SyncBatchNorm


def one_step(folder, **options) -> tuple[LRATask, list]:
    """The task after a step on padded rows of T = dim tokens, and its batch norms during that step."""
    norms = []

    class Watch(LRATask):
        def on_train_batch_end(self, *_):
            norms.extend((type(m), m.sync) for m in self.modules() if isinstance(m, _BatchNorm))

    seed_everything(0)
    size = dict(dim=16, depth=2, expand_ratio=2, glu_width=16)
    backbone = HGRN2Config(**size, scan="bidirectional", norm="batchnorm", mixer_norm="rmsnorm", final_norm="rmsnorm")
    task = Watch(backbone, OptimConfig(schedule="constant"), vocab_size=17, num_classes=10)
    batch = {"tokens": torch.randint(2, 17, (8, 16)), "lengths": torch.arange(9, 17), "label": torch.arange(8)}
    rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(rows, batch_size=8))
    return task, norms


def test_trainer_sync_batchnorm(tmp_path):
    """torch's own conversion takes tokens for channels here, and fails at nothing."""
    plain, norms = one_step(tmp_path)
    assert set(norms) == {(MaskedBatchNorm, False)}
    converted, norms = one_step(tmp_path, sync_batchnorm=True)
    assert set(norms) == {(MaskedBatchNorm, True)}
    for (name, want), got in zip(plain.state_dict().items(), converted.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
    # as configured again, for what comes after the fit
    assert not any(m.sync for m in converted.modules() if isinstance(m, MaskedBatchNorm))
