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
    """Built from a copy of the tracked files, so that the repository gets no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run(
        [*pip, "wheel", *options, "--wheel-dir", folder, folder / "source"], check=True, cwd=folder
    )
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
    install = ["install", "--no-deps", "--no-index", "--quiet", "--target", packages, wheel]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True)
    assert not (packages / "examples").exists(), "examples are not part of the product"

    def halo(*arguments: object) -> str:
        # -P and an empty folder: nothing of the repository is on the path but what an editable installation puts there,
        # and PYTHONPATH comes before that.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "halo_jobs.cli", *map(str, arguments)],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    probe = "import halo_jobs, hypenet_tools, hypenet_kernels, halo_cluster; " + (
        "print(*{m.__path__[0] for m in (halo_jobs, hypenet_tools, hypenet_kernels, halo_cluster)}, sep='\\n')"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", probe],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {Path(line).parent for line in found.stdout.splitlines()} == {packages}

    settings = [word for key, value in STEPS for word in ("--set", f"{key}={value}")]
    assert (empty / "runs/demo/report.html").as_uri() in halo("demo", *settings)
    assert halo("generate", "runs/demo", "The Congress", "--max-new-tokens", 4).startswith("The Congress")
    assert "halo_stage" in halo("metrics", "runs/demo", "--once")
    dashboard = packages / "halo_jobs" / "assets" / "grafana" / "halo.json"
    assert dashboard.read_bytes() == (ROOT / "halo_jobs" / "assets" / "grafana" / "halo.json").read_bytes()
    assert "Qwen3-1.7B" in (packages / "halo_jobs" / "recipes" / "hypenet-2b.yaml").read_text()
