"""The documents are true: their commands parse, their paths exist, their snippets import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from halo_jobs.recipe import ConversionRecipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "docs" / "data.md",
    ROOT / "docs" / "kernels.md",
    ROOT / "docs" / "watching.md",
    ROOT / "docs" / "when-something-dies.md",
    ROOT / "docs" / "on-your-slurm.md",
    ROOT / "docs" / "slurm-sandbox.md",
]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def _fenced(language: str) -> list[str]:
    return [
        text for path in DOCUMENTS for found, text in FENCE.findall(path.read_text()) if found == language
    ]


def _commands(program: str) -> list[list[str]]:
    lines = [line.split("#")[0].split() for block in _fenced("") for line in block.splitlines()]
    return [words for words in lines if words and words[0] == program]


def test_there_are_commands_to_check():
    assert len(_commands("halo")) >= 4
    assert len(_commands("make")) >= 2


@pytest.mark.parametrize("words", _commands("halo"), ids=" ".join)
def test_halo_command_parses(words):
    """The subcommand exists and knows every option that the document uses."""
    subcommand = [word for word in words[1:3] if re.fullmatch(r"[a-z][a-z-]*", word)]
    if subcommand[0] not in ("corpus", "kernels"):
        subcommand = subcommand[:1]
    done = subprocess.run(
        [sys.executable, "-m", "halo_jobs.cli", *subcommand, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "200", "PATH": ""},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout, f"{option} is not an option of {' '.join(subcommand)}"


@pytest.mark.parametrize("words", _commands("make"), ids=" ".join)
def test_make_target_exists(words):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[1] in targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(path):
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
def test_snippet_compiles_and_its_imports_exist(snippet):
    compile(snippet, "snippet", "exec")
    for line in snippet.splitlines():
        if line.startswith(("from ", "import ")):
            exec(line, {})


def test_recipe_sections_are_accepted():
    page = (ROOT / "docs" / "on-your-slurm.md").read_text()
    (recipe,) = [yaml.safe_load(text) for language, text in FENCE.findall(page) if language == "yaml"]
    for section, content in recipe.items():
        ConversionRecipe.model_fields[section].annotation(**content)
