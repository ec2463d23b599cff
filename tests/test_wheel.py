"""The wheel holds all that the demo needs: it runs outside the repository, without the repository's files."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
STEPS = (
    ("align.steps", 2),
    ("align.warmup_steps", 1),
    ("distill.steps", 2),
    ("distill.warmup_steps", 1),
    ("finetune.steps", 2),
    ("finetune.warmup_steps", 1),
    ("finetune.context_length", 256),
    ("calibrate.context_length", 256),
    ("select.items", 2),
    ("select.baselines", "[]"),
    ("evaluate.contexts", "[256]"),
    ("evaluate.depths", "[0.5]"),
    ("evaluate.needle_items", 1),
    ("evaluate.suite_items", 2),
    ("corpus.recall_episodes", 64),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Made as `python -m build` does it: a source distribution, and the wheel from that, without the network.

    The source is a copy of the tracked files, so that the repository gets no build folder.
    """
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=folder / "source", capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", folder]
    subprocess.run([*PIP, "wheel", *options, sdist], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.wheel
def test_metadata_names_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(archive.read(name).decode())
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts.get_all("License-File") == ["LICENSE"]
    assert licence == (ROOT / "LICENSE").read_text()


@pytest.mark.wheel
def test_demo_runs_from_the_wheel_outside_the_repository(wheel, tmp_path):
    packages, empty = tmp_path / "packages", tmp_path / "empty"
    empty.mkdir()
    options = ["--no-deps", "--no-index", "--quiet", "--target", packages]
    subprocess.run([*PIP, "install", *options, wheel], check=True)
    assert not (packages / "examples").exists(), "examples are not part of the product"

    def python(*arguments: object) -> str:
        """Run with the wheel's packages first: an editable installation of the repository comes after PYTHONPATH."""
        done = subprocess.run(
            [sys.executable, "-P", *map(str, arguments)],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def halo(*arguments: object) -> str:
        return python("-m", "halo_jobs.cli", *arguments)

    for module in ("halo_jobs", "hypenet_kernels", "hypenet_tools", "halo_cluster"):
        assert python("-c", f"import {module}; print({module}.__path__[0])") == f"{packages / module}\n"

    settings = [word for key, value in STEPS for word in ("--set", f"{key}={value}")]
    assert (empty / "runs/demo/report.html").as_uri() in halo("demo", *settings)
    assert halo("generate", "runs/demo", "The Congress", "--max-new-tokens", 4).startswith("The Congress")
    assert "halo_stage" in halo("metrics", "runs/demo", "--once")
    dashboard = packages / "halo_jobs" / "assets" / "grafana" / "halo.json"
    assert dashboard.read_bytes() == (ROOT / "halo_jobs" / "assets" / "grafana" / "halo.json").read_bytes()
    assert "Qwen3-1.7B" in (packages / "halo_jobs" / "recipes" / "hypenet-2b.yaml").read_text()
