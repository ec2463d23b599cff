"""Killed, starved, misled: a rerun finishes, the result is the same, and nothing partial passes for a model."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halo_jobs.cli import app
from hypenet_tools.convert import convert_job, reshard_job
from hypenet_tools.export import export_job
from hypenet_tools.folder_job import keep_or_write, run_job
from hypenet_tools.layout import FolderLayout
from hypenet_tools.open_model import open_model
from sharded_tensors.reader import StoredTensors
from tests.support.halo import halo, halo_command
from tests.support.tiny_models import TINY

KILLS = int(os.environ.get("HALO_CONVERT_KILLS", "3"))
SLOW_SHAPE = replace(TINY, num_layers=12, hidden_size=512, ffn_hidden_size=1024, vocab_size=4096)
LAYOUT, SHARD_BYTES = FolderLayout(2, 2), 300_000


def command(source, out, *options, kind="convert"):
    layout = [] if kind == "export" else ["--tp", 2, "--pp", 2]
    return halo_command(kind, source, out, *layout, "--shard-gb", SHARD_BYTES / 1e9, *options)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refuse_as_model(folder):
    """What `halo verify`, and every other command, does with a folder of an unfinished job."""
    with pytest.raises(
        ValueError, match=r"has not ended; repeat that command|is neither a Hugging Face folder"
    ):
        open_model(folder)


def finish(command, out, whole):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert content(out) == whole
    assert [path.name for path in out.parent.glob("out*")] == ["out"]


def job_of(kind, source, folder):
    """The job that a command does, and what it is given."""
    if kind == "convert":
        return source, convert_job(source, folder / "whole", LAYOUT, max_shard_bytes=SHARD_BYTES)
    assert run_job(convert_job(source, folder / "weights", FolderLayout(), max_shard_bytes=SHARD_BYTES))
    weights = open_model(folder / "weights")
    if kind == "reshard":
        return weights.folder, reshard_job(weights, folder / "whole", LAYOUT, max_shard_bytes=SHARD_BYTES)
    return weights.folder, export_job(weights, folder / "whole", max_shard_bytes=SHARD_BYTES)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["convert", "reshard", "export"])
def test_kill_9_at_random_moments(hf_folder, tmp_path, kind):
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    source, job = job_of(kind, hf_folder("source", SLOW_SHAPE), tmp_path)
    assert run_job(job)
    whole = content(tmp_path / "whole")
    halo = command(source, out, kind=kind)
    rng = random.Random(os.environ.get("HALO_TEST_SEED", "17"))
    for kill in range(KILLS):
        options = ["--workers", str(1 + kill % 2)]
        process = subprocess.Popen(
            [*halo, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        # By files, not by the clock: wherever the machine is in its work when so many are done.
        target = rng.randrange(len(job.tensor_files) + 1)
        while len([*unfinished.glob("sums/*.safetensors.json")]) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        _, message = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), message
        if out.exists():
            assert content(out) == whole
        else:
            refuse_as_model(unfinished)
            refuse_as_model(unfinished / "files")
        if kill % 2 and (files := sorted(unfinished.glob("files/*.safetensors"))):
            files[0].write_bytes(files[0].read_bytes()[:-9])  # as by a disk that lost its last pages
        complete = out.exists() and not unfinished.exists()  # the kill came too late
        if complete or kill % 3 == 2:  # begin anew: early kills are worth as much as late ones
            if not complete:
                finish(halo, out, whole)
            shutil.rmtree(out)
    if unfinished.exists() or not out.exists():
        finish(halo, out, whole)


@pytest.mark.parametrize("kind", ["convert", "export"])
def test_all_but_the_name_is_no_model_yet(hf_folder, tmp_path, kind):
    """Killed just before the rename."""
    _, job = job_of(kind, hf_folder("source", TINY), tmp_path)
    stop_after(job, len(job.tensor_files))
    job.finish(job.files_folder, job.sums())
    with pytest.raises(ValueError, match=f"has not ended; repeat that command, and use {job.out}$"):
        open_model(job.files_folder)
    assert run_job(job)
    open_model(job.out)


def stop_after(job, files):
    """Do the first files of a job as a killed process would leave them."""
    job.begin()
    for shard in job.tensor_files[:files]:
        keep_or_write(job.unfinished, shard, lambda count: None)


def test_finished_files_are_kept_and_torn_ones_redone(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    job = convert_job(source, tmp_path / "out", LAYOUT, max_shard_bytes=20_000)
    stop_after(job, 3)
    files = [job.files_folder / shard.name for shard in job.tensor_files[:3]]
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
    (job.files_folder / "t0-p0-e0-00001.safetensors.unfinished-deadbeef").write_bytes(b"torn")
    before = [path.stat().st_ino for path in files]
    counts = []
    assert run_job(job, advance=counts.append)
    assert sum(counts) == job.nbytes
    after = [(tmp_path / "out" / path.name).stat().st_ino for path in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert not list((tmp_path / "out").glob("*unfinished*"))
    StoredTensors(tmp_path / "out").require_intact()


def test_another_job_does_not_resume_this_one(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    stop_after(convert_job(source, tmp_path / "out", LAYOUT, max_shard_bytes=20_000), 2)
    with pytest.raises(
        ValueError, match=r"out\.unfinished was begun by another job \(it differs in: layout\)"
    ):
        run_job(convert_job(source, tmp_path / "out", FolderLayout(), max_shard_bytes=20_000))
    os.utime(source / "model.safetensors")
    with pytest.raises(ValueError, match="differs in: source_files"):
        run_job(convert_job(source, tmp_path / "out", LAYOUT, max_shard_bytes=20_000))


def test_killed_between_rename_and_tidying_up(hf_folder, tmp_path):
    job = convert_job(hf_folder("source", TINY), tmp_path / "out", LAYOUT, max_shard_bytes=20_000)
    stop_after(job, len(job.tensor_files))
    job.finish(job.files_folder, job.sums())
    job.files_folder.rename(job.out)
    assert run_job(job)
    assert not job.unfinished.exists()
    StoredTensors(job.out).require_intact()


def test_too_little_room_is_seen_before_writing(hf_folder, tmp_path, monkeypatch):
    job = convert_job(hf_folder("source", TINY), tmp_path / "out", LAYOUT)
    monkeypatch.setattr(
        "hypenet_tools.folder_job.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0)
    )
    with pytest.raises(
        ValueError, match=r"out needs 0\.00 GB more but its disk has 0\.00 GB free; free some space"
    ):
        run_job(job)
    assert not list(job.files_folder.iterdir())


def test_disk_that_fills_up_meanwhile(hf_folder, mounted_disk, tmp_path):
    source = hf_folder("source", SLOW_SHAPE)
    job = convert_job(source, tmp_path / "out", LAYOUT, max_shard_bytes=SHARD_BYTES)
    disk = mounted_disk(str(job.nbytes + 20 * 2**20))
    out, unfinished = disk / "out", disk / "out.unfinished"
    process = subprocess.Popen(command(source, out, "--workers", 1), stderr=subprocess.PIPE, text=True)
    while not [*unfinished.glob("sums/*.json")]:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    filler = os.open(disk / "other", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        while True:
            os.write(filler, bytes(2**16))
    os.close(filler)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate()
    assert process.returncode == 1
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {unfinished}/") and "No space left on device" in line
    assert not out.exists()
    kept = {path.name for path in unfinished.glob("sums/*.json")}
    assert kept
    (disk / "other").unlink()
    again = subprocess.run(command(source, out), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    StoredTensors(out).require_intact()


def anonymous_bytes(process):
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    fields = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(fields[0]) if fields else 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(hf_folder, tmp_path):
    """Tensors of 200 MB go through in a few blocks: half a gigabyte is what the README promises."""
    shape = replace(TINY, num_layers=2, hidden_size=1024, vocab_size=50_000, tied_embeddings=False)
    source = hf_folder("source", shape, dtype=torch.float32)
    steps = (
        command(source, tmp_path / "one", "--hybrid", "0"),
        command(tmp_path / "one", tmp_path / "two", kind="reshard"),
        command(tmp_path / "two", tmp_path / "back", "--logits-scaling", 8, kind="export"),
    )
    for step in steps:
        process = subprocess.Popen(step, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process))
            time.sleep(0.005)
        assert process.returncode == 0, process.communicate()[1]
        assert 0 < peak < 2**29, (step, peak)


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_write_that_fails_is_one_sentence_and_resumes(hf_folder, tmp_path):
    source = hf_folder("source", SLOW_SHAPE)
    refused = subprocess.run(
        command(source, tmp_path / "out"),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_file_size,
    )
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and "out.unfinished/files/" in line and "File too large" in line
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command(source, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    StoredTensors(tmp_path / "out").require_intact()


def test_commands_from_download_to_release(hf_folder, tmp_path):
    """convert, inspect, reshard, export, verify, as a user runs them."""
    source, hybrid, slim, back = (
        hf_folder("source", TINY),
        *(tmp_path / n for n in ("hybrid", "slim", "back")),
    )
    planned = halo("convert", source, hybrid, "--hybrid", "1,3", "--tp", 2, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "Nothing was written" in planned.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    for arguments in (
        ("convert", source, hybrid, "--hybrid", "1,3", "--tp", 2, "--seed", 3),
        ("reshard", hybrid, slim, "--dtype", "fp32"),
        ("export", hybrid, back, "--logits-scaling", 8),
    ):
        done = halo(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    facts = halo("inspect", hybrid, "--json")
    assert facts.returncode == 0, facts.stderr
    found = json.loads(facts.stdout)
    assert found["layout"] == {"tensor": 2, "pipeline": 1, "expert": 1}
    assert (found["nan"], found["inf"], found["files_not_matching_their_checksum"]) == (0, 0, [])
    assert set(found["dtypes"]) == {"BF16"}
    assert found["provenance"][0]["seed"] == 3
    equal = halo("verify", hybrid, slim, "--json")
    assert equal.returncode == 1, "other dtypes are other tensors"
    report = json.loads(equal.stdout)
    assert report["tensors"]["equal"] == 0 and report["tensors"]["differing"][0]["max_difference"] == 0
    assert report["logits"]["top_1_agreement"] == 1 and not report["match"]
    assert equal.stderr.count("\n") == 1 and "are not the same model" in equal.stderr
    equal = halo("verify", source, back, "--json")
    report = json.loads(equal.stdout)
    assert equal.returncode == 1
    assert {entry["what"] for entry in report["model"]} == {"mixer_types", "logits_scaling_base"}
    assert len(report["tensors"]["only_in_b"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "nowhere", "out"), "nowhere/config.json does not exist"),
        (("convert", "source", "out", "--tp", 3), "--tp 3 does not divide the 2 key/value heads"),
        (("convert", "source", "out", "--part", "2/2"), "--part 2/2 is not I/N"),
        (("convert", "source", "out", "--hybrid", "1", "--from-hypenet"), "give one of them"),
        (("reshard", "source", "out", "--dtype", "int4"), "--dtype int4 is not one of bf16, fp16, fp32"),
        (("export", "source", "source"), "source exists already"),
        (("verify", "source", "tests"), "tests is neither a Hugging Face folder"),
    ],
)
def test_user_errors_are_one_sentence(hf_folder, tmp_path, capsys, monkeypatch, arguments, message):
    hf_folder("source", TINY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        app([str(argument) for argument in arguments], standalone_mode=False)
    assert not (tmp_path / "out.unfinished" / "files").exists()
