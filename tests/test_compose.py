"""Configuration files: precedence, parents, interpolations, and text that stays text."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hgrn2.config import ConfigError
from tasks.cli import compose


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A folder of shipped configurations; returns a function that writes one."""
    folder = tmp_path / "configs"
    monkeypatch.setattr(compose, "CONFIGS", folder)

    def write(name, text):
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    write("base", "a: base\nb: base\nc: base\nlist: [1, 2, 3]\n")
    write("lm", "domain: lm\nb: lm\nc: lm\nd: ${c}\n")
    write("lm/big", "parent: lm\nc: big\nlist: [4]\n")
    return write


def test_precedence_is_base_then_parents_then_task(configs):
    domain, config = compose.load_task("lm/big")
    assert domain == "lm"
    assert config == {"a": "base", "b": "lm", "c": "big", "list": [4], "d": "${c}"}


def test_interpolations_follow_overrides(configs):
    _, config = compose.load_task("lm/big")
    assert compose.resolve(config)["d"] == "big"
    assert compose.resolve(compose.merge(config, {"c": "typed"}))["d"] == "typed"


def test_names_and_own_files(configs, tmp_path, monkeypatch):
    assert compose.shipped_tasks() == ["lm", "lm/big"]
    own = tmp_path / "mine.yaml"
    own.write_text("parent: lm/big\na: mine\n")
    assert compose.load_task(str(own))[1]["a"] == "mine"
    assert compose.task_name(str(own)) == "mine"
    assert compose.task_name("lm/big") == "lm/big"
    (tmp_path / "child.yaml").write_text("parent: mine.yaml\n")  # beside the file that names it
    assert compose.load_task(str(tmp_path / "child.yaml"))[1]["a"] == "mine"
    monkeypatch.chdir(tmp_path)
    assert compose.load_task("mine.yaml")[1]["c"] == "big"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("loop", "parent: loop\n", "circle"),
        ("orphan", "a: 1\n", "domain"),
        ("broken", "a: [1\n", "not valid YAML"),
        ("twice", "a: 1\na: 2\n", "not valid YAML"),
        ("words", "- just\n- words\n", "key: value"),
        ("lost", "parent: nowhere\n", "task=nowhere"),
    ],
)
def test_bad_files_are_one_clear_error(configs, name, text, message):
    configs(name, text)
    with pytest.raises(ConfigError, match=message) as error:
        compose.load_task(name)
    assert "\n" not in str(error.value)


def test_unknown_task_lists_the_tasks(configs):
    for name in ("lm/bug", "base", "../configs/lm", ""):
        with pytest.raises(ConfigError, match="lm, lm/big"):
            compose.load_task(name)


def test_broken_interpolation_names_its_key():
    with pytest.raises(ConfigError, match=r"model\.x: .*nowhere"):
        compose.resolve({"model": {"x": "${nowhere}"}})


def test_class_change_drops_old_arguments():
    under = {"class_path": "A", "init_args": {"x": 1}}
    assert compose.merge(under, {"class_path": "B"}) == {"class_path": "B"}
    assert compose.merge(under, {"init_args": {"y": 2}}) == {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    assert compose.merge(under, {"class_path": "A", "init_args": {"x": 2}})["init_args"] == {"x": 2}
    assert compose.merge({"k": [1, 2]}, {"k": [3]}) == {"k": [3]}
    assert compose.merge({"k": {"x": 1}}, {"k": None}) == {"k": None}


TRAPS = [
    "yes",
    "0123",
    "12:30:45",
    "a: b",
    "${x}",
    r"\${x}",
    "${",
    "1e3",
    "null",
    "~",
    "",
    " a ",
    "#c",
    "a\nb",
    "é",
    "- a",
]
TRAPS += [
    "'q'",
    '"q"',
    "{a: 1}",
    "[1]",
    "!tag",
    "&a",
    "*a",
    "%",
    "@",
    "`",
    "2020-01-01",
    ".inf",
    "=",
    "<<",
    "???",
    "\t",
]


@pytest.mark.parametrize("text", TRAPS)
def test_typed_text_comes_back_unchanged(text, tmp_path):
    check_text(text, tmp_path / "config.yaml")


@given(st.text(alphabet=st.sampled_from("${}\\ab:'\"#0. \n-"), max_size=12))
def test_any_text_comes_back_unchanged(tmp_path_factory, text):
    check_text(text, tmp_path_factory.getbasetemp() / "any.yaml")


def check_text(text, path):
    config = {"x": 1, "text": text, "list": [text]}
    assert compose.resolve(compose.escape(config)) == config
    path.write_text(compose.to_yaml(config))
    assert compose.resolve(compose.read(path)) == config
    assert OmegaConf.to_container(OmegaConf.load(path), resolve=True) == config
    assert yaml.safe_load(path.read_text()) == compose.escape(config)


def test_saved_configuration_keeps_explaining_interpolations():
    files = {"trainer": {"steps": 10, "lr": 1}, "model": {"total": "${trainer.steps}", "other": "${trainer.lr}"}}
    saved = {"trainer": {"steps": 50, "lr": 1}, "model": {"total": 50, "other": 7}}
    config = compose.over_saved(files, saved)
    assert compose.resolve(config) == saved
    more = compose.resolve(compose.merge(config, {"trainer": {"steps": 99}}))
    assert more["model"] == {"total": 99, "other": 7}  # total followed the steps; other had been set by hand


def test_nearest_finds_full_keys():
    keys = ["trainer.max_epochs", "trainer.max_steps", "model.backbone.dim", "data.batch_size"]
    assert compose.nearest("max_epochs", keys)[0] == "trainer.max_epochs"
    assert compose.nearest("trainer.max_epoch", keys)[0] == "trainer.max_epochs"
    assert compose.nearest("model.dim", keys)[0] == "model.backbone.dim"
    assert compose.nearest("batchsize", keys)[0] == "data.batch_size"
