"""The documents agree with the code.

The tests cover fields, defaults, presets, metrics, commands, options, files and links.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from pydantic import BaseModel

from megaconsa import config as configuration
from megaconsa.cli import app
from megaconsa.config import Config
from megaconsa.model.config import PRESETS
from megaconsa.training import same_run
from tests.support import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, click.Command] = GROUP.commands
TOP_LEVEL = ("megaconsa", "kernels", "tools", "configs", "slurm", "docs", "tests")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def fenced(page: Path) -> Iterator[str]:
    """Yields the command lines of the fenced blocks of a page.

    Continuation lines are joined and comments are cut.
    """
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line and not line.startswith(("#", " ")):
                yield line.split("  #")[0].split("   ")[0].strip()


def inline(page: Path) -> list[str]:
    """Returns what is in backquotes outside fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def anchors(page: Path) -> set[str]:
    """Returns the link targets of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: str, columns: int) -> dict[str, list[str]]:
    """Returns rows of the tables of a page.

    These are rows with `columns` columns whose first cell is one name in backquotes.
    """
    rows = (
        re.split(r" \| ", line[2:].removesuffix(" |"))
        for line in (ROOT / page).read_text().splitlines()
        if line[:2] == "| "
    )
    return {
        row[0].strip("`"): row[1:]
        for row in rows
        if len(row) == columns and re.fullmatch(r"`[\w.-]+`", row[0])
    }


def check_command(words: list[str]) -> None:
    """Checks a documented command line.

    Fails if the command would be refused before it reads files other than its configuration.
    """
    if words[0] == "torchrun":
        where = words.index("-m")
        assert words[where + 1] == "megaconsa.train"
        words = ["megaconsa", "train", *words[where + 2 :]]
    if words[0] == "megaconsa" and len(words) > 1:
        assert words[1] in COMMANDS
        parsed = COMMANDS[words[1]].make_context(words[1], words[2:]).params
        if words[1] in ("train", "plan", "profile") and parsed["config"].name != "CONFIG":
            configuration.load(ROOT / parsed["config"], list(parsed["overrides"] or []))
        if words[1] == "submit":
            for word in parsed["arguments"]:
                assert not word.startswith("configs/") or (ROOT / word).exists(), word
    elif words[0] in ("sbatch", "bash"):
        for word in words[1:]:
            assert not word.startswith(("slurm/", "configs/")) or (ROOT / word).exists(), word
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in words[1:] if "=" not in word)
    elif words[0] in (".venv/bin/pytest", "pytest"):
        for word in words[1:]:
            assert not word.startswith("tests") or (ROOT / word).exists()


@every_page
def test_fenced_commands_parse(page: Path) -> None:
    for line in fenced(page):
        words = shlex.split(line)
        try:
            check_command(words)
        except Exception as error:
            pytest.fail(f"{page.name}: {line}: {error!r}")


@every_page
def test_commands_and_files_named_in_passing_exist(page: Path) -> None:
    for text in inline(page):
        words = text.split()
        if words[0] in ("megaconsa", "make") and len(words) > 1:
            assert words[1] in COMMANDS or words[0] == "make", text
        if words[0] == "make":
            check_command(words)
        if re.fullmatch(rf"({'|'.join(TOP_LEVEL)})/[\w./-]*", text) and not re.search(
            r"[A-Z]{3}", text
        ):
            assert (ROOT / text).exists(), text


@every_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index


def test_readme_lists_every_command_and_configuration() -> None:
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `megaconsa ([a-z-]+)` \|", readme, re.MULTILINE)) == set(COMMANDS)
    assert set(re.findall(r"\]\(configs/([\w.]+)\)", readme)) == {
        path.name for path in (ROOT / "configs").glob("*.yaml")
    }


def test_every_field_stands_with_its_default() -> None:
    documented = {name: row[0] for name, row in table("docs/configuration.md", 3).items()}
    expected: dict[str, Any] = {}
    for name, section in Config.model_fields.items():
        assert isinstance(section.annotation, type)
        for field, info in section.annotation.model_fields.items():  # type: ignore[attr-defined]
            expected[f"{name}.{field}"] = "required" if info.is_required() else info.default
    assert documented.keys() == expected.keys()
    for field, default in expected.items():
        value = yaml.safe_load(documented[field].strip("`"))
        assert value == (list(default) if isinstance(default, tuple) else default), field


def test_every_preset_stands_with_its_shape() -> None:
    rows = table("docs/configuration.md", 8)
    assert rows.keys() == PRESETS.keys()
    for name, shape in PRESETS.items():
        heads = f"{shape.num_attention_heads} / {shape.num_key_value_heads}"
        widths = (f"{shape.hidden_size:,}", f"{shape.intermediate_size:,}", f"{shape.vocab_size:,}")
        tied = "yes" if shape.tie_word_embeddings else "no"
        assert rows[name] == [
            str(shape.num_hidden_layers),
            heads,
            str(shape.head_dim),
            *widths,
            tied,
        ]


def test_choices_stand_in_the_configuration_page() -> None:
    """The page must name every value of a field with fixed choices."""
    rows = table("docs/configuration.md", 3)
    for name, section in Config.model_fields.items():
        kind = section.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        for field, values in kind.model_json_schema()["properties"].items():
            for choice in values.get("enum", []):
                assert f"`{choice}`" in rows[f"{name}.{field}"][1], f"{field}: {choice}"


def test_what_may_change_on_resume_stands_in_the_training_page() -> None:
    paragraph = (
        (ROOT / "docs" / "training.md").read_text().split("## Resuming")[1].split("\n## ")[0]
    )
    for name in same_run.FREE | same_run.OF_THE_START | {"training.steps"}:
        assert f"`{name}`" in paragraph


def test_every_metric_stands_in_the_training_page(
    make_config: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    rows = train(make_config(training={"steps": 3}, checkpoint={"every": 0}))
    paper = {"controller": "paper", "learning_rate": 2.0}
    other_run = {"dir": str(tmp_path / "paper")}
    rows += train(
        make_config(run=other_run, gates=paper, training={"steps": 3}, checkpoint={"every": 0})
    )
    section = (ROOT / "docs" / "training.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == {
        name for row in rows for name in row
    }
