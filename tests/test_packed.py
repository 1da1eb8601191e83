"""Rows of real tokens only, all in one, give what padded rows give."""

import pytest
import torch
from lightning import Trainer

from hgrn2 import HGRN2Config
from tasks.lra.data import LRAData
from tasks.lra.model import SequenceClassifier
from tasks.lra.module import LRATask


def results(model, tokens, lengths, places=None):
    model.zero_grad()
    logits = model(tokens, lengths, places)
    logits.square().sum().backward()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return [logits.detach(), *(p.grad for p in model.parameters())], buffers


@pytest.mark.parametrize("norm", ["batchnorm", "layernorm"])
@pytest.mark.parametrize("positions", ["sinusoid", None])
@pytest.mark.parametrize("scan", ["bidirectional", "causal"])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics(norm, positions, scan, training):
    config = HGRN2Config(dim=16, depth=2, expand_ratio=4, glu_width=16, scan=scan, norm=norm, final_norm=norm)
    lengths = torch.tensor([9, 1, 17, 4], dtype=torch.int32)
    tokens = torch.randint(7, (4, 17))
    places = (torch.arange(17) < lengths[:, None]).flatten().nonzero().squeeze(1)
    models = [SequenceClassifier(config, 7, 3, positions).double().train(training) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    (padded, statistics), (packed, same_statistics) = (
        results(models[0], tokens, lengths),
        results(models[1], tokens, lengths, places),
    )
    for a, b in zip(padded, packed, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(statistics, same_statistics)


def test_data_says_where_real_tokens_lie():
    limits = dict(train_size=40, eval_size=10, max_length=20)
    batches = []
    for packed in (True, False):
        data = LRAData(options=limits, packed=packed, batch_size=8)
        data.setup()
        batches.append(next(iter(data.train_dataloader())))
    assert "places" not in batches[1]
    batch = batches[0]
    assert len(batch["places"]) == batch["real_tokens"] == batch["lengths"].sum()
    real = batch["tokens"].flatten()[batch["places"]]
    assert real.tolist() == [
        t for row, n in zip(batch["tokens"], batch["lengths"], strict=True) for t in row[:n].tolist()
    ]


def test_a_fit_packs(tmp_path):
    config = HGRN2Config(dim=16, depth=2, expand_ratio=4, glu_width=16, scan="bidirectional", norm="batchnorm")
    losses = []
    for packed in (None, True):
        torch.manual_seed(0)
        task = LRATask(config, vocab_size=17, num_classes=10)
        data = LRAData(options=dict(train_size=64, eval_size=20, max_length=20), packed=packed, batch_size=16)
        trainer = Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, max_epochs=1, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(task, data)
        assert data.packed is bool(packed)  # null: as on CUDA only
        losses.append(trainer.callback_metrics["val/loss"])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
