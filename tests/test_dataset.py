"""Data sets: samples as pure functions, fingerprints, a person's own, image folders; the model follows the data."""

import random
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from hgrn2 import ConfigError, HGRN2Config
from tasks.base import ClassificationTask, plain
from tasks.cli import arguments, compose
from tasks.data import Loader, TaskData
from tasks.dataset import KeyedDataset, SampleKey
from tasks.lm.python_source import Blocks
from tasks.lra.data import LRAData
from tasks.lra.listops import ListOps
from tasks.optim import OptimConfig
from tasks.vision.data import VisionData
from tasks.vision.digits import Digits
from tasks.vision.module import VisionTask


class Noise:
    """Draws from every generator that a library may draw from."""

    def __init__(self, split="train"):
        self.info = {"num_classes": 2}

    def __len__(self):
        return 9

    def get(self, index, rng):
        own = -1.0 if rng is None else rng.random()
        drawn = [own, torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return {"x": torch.tensor(drawn, dtype=torch.float64), "label": 0}

    def fingerprint(self):
        return "noise"


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_every_generator_is_a_function_of_seed_epoch_and_index(train):
    data = KeyedDataset(Noise(), seed=1, train=train)
    first = data[SampleKey(2, 5)]["x"]
    torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    batch = data.__getitems__([SampleKey(2, 4), SampleKey(2, 5), SampleKey(3, 5)])
    assert torch.equal(batch[1]["x"], first)
    others = [batch[0]["x"], batch[2]["x"], KeyedDataset(Noise(), seed=2, train=train)[SampleKey(2, 5)]["x"]]
    drawn = slice(0 if train else 1, None)
    assert all(bool((other[drawn] != first[drawn]).all()) for other in others)


def test_samples_leave_the_global_generators_alone():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    expected = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    KeyedDataset(Noise(), 0, True).__getitems__([SampleKey(0, i) for i in range(4)])
    assert draw() == expected


def test_workers_draw_the_same():
    keys = [[SampleKey(0, i), SampleKey(1, i)] for i in range(6)]

    def load(workers):
        data = TaskData("test_dataset:Noise")
        return [batch["x"] for batch in Loader(KeyedDataset(Noise(), 0, True), keys, data.collate, workers, False)]

    assert all(torch.equal(a, b) for a, b in zip(load(0), load(2), strict=True))


def test_fingerprints_are_those_of_the_first_checkpoints():
    """They were digests of the contents, which runs of that time must find again."""
    assert [Digits("train", augment=augment).fingerprint() for augment in (True, False)] == [
        "77fca0808fe09af4",
        "7db45d971ef31d71",
    ]
    assert ListOps("train", train_size=20, eval_size=5, max_depth=3).fingerprint() == "f3c17668f8bb7ea5"
    assert Blocks(np.arange(100, dtype=np.uint8), seq_len=7, drop_short=True).fingerprint() == "68a949a3b904d392"


# -- a person's own --------------------------------------------------------------------------------------------------

OWN = """
class Own:
    info = {"num_classes": 3, "vocab_size": 5}

    def __init__(self, split, size: int = 40, grow=1.5):
        self.size = size if split == "train" else 10

    def __len__(self):
        return self.size

    def get(self, index, rng):
        return {"tokens": [index % 5] * (1 + index % 4), "label": index % 3}

    def fingerprint(self):
        return f"own {self.size}"


class Half:
    def __len__(self):
        return 1


class Whole(Own):
    def __init__(self):
        pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `own_data` in the current folder."""
    (tmp_path / "own_data.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_data", None)
    return tmp_path


def test_a_data_set_of_ones_own(own):
    data = LRAData("own_data:Own", options={"size": 7}, batch_size=7)
    assert data.info == {"num_classes": 3, "vocab_size": 5}
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (7, 4)
    assert data.decode([1, 2]) == "1 2"
    assert data.majority("train") is None
    assert data.state_dict()["training_data"] == "own 7"


@pytest.mark.parametrize(
    ("name", "options", "path", "message"),
    [
        ("own_data:Owm", {}, None, r"data.dataset=own_data:Owm: module own_data has no class Owm; classes there: Own"),
        ("own_date:Own", {}, None, r"data.dataset=own_date:Own: no module own_date in the current folder"),
        ("own_data:Half", {}, None, r"data.dataset=own_data:Half: a data set needs get, fingerprint"),
        ("own_data:Whole", {}, None, r"data.dataset=own_data:Whole: its constructor must take split"),
        ("own_data", {}, None, r"data.dataset=own_data is unknown; valid: listops, package.module:Class"),
        ("own_data:Own", {"sise": 7}, None, r"data.sise: data.dataset=own_data:Own has no such option.*size, grow"),
        ("own_data:Own", {}, ".", r"data.path=.: data.dataset=own_data:Own reads no files"),
        ("listops", {"max_dept": 7}, None, r"data.max_dept: data.dataset=listops has no such option"),
    ],
)
def test_mistakes_about_a_data_set_are_named(own, name, options, path, message):
    with pytest.raises(ConfigError, match=message):
        LRAData(name, path=path, options=options)


def test_a_bug_in_a_persons_module_is_no_mistake_in_the_settings(own):
    (own / "own_broken.py").write_text("import module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        LRAData("own_broken:Own")


# -- image folders ---------------------------------------------------------------------------------------------------


def draw(path, colour, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two classes, red and blue."""
    for split, count in (("train", 4), ("val", 2)):
        for name in ("red", "blue"):
            for i in range(count):
                draw(tmp_path / split / name / f"{i}.png", name)
    return tmp_path


def test_an_image_folder(folder):
    data = VisionData("imagefolder", path=str(folder), options={"img_size": 8}, batch_size=8)
    assert data.info == {"num_classes": 2, "img_size": 8, "in_chans": 3}
    assert data.class_names(2) == ["blue", "red"]
    data.setup()
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [8, 4, 4]  # no test/: val/ again
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 8, 8)
    blue = batch["image"][batch["label"] == 0]
    torch.testing.assert_close(blue[:, 2], torch.ones_like(blue[:, 2]))
    torch.testing.assert_close(blue[:, 0], -torch.ones_like(blue[:, 0]))
    grey = VisionData("imagefolder", path=str(folder), options={"img_size": 8, "in_chans": 1})
    assert grey.split("val").get(0, None)["image"].shape == (1, 8, 8)


def test_a_folder_of_classes_is_split_by_names(tmp_path):
    for i in range(60):
        draw(tmp_path / "ab"[i % 2] / f"{i}.jpg", (i, i, i))
    data = VisionData("imagefolder", path=str(tmp_path))
    files = {name: {file for file, _ in data.split(name).samples} for name in ("train", "val", "test")}
    assert sum(map(len, files.values())) == len(set.union(*files.values())) == 60
    assert 36 <= len(files["train"]) <= 58


def test_image_augmentation_is_pure(folder):
    rng = np.random.default_rng(0)
    for path in folder.glob("train/*/*.png"):
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)
    data = VisionData("imagefolder", path=str(folder), options={"img_size": 8})
    train = KeyedDataset(data.split("train"), seed=0, train=True)
    first = train[SampleKey(0, 1)]["image"]
    assert torch.equal(train[SampleKey(0, 1)]["image"], first)
    assert any(not torch.equal(train[SampleKey(epoch, 1)]["image"], first) for epoch in range(1, 5))
    still = VisionData("imagefolder", path=str(folder), options={"img_size": 8, "augment": False}).split("train")
    assert torch.equal(still.get(1, rng)["image"], still.get(1, None)["image"])


def test_image_folders_are_known_by_names_and_sizes(folder):
    def fingerprint(**options):
        return VisionData("imagefolder", path=str(folder), options=options).split("train").fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    prints = [first, fingerprint(img_size=32), fingerprint(in_chans=1), fingerprint(augment=False)]
    draw(folder / "train" / "red" / "0.png", "red", size=(99, 99))
    prints.append(fingerprint())
    (folder / "train" / "red" / "0.png").rename(folder / "train" / "red" / "9.png")
    prints.append(fingerprint())
    assert len(set(prints)) == len(prints)


def test_mistakes_about_an_image_folder_are_named(folder, tmp_path_factory):
    def make(split="train", path=folder, **options):
        return VisionData("imagefolder", path=path and str(path), options=options).split(split)

    empty = tmp_path_factory.mktemp("empty")
    for message, wrong in {
        "data.path: a value is missing": {"path": None},
        "data.in_chans=2 must be 3": {"in_chans": 2},
        "data.img_size=0": {"img_size": 0},
        f"data.path={empty}": {"path": empty},
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            make(**wrong)
        assert "\n" not in str(error.value)
    draw(folder / "val" / "green" / "0.png", "green")
    with pytest.raises(ConfigError, match="val/ and train/ differ in classes: green"):
        make("val")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line(folder, workers):
    (folder / "train" / "red" / "1.png").write_bytes(b"no image")
    data = VisionData("imagefolder", path=str(folder), batch_size=8, num_workers=workers)
    with pytest.raises(ConfigError, match=r"red/1.png: cannot be read as an image") as error:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(error.value)


# -- the model follows -----------------------------------------------------------------------------------------------


def test_a_model_needs_what_the_data_knows():
    with pytest.raises(ConfigError, match=r"model.img_size is null .*; model.in_chans is null"):
        VisionTask(num_classes=10)
    with pytest.raises(ConfigError, match=r"model.num_classes is null"):
        VisionTask(img_size=8, in_chans=1)


class Inner(ClassificationTask):
    """A task of one's own, with an argument that its parents don't know."""

    def __init__(
        self,
        backbone: HGRN2Config = HGRN2Config(dim=8, depth=1, expand_ratio=4),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
        num_classes: int | None = None,
        width: object = 3,
    ):
        super().__init__(backbone, optim, seed, num_classes, 0.0)
        self.model = torch.nn.Linear(width, num_classes)


def test_every_argument_is_a_hyper_parameter(tmp_path):
    from lightning import Trainer

    task = Inner(num_classes=4, width=5)
    assert task.hparams["width"] == 5
    assert task.hparams["backbone"]["dim"] == 8
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Inner.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.hparams == task.hparams
    assert loaded.backbone_config == task.backbone_config


def test_what_no_checkpoint_can_keep_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.width: a Linear cannot be kept in checkpoints"):
        Inner(num_classes=4, width=torch.nn.Linear(1, 1))
    assert plain({"a": (tmp_path, OptimConfig().betas)}, "x") == {"a": (str(tmp_path), (0.9, 0.99))}


def test_old_names_are_read_with_a_line():
    said = []
    config = {"data": {"source": "x", "seed": 1}, "model": {"source": 2}}
    assert compose.renamed(config, said.append) == {"data": {"path": "x", "seed": 1}, "model": {"source": 2}}
    tokens = ["data.task=listops", "--data.source", "a", "--data.task=b", "data.path=c", "data.sources=d"]
    new = ["data.dataset=listops", "--data.path", "a", "--data.dataset=b", "data.path=c", "data.sources=d"]
    assert arguments.renamed(tokens, said.append) == new
    assert said[:2] == ["data.source is called data.path now", "data.task is called data.dataset now"]
    assert arguments.peek(new, "data.dataset") == "b"
    assert arguments.peek(new, "data.path") == "c"
    assert arguments.peek(new, "data.size") is None
