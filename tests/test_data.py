"""Data: the order of samples, resuming at any position, evaluation without loss, splits, padding, the grammar."""

import numpy as np
import pytest
import torch

from hgrn2 import ConfigError
from tasks.data import EvalOrder, Loader, TrainOrder, epoch_order
from tasks.dataset import SPLITS, KeyedDataset, SampleKey
from tasks.lm.data import LMData
from tasks.lm.python_source import END_OF_FILE, Blocks, PythonSource, read_sources, split_of
from tasks.lra import listops
from tasks.lra.data import LRAData
from tasks.vision.data import VisionData


def listops_data(batch_size=32, **options):
    return LRAData("listops", options=options, batch_size=batch_size)


def batches(start, *, size=23, batch=4, seed=3, rank=0, world=1):
    return list(TrainOrder(size, batch, seed, rank, world, lambda: start))


def test_an_epoch_visits_each_sample_at_most_once():
    epoch = [key.index for keys in batches(0) for key in keys]
    assert len(epoch) == 20
    assert len(set(epoch)) == 20
    assert epoch != [key.index for keys in batches(5) for key in keys]  # 5 batches an epoch: the next one
    assert epoch == list(epoch_order(3, 0, 23)[:20])


def test_any_position_continues_the_same_order():
    straight = batches(0) + batches(5)
    for start in range(8):
        resumed = batches(start)
        assert resumed[: len(straight) - start] == straight[start : start + 5]


