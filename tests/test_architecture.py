"""Rules about the tracked files themselves. Who imports whom is checked by import-linter (`make lint`)."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A file holds one idea, and a reader can keep it in mind. A limit of 400 lines made us cut files in two for no other
# reason.
LONGEST_FILE = 600
# What users install. More capabilities are to come from fewer ideas, so a change that needs more lines has to find
# others to delete; raising the limit is a decision.
PRODUCT_LINES = 22_000
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".html", ".json", ""}
# Data of others may hold any text; this file has to name what it forbids.
EXEMPT = ("halo_jobs/assets/", "tests/test_architecture.py")

MACHINE_PATH = re.compile(r"(?<![\w./~$}-])/(?:work|root|home|Users|tmp/w)/")
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted|registry\.npmjs|download\.pytorch\.org|--(?:extra-)?index-url|--find-links|-index-url",
    re.IGNORECASE,
)


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def offending_lines(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        if path.suffix in TEXT_SUFFIXES and not str(path.relative_to(ROOT)).startswith(EXEMPT)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]


def test_python_files_stay_short() -> None:
    files = tracked("*.py")
    assert len(files) > 20
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_product_stays_small() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = [pattern.rstrip("*") for pattern in setuptools["packages"]["find"]["include"]]
    folders = [ROOT / place / room for place in setuptools["packages"]["find"]["where"] for room in rooms]
    files = [path for folder in folders if folder.is_dir() for path in tracked(f"{folder}/*.py")]
    assert len(files) == len(set(files)) > 150
    assert sum(len(path.read_text().splitlines()) for path in files) <= PRODUCT_LINES


def test_no_path_of_somebodys_machine() -> None:
    assert MACHINE_PATH.search("see /home/me/notes")
    work, root = "work", "root"  # spelt out, they would look like paths of a machine to others too
    assert not MACHINE_PATH.search(f"runs/{work}/x ~/{work}/y $HOME/{root}/z")
    assert offending_lines(MACHINE_PATH) == []


def test_no_registry_address() -> None:
    assert REGISTRY.search("pip install --extra-index-url X")
    assert offending_lines(REGISTRY) == []


def test_constraints_are_plain_pins() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert len(set(names)) == len(names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    needed = {re.split(r"[\[<>=;, ]", requirement)[0].lower() for requirement in wanted}
    assert needed - set(names) == set()
