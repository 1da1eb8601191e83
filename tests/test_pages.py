"""README.md and docs: links lead somewhere, what is shown of examples is what lies there, README stays short."""

import re
from pathlib import Path

import pytest
from launch import REPO

PAGES = [REPO / "README.md", REPO / "benchmarks" / "README.md", *sorted((REPO / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_links_and_lines(page):
    text = page.read_text()
    targets = [target for target in LINK.findall(text) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_readme_is_short_and_links_each_page_once():
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = [page.relative_to(REPO).as_posix() for page in PAGES if page.parent == REPO / "docs"]
    assert {link: text.count(f"]({link})") for link in links} == dict.fromkeys(links, 1)


def test_examples_are_shown_as_they_are():
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", (REPO / "docs" / "extend.md").read_text(), re.DOTALL)
    shown = {name: (REPO / "examples" / name).read_text() for name in ("parity.py", "head_scale.py", "head_scale.yaml")}
    assert [name for name, text in shown.items() if text not in blocks] == []


def test_every_result_is_explained():
    """Every kept result is explained; ops.md beside ops.json is the same in other words."""
    named = set(re.findall(r"\(results/([\w.-]+)\)", (REPO / "benchmarks" / "README.md").read_text()))
    kept = {path.name for path in Path(REPO, "benchmarks", "results").iterdir()}
    assert {name for name in kept - named if Path(name).with_suffix(".json").name not in named} == set()