@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_overfitting_repeats_the_first_batches_wherever_it_starts(start):
    repeated = list(TrainOrder(23, 4, 3, 0, 1, lambda: start, repeat=2))
    assert repeated == [batches(0)[position % 2] for position in range(start, start + 5)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(world):
    parts = [batches(7, rank=rank, world=world) for rank in range(world)]
    joined = [[key for keys in shares for key in keys] for shares in zip(*parts, strict=True)]
    assert joined == batches(7)


@pytest.mark.parametrize("size", [1, 5, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("mixed", [True, False])
def test_evaluation_sees_every_sample_once(size, world, mixed):
    orders = [list(EvalOrder(size, 2, rank, world, mixed)) for rank in range(world)]
    assert len({len(order) for order in orders}) == 1  # the same number of steps on each rank
    assert len(orders[0]) == len(EvalOrder(size, 2, 0, world))
    seen = [key.index for order in orders for keys in order for key in keys if key.valid]
    assert sorted(seen) == list(range(size))


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    data = VisionData()
    data.setup()
    train = KeyedDataset(data.splits["train"], seed=1, train=True)
    key = SampleKey(epoch=2, index=5)
    image = train[key]["image"]
    np.random.default_rng(9).random()
    assert np.array_equal(train[key]["image"], image)
    epochs = [train[SampleKey(epoch, 5)]["image"] for epoch in range(8)]
    assert any(not np.array_equal(image, other) for other in epochs)


def test_workers_change_nothing():
    data = VisionData(batch_size=8)
    data.setup()

    def load(workers):
        order = TrainOrder(len(data.splits["train"]), 8, 0, 0, 1, lambda: 3)
        loader = Loader(KeyedDataset(data.splits["train"], 0, True), order, data.collate, workers, pin_memory=False)
        return [next(it) for it in [iter(loader)] for _ in range(4)]

    for a, b in zip(load(0), load(2), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_loading_leaves_the_global_generator_alone():
    data = VisionData()
    data.setup()
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_split():
    data = VisionData()
    data.setup()
    sizes = {split: len(samples) for split, samples in data.splits.items()}
    assert sizes == {"train": 1295, "val": 143, "test": 359}
    item = data.splits["test"].get(0, None)
    assert item["image"].shape == (1, 8, 8)
    everything = np.concatenate([samples.images for samples in data.splits.values()])
    assert len(np.unique(everything.reshape(1797, -1), axis=0)) == 1797  # no image in two splits
    normalised = np.concatenate([s.get(i, None)["image"] for s in data.splits.values() for i in range(len(s))])
    assert abs(normalised.mean()) < 0.01
    assert abs(normalised.std() - 1) < 0.01


def test_files_are_split_by_their_name():
    assert split_of("json/decoder.py") == split_of("json/decoder.py")
    shares = [split_of(f"package/module_{i}.py") for i in range(4000)]
    assert 0.88 < shares.count("train") / 4000 < 0.92
    assert 0.04 < shares.count("val") / 4000 < 0.06


def test_sources_are_read_by_name_without_tests(tmp_path):
    for name in ("b.py", "a.py", "test/t.py", "idlelib/i.py", "site-packages/s.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    joined = b"".join(read_sources(tmp_path, split).tobytes() for split in SPLITS)
    assert sorted(joined.split(bytes([END_OF_FILE]))) == [b"", b"# a.py\n", b"# b.py\n"]


def test_blocks_cover_every_target():
    tokens = np.arange(1, 24, dtype=np.uint8)
    blocks = Blocks(tokens, seq_len=5, drop_short=False)
    targets = []
    for i in range(len(blocks)):
        item = blocks.get(i, None)
        assert item["tokens"].shape == (6,)
        targets += item["tokens"][1 : 1 + item["length"]].tolist()
    assert targets == list(range(2, 24))
    assert len(Blocks(tokens, seq_len=5, drop_short=True)) == 4


def test_text_survives_encoding():
    assert PythonSource.decode(PythonSource.encode("naïve = 'ÿ'\n")) == "naïve = 'ÿ'\n"


def test_a_corpus_that_is_too_small_is_one_clear_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"bytes of Python source for the .* split.*data.path"):
        LMData(path=str(tmp_path)).prepare_data()
    with pytest.raises(ConfigError, match=r"data.path=.*missing: no such file or folder"):
        LMData(path=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"data.path=.*a.py is no folder"):
        LMData(path=str(tmp_path / "a.py")).prepare_data()


def test_expressions_have_the_value_their_tokens_say():
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens, value = listops.draw_expression(rng, max_depth=5, max_args=6)
        assert listops.evaluate(tokens) == value
        assert 0 <= value <= 9
        assert tokens[0] in listops.OPERATORS
        assert tokens.count("]") == sum(token in listops.OPERATORS for token in tokens)
        assert len(tokens) <= listops.longest(5, 6)


@pytest.mark.parametrize(
    ("text", "value"),
    [("[MAX 2 9 [MIN 4 7 ] 0 ]", 9), ("[SM 5 6 7 ]", 8), ("[MED 1 9 4 ]", 4), ("[MED 1 2 3 4 ]", 2), ("[MIN 3 8 ]", 3)],
)
def test_known_expressions(text, value):
    assert listops.evaluate(text.split()) == value


def test_expressions_depend_on_their_number_alone():
    limits = dict(max_depth=3, max_args=4, lengths=(4, 20))
    tokens, label = listops.draw_sample((1, 0, 7), drawn=set(), **limits)
    again, same = listops.draw_sample((1, 0, 7), drawn=set(), **limits)
    assert np.array_equal(tokens, again)
    assert label == same
    assert tokens[-1] == listops.EOS
    assert 4 <= len(tokens) - 1 <= 20
    assert not np.array_equal(tokens, listops.draw_sample((1, 0, 8), drawn=set(), **limits)[0])
    assert not np.array_equal(tokens, listops.draw_sample((1, 0, 7), drawn={tokens.tobytes()}, **limits)[0])


def test_no_expression_is_in_two_splits():
    data = listops_data(max_depth=2, min_length=4, max_length=7, train_size=1500, eval_size=300)
    data.setup()
    everything = [tokens.tobytes() for split in data.splits.values() for tokens in split.tokens]
    assert len(everything) == len(set(everything)) == 2100


def test_a_stage_draws_only_what_it_needs():
    whole, part = listops_data(train_size=20, eval_size=10), listops_data(train_size=20, eval_size=10)
    whole.setup()
    part.setup("test")
    assert part.splits.keys() == {"test"}
    part.setup("fit")
    assert part.splits.keys() == {"test", "train", "val"}
    for split in ("test", "val", "train"):
        for a, b in zip(whole.splits[split].tokens, part.splits[split].tokens, strict=True):
            assert np.array_equal(a, b)


def test_lengths_that_hardly_occur_are_refused(monkeypatch):
    monkeypatch.setattr(listops, "MAX_ATTEMPTS", 200)
    with pytest.raises(ConfigError, match=r"no new expression in 200 draws with data.min_length=150"):
        listops_data(train_size=1, eval_size=1, min_length=150, max_length=187).prepare_data()


def test_ragged_batches_are_padded_on_the_right():
    data = listops_data(train_size=8, eval_size=8)
    data.setup()
    items = [{**data.splits["val"].get(i, None), "valid": True} for i in range(8)]
    batch = data.collate(items)
    assert batch["tokens"].shape == (8, int(batch["lengths"].max()))
    for row, length, item in zip(batch["tokens"], batch["lengths"], items, strict=True):
        assert torch.equal(row[:length], torch.from_numpy(item["tokens"]))
        assert row[length:].eq(listops.PAD).all()
    text = data.decode(batch["tokens"][0])
    assert listops.evaluate(text.split()) == items[0]["label"]
    assert data.majority("val") == np.bincount(data.splits["val"].labels).max() / 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionData(batch_size=0), "data.batch_size=0 must be at least 1"),
        (
            lambda: VisionData(dataset="cats"),
            "data.dataset=cats is unknown; valid: digits, imagefolder, package",
        ),
        (lambda: listops_data(min_length=50, max_length=20).setup(), "data.max_length=20 .* data.min_length=50"),
        (
            lambda: listops_data(max_depth=2, max_args=3, min_length=40, max_length=80).setup(),
            "data.min_length=40 cannot be reached",
        ),
        (lambda: LMData(num_workers=-1), "data.num_workers=-1"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_batch_larger_than_the_data_is_refused():
    data = listops_data(train_size=8, eval_size=8, batch_size=9)
    data.setup()
    with pytest.raises(ConfigError, match=r"data.batch_size=9 exceeds the 8 training samples"):
        data.train_dataloader()


def test_resuming_with_other_data_is_refused():
    data = listops_data(train_size=20, eval_size=5, batch_size=4, max_args=5)
    data.setup()
    other = listops_data(train_size=20, eval_size=5, batch_size=4, max_args=4)
    other.setup()
    other.load_state_dict(data.state_dict())
    with pytest.raises(ConfigError, match=r"training data is not the checkpoint's \(data.max_args=4 .checkpoint: 5"):
        other.train_dataloader()


def test_resuming_with_other_validation_data_is_refused():
    """The best score so far would be of other samples."""
    data = listops_data(train_size=20, eval_size=5, batch_size=4)
    data.setup()
    other = listops_data(train_size=20, eval_size=5, batch_size=4)
    other.setup()
    other.splits["val"] = other.splits["test"]
    other.load_state_dict(data.state_dict())
    with pytest.raises(ConfigError, match="cannot resume: the validation data is not the checkpoint's"):
        other.train_dataloader()


def test_resuming_with_another_batch_is_refused():
    data = VisionData(batch_size=8)
    data.setup()
    state = data.state_dict()
    other = VisionData(batch_size=16)
    other.setup()
    other.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data.batch_size=16 \(checkpoint: 8\)"):
        other.train_dataloader()
