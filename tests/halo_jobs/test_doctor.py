"""halo doctor: what it finds missing, and what it says about it."""

import errno
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from halo_jobs import doctor
from halo_jobs.cli import app
from halo_jobs.doctor import check_folder, check_software


def found(checks, name):
    (check,) = (check for check in checks if check.name == name)
    return check


def test_a_complete_installation_is_ready(tmp_path, capsys):
    app(["doctor", "--folder", str(tmp_path / "runs"), "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    checks = {check["name"]: check for check in report["checks"]}
    assert set(checks["Python"]) == {"name", "found", "ok", "required", "advice"}
    assert checks["PyTorch"]["found"] == metadata.version("torch")
    assert {"CUDA", "Triton", "Transformer Engine", "Slurm", "Ray", "Megatron-Core"} < set(checks)
    assert checks["Folder"]["found"] == str(tmp_path), "runs is not there yet"
    assert all(check["ok"] for check in report["checks"] if check["required"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_renames_is_not_ready_and_one_without_hard_links_is(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    app(["doctor", "--folder", str(tmp_path)], standalone_mode=False)
    lines = {line[6:].split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["Hard link"].startswith("note ") and "Operation not permitted; works without" in lines["Hard link"]
    assert lines["Lock"].startswith("ok ")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RuntimeError, match="Rename over a file, Lock: not ready"):
        app(["doctor", "--folder", str(tmp_path)], standalone_mode=False)
    assert "fix   Rename over a file" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_not_ready(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "mkdtemp", refuse)
    (check,) = check_folder(tmp_path)
    assert (check.ok, check.required) == (False, True)
    assert check.found == f"{tmp_path}: Read-only file system"


def test_versions_are_held_against_those_that_the_package_declares(monkeypatch):
    installed = metadata.version

    def version(name):
        if name == "zarr":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "2.4.0", "ray": "1.0"}.get(name) or installed(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    checks = list(check_software())
    torch, ray, zarr = (found(checks, name) for name in ("PyTorch", "Ray", "zarr"))
    assert (torch.ok, torch.required, torch.found) == (False, True, "2.4.0 does not fit")
    assert torch.advice == "pip install 'torch<2.14,>=2.11'"
    assert (ray.ok, ray.required) == (False, False) and "needed for --executor ray" in ray.advice
    assert (zarr.ok, zarr.required, zarr.found) == (False, True, "not installed")
    assert "Other packages" not in {check.name for check in checks}


def test_a_scheduler_that_does_not_answer_is_noted(tmp_path, monkeypatch):
    for name, script in (("sinfo", "echo slurm 22.05.8"), ("scontrol", "echo Slurmctld is DOWN >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slurm = found(check_software(), "Slurm")
    assert (slurm.ok, slurm.required, slurm.found) == (False, False, "does not answer: Slurmctld is DOWN")
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    assert found(check_software(), "Slurm").found == "22.05.8"


def test_a_file_server_with_another_clock_is_noted(tmp_path, monkeypatch):
    now = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() + 60)
    clock = found(check_folder(tmp_path), "Clock of the file server")
    assert (clock.ok, clock.required) == (False, False)
    assert clock.found.startswith("-60.0 s") and "NTP" in clock.advice


def test_torch_is_imported_for_the_line_about_cuda_only(tmp_path):
    probe = (
        "import sys; from halo_jobs.doctor import check_folder, check_software\n"
        f"list(check_folder(__import__('pathlib').Path({str(tmp_path)!r})))\n"
        "for check in check_software():\n"
        "    if check.name == 'Other packages': print('torch' in sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"
