"""The documents are true: their commands parse, their paths exist, their snippets import."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperCommand, TyperGroup

from halo_jobs.cli import app
from halo_jobs.recipe import ConversionRecipe, load_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SHELLS = ("", "sh", "bash", "console")
INLINE = re.compile(r"(?<!`)`((?:halo|make) [^`]+)`(?!`)")
USAGE_ERROR = typer.BadParameter.__base__ or Exception
# Options that act when they are parsed, so that they are only looked up.
EAGER = ("--help", "--version", "--install-completion", "--show-completion")


def _fenced(*languages: str) -> list[str]:
    return [text for path in DOCUMENTS for found, text in FENCE.findall(path.read_text()) if found in languages]


def _commands(program: str) -> list[list[str]]:
    """Lines of fenced blocks that start with `program`, as words."""
    lines = [line.removeprefix("$ ") for block in _fenced(*SHELLS) for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(program)]
    return [found for found in words if found[0] == program]


def _mentions(program: str) -> list[list[str]]:
    """Commands in the running text, which may leave arguments out."""
    text = "\n".join(FENCE.sub("", path.read_text()) for path in DOCUMENTS)
    found = sorted({" ".join(mention.split()) for mention in INLINE.findall(text)})
    return [mention.split() for mention in found if mention.startswith(f"{program} ")]


def _parse_halo(words: list[str], *, complete: bool) -> None:
    """Parse as the command line would, and run nothing. Not `complete`: arguments may be missing."""
    command: TyperCommand | TyperGroup = typer.main.get_command(app)
    context = typer.Context(command, info_name="halo")
    rest = words[1:]
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, name
        command, context = found, typer.Context(found, parent=context, info_name=name)
    known = {option for parameter in command.get_params(context) for option in parameter.opts}
    for eager in (word for word in rest if word in EAGER):
        assert eager in known, f"{eager} is not an option of {context.command_path}"
        return
    if complete:
        assert not isinstance(command, TyperGroup), f"{context.command_path} needs a command"
        with command.make_context(context.info_name, list(rest), parent=context.parent) as parsed:
            _check_values(parsed)
        return
    unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
    assert not unknown, f"{unknown} are not options of {context.command_path}"


def _check_values(parsed: typer.Context) -> None:
    """A file of the repository exists, a shipped recipe loads, a changed key is one of a recipe's."""
    for value in parsed.params.values():
        if isinstance(value, Path) and value.parts[0] in ("benchmarks", "docs", "examples", "halo_jobs"):
            assert (ROOT / value).exists(), f"{value} does not exist"
    recipe = parsed.params.get("recipe")
    if recipe is not None and recipe.suffix != ".yaml":
        load_recipe(recipe)
    if parsed.params.get("settings"):
        load_recipe(Path("demo"), parsed.params["settings"])


def test_there_are_commands_to_check() -> None:
    assert len(_commands("halo")) >= 15
    assert len(_mentions("halo")) >= 10
    assert len(_commands("make")) >= 4
    assert len(_commands("python")) >= 4


@pytest.mark.parametrize(
    "wrong",
    [
        "halo",
        "halo runn demo",
        "halo run",
        "halo run demo --run-name x",
        "halo run demo --executor slrm",
        "halo run demo --set distill.stepz=3",
        "halo run no-such-recipe",
        "halo run halo_jobs/recipes/no-such-recipe.yaml",
        "halo status runs/demo surplus",
    ],
)
def test_wrong_commands_do_not_parse(wrong: str) -> None:
    with pytest.raises((AssertionError, USAGE_ERROR, ValueError)):
        _parse_halo(wrong.split(), complete=True)


@pytest.mark.parametrize("words", _commands("halo"), ids=" ".join)
def test_halo_command_parses(words: list[str]) -> None:
    _parse_halo(words, complete=True)


@pytest.mark.parametrize("words", _mentions("halo"), ids=" ".join)
def test_mentioned_halo_command_exists_with_its_options(words: list[str]) -> None:
    _parse_halo(words, complete=False)


@pytest.mark.parametrize("words", [*_commands("make"), *_mentions("make")], ids=" ".join)
def test_make_target_exists(words: list[str]) -> None:
    rules = re.findall(r"^([a-z-]+(?: [a-z-]+)*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    assert {word for word in words[1:] if "=" not in word} <= targets


class _ParsedError(Exception):
    """Raised in place of what a script would do after it has parsed its arguments."""


# Commands with argparse. Those of examples/ use typer, would run, and are parsed by tests/examples.
@pytest.mark.parametrize(
    "words", [words for words in _commands("python") if words[2] != "examples.teacher_small"], ids=" ".join
)
def test_python_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise _ParsedError

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"there is no module {words[2]}"
    monkeypatch.setattr("sys.argv", words[2:] if words[1] == "-m" else words[1:])
    try:
        if words[1] == "-m":
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[1], run_name="__main__")
    except _ParsedError:
        pass
    except SystemExit as end:
        assert end.code == 0 and "--help" in words, f"{' '.join(words)} does not parse"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(path: Path) -> None:
    """Repository paths in backticks and relative links."""
    text = path.read_text()
    named = re.findall(r"`([a-z_]+/[\w./-]+)`", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [
        name for name in named if not name.startswith(("runs/", "corpus/")) and not (ROOT / name).exists()
    ]
    missing += [link for link in linked if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("snippet", _fenced("python"), ids=lambda text: text.splitlines()[0][:40])
def test_snippet_compiles_and_its_imports_exist(snippet: str) -> None:
    snippet = textwrap.dedent(snippet)  # part of a function, perhaps
    compile(snippet, "snippet", "exec")
    for line in snippet.splitlines():
        if line.startswith(("from ", "import ")):
            exec(line, {})


def test_recipe_sections_are_accepted() -> None:
    page = (ROOT / "docs" / "on-your-slurm.md").read_text()
    (recipe,) = [yaml.safe_load(text) for language, text in FENCE.findall(page) if language == "yaml"]
    for section, content in recipe.items():
        ConversionRecipe.model_fields[section].annotation(**content)
