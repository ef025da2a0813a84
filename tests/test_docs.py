"""What the README and the pages say can be done: commands parse, settings exist, links lead somewhere."""

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from edgeprune.cli import app
from edgeprune.intake.config import Config, TargetConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDED_ELSEWHERE = {"targets.NAME.memory_mib", "targets.NAME.description"}
"""Fields of a profile that no shipped adapter reads."""


def commands(text: str) -> list[str]:
    """Return the edgeprune commands of a page, in code blocks and in code spans with a flag or a file."""
    lines = [line.strip() for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.S) for line in block.splitlines()]
    spans = re.findall(r"`(edgeprune [^`]+)`", text)
    found = [each.removeprefix("$ ") for each in (*lines, *spans)]
    return [each for each in found if each.startswith("edgeprune ") and "<" not in each]


CASES = [(page, line) for page in PAGES for line in commands(page.read_text())]


def test_there_are_commands_to_check() -> None:
    assert len(CASES) >= 8


@pytest.mark.parametrize(("page", "line"), CASES, ids=lambda each: getattr(each, "name", each))
def test_every_command_parses(page: Path, line: str) -> None:
    """The command exists and so do its options; what they name need not."""
    name, *words = line.split("#")[0].split()[1:]
    group = typer.main.get_command(app)
    assert name in {"--help", *group.commands}, line
    if name in group.commands:
        context = group.commands[name].make_context(name, [], resilient_parsing=True)
        context.resilient_parsing = False  # from here on an unknown option is an error
        group.commands[name].make_parser(context).parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    """Relative links and pictures."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [each for each in targets if "://" not in each and not (page.parent / each).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Benchmarks, documents, tests and examples named in code spans."""
    named = re.findall(r"`((?:benchmarks|docs|tests|examples)/[\w./-]+)`", page.read_text())
    assert not [each for each in named if not (ROOT / each).exists()]


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)\b(?=`|\s+#|$)", page.read_text(), re.M)}
    assert {"deploy", "test"} <= named
    assert not [each for each in named if not re.search(rf"^{each}:", makefile, re.M)]


def fields(section: type[BaseModel], name: str) -> dict[str, Any]:
    """Return dotted name → default of every setting."""
    found: dict[str, Any] = {}
    for key, facts in section.model_fields.items():
        inner = next((each for each in get_args(facts.annotation) if isinstance(each, type)), facts.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields(inner, f"{name}{key}.")
        elif key == "targets":
            found |= fields(TargetConfig, "targets.NAME.")
        else:
            found[f"{name}{key}"] = facts.default
    return found


def documented() -> dict[str, str]:
    """Return dotted name → what the table says is its default."""
    rows = re.findall(r"^\| (`[^|]+) \|([^|]*)\|", (ROOT / "docs/configuration.md").read_text(), re.M)
    return {name: default.strip() for names, default in rows for name in re.findall(r"`([^`]+)`", names)}


def test_every_setting_is_documented_and_every_documented_one_exists() -> None:
    assert set(documented()) == set(fields(Config, "")) - NEEDED_ELSEWHERE


def test_documented_defaults_are_the_defaults() -> None:
    """Where the table gives a value in code type."""
    settings = fields(Config, "")
    wrong = {}
    for name, said in documented().items():
        if re.fullmatch(r"`[^`]+`", said) and said != "`image_size`":
            value = settings[name]
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            wrong |= {} if said == f"`{shown}`" else {name: (said, shown)}
    assert not wrong


def test_the_configuration_in_the_readme_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    parsed = tomllib.loads(text)
    known = fields(Config, "")
    assert all(f"{section}.{key}" in known for section, table in parsed.items() for key in table)
