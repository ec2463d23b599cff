"""scripts/bootstrap.sh without the network: what it chooses, with stand-ins for interpreters; one real installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bootstrap.sh"

# Reports whether its version is usable, copies itself into .venv, and records what pip was asked to do.
INTERPRETER = """#!/bin/sh
case "$1" in
    -c) exit {version_status} ;;
    --version) echo "Python 3.12 for the test" ;;
    -m) if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; else echo "$@" >>pip-calls; fi ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository in a folder with a space in its name, and beside it `bin` with the only commands on PATH."""
    root = tmp_path / "my checkout"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "scripts")
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("torch==2.13.0\n")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sh", "cat", "cksum", "dirname", "mkdir", "cp"):
        target = shutil.which(name)
        assert target is not None
        (commands / name).symlink_to(target)
    return root


def add_interpreter(path: Path, usable: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER.format(version_status=0 if usable else 1))
    path.chmod(0o755)


def bootstrap(checkout: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(checkout.parent / "bin")}
    script = str(checkout / "scripts" / "bootstrap.sh")
    return subprocess.run([script], env=environment, capture_output=True, text=True, check=False)


def installs(checkout: Path) -> int:
    calls = checkout / "pip-calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_without_a_python_one_sentence_says_what_to_install(checkout: Path) -> None:
    add_interpreter(checkout.parent / "bin" / "python3.12", usable=False)  # as a shim of a version that is not selected
    result = bootstrap(checkout)
    assert result.returncode == 1
    assert result.stderr.startswith(
        "No Python >= 3.12 with the venv module was found on PATH, in pyenv or in uv; install one"
    )
    assert len(result.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_installs_once_and_again_only_after_a_change(checkout: Path) -> None:
    add_interpreter(checkout.parent / "bin" / "python3")
    assert bootstrap(checkout).returncode == 0
    assert (checkout / "pip-calls").read_text().strip().endswith("-c constraints.txt -e .[dev]")
    second = bootstrap(checkout)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert installs(checkout) == 1
    (checkout / "constraints.txt").write_text("torch==2.12.0\n")
    assert bootstrap(checkout).returncode == 0
    assert installs(checkout) == 2


def test_moved_checkout_installs_again(checkout: Path) -> None:
    add_interpreter(checkout.parent / "bin" / "python3")
    bootstrap(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    assert bootstrap(moved).returncode == 0
    assert installs(moved) == 2


def test_finds_a_python_that_only_pyenv_knows(checkout: Path) -> None:
    root = checkout.parent / "pyenv root"
    add_interpreter(root / "versions" / "3.9.18" / "bin" / "python", usable=False)
    add_interpreter(root / "versions" / "3.12.1" / "bin" / "python")
    pyenv = checkout.parent / "bin" / "pyenv"
    pyenv.write_text(f'#!/bin/sh\necho "{root}"\n')
    pyenv.chmod(0o755)
    assert bootstrap(checkout).returncode == 0
    assert installs(checkout) == 1


def test_finds_a_python_that_only_uv_knows(checkout: Path) -> None:
    interpreter = checkout.parent / "uv" / "python3.12"
    add_interpreter(interpreter)
    uv = checkout.parent / "bin" / "uv"
    uv.write_text(f'#!/bin/sh\necho "{interpreter}"\n')
    uv.chmod(0o755)
    assert bootstrap(checkout).returncode == 0
    assert installs(checkout) == 1


PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "installed-by-the-test"
version = "1.0"
[project.optional-dependencies]
dev = []
"""
# A build backend that needs no package: an editable installation is a wheel with a .pth file in it.
BACKEND = """
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    info = "installed_by_the_test-1.0.dist-info"
    facts = "Metadata-Version: 2.1\\nName: installed-by-the-test\\nVersion: 1.0\\nProvides-Extra: dev\\n"
    files = {
        "installed_by_the_test.pth": str(pathlib.Path.cwd()),
        f"{info}/METADATA": facts,
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\\n" for name in [*files, f"{info}/RECORD"])
    name = "installed_by_the_test-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return name
"""


def test_installs_the_project_with_a_real_python_and_pip(checkout: Path, tmp_path: Path) -> None:
    (checkout / "pyproject.toml").write_text(PROJECT)
    (checkout / "backend.py").write_text(BACKEND)
    (checkout / "constraints.txt").write_text("")
    (checkout / "room.py").write_text("answer = 42\n")
    (checkout.parent / "bin" / "python3").symlink_to(sys.executable)
    done = bootstrap(checkout)
    assert done.returncode == 0, done.stderr
    command = [str(checkout / ".venv" / "bin" / "python"), "-c", "import room; print(room.answer)"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (said.stdout, said.stderr) == ("42\n", "")
    assert bootstrap(checkout).stdout == "", "nothing is installed again"
