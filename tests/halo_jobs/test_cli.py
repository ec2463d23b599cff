"""The command beyond a whole run: signals, full disks, bad data, and the small commands."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from durable_files import read_json, write_json
from halo_jobs.cli import app
from halo_jobs.commands.run import command_name
from halo_reports.monitoring.readings import StageReading
from tests.support.halo import error_sentence, halo, halo_command
from tokenized_data import TokenStore, tokenize_text


def _weights(run: Path) -> str:
    (manifest,) = run.glob("export/*/hypenet/SHA256SUMS")
    return next(line for line in manifest.read_text().splitlines() if "safetensors" in line)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory, pipeline_recipe_content
) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """(recipe file, run folder, what the command said) of an uninterrupted run without baselines."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = folder / "tiny.yaml"
    content = {**pipeline_recipe_content, "select": {"context_length": 128, "items": 4}}
    recipe.write_text(yaml.safe_dump(content))
    # A fresh interpreter: what libraries say while they are imported must not reach the terminal.
    command = halo_command("run", recipe, "--runs", folder / "runs")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe, folder / "runs" / "tiny", done


def test_nothing_but_progress_on_the_terminal(finished):
    _, run, done = finished
    assert done.stderr == ""
    assert "Warning" not in done.stdout
    assert f"Report: {(run / 'report.html').as_uri()}\n" in done.stdout
    (log,) = run.glob("align/*/attempt.1/log.txt")
    assert "UserWarning" in log.read_text(), "the attempt's log has what the terminal was spared"


@pytest.mark.cluster
def test_sweep_and_evaluations_on_ray(finished, tmp_path):
    recipe, whole, _ = finished
    options = ("--runs", tmp_path, "--executor", "ray", "--set", "fan_out.workers=2")
    done = halo("run", recipe, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "tiny"
    assert _weights(run) == _weights(whole)
    for stage, result in (("select", "selection.json"), ("evaluate.*", "evaluation.json")):
        found = {path.relative_to(run): path.read_bytes() for path in run.glob(f"{stage}/*/{result}")}
        assert found == {
            path.relative_to(whole): path.read_bytes() for path in whole.glob(f"{stage}/*/{result}")
        }
    workers = {path.name.partition("-")[0] for path in run.glob("*/*/*/workers/*.heartbeat")}
    assert workers == {"ray"}, "nothing was swept or evaluated by the stages' own processes"


def test_printed_command_uses_the_model_without_asking(finished):
    _, run, done = finished
    command = done.stdout.splitlines()[-1].strip()
    assert command == f"halo generate {run} 'The state of the Union is'"
    used = subprocess.run(
        command,
        shell=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (used.returncode, used.stderr) == (0, "")
    assert len(used.stdout) > len("The state of the Union is\n")
    assert used.stdout.startswith("The state of the Union is")


@pytest.mark.parametrize(
    ("invoked", "on_path", "shown"),
    [
        (".venv/bin/halo", None, ".venv/bin/halo"),
        (".venv/bin/halo", "/usr/bin/halo", ".venv/bin/halo"),
        ("/usr/bin/halo", "/usr/bin/halo", "halo"),
        ("/src/halo_jobs/cli.py", None, "halo"),
    ],
)
def test_printed_command_is_one_that_the_user_can_call(monkeypatch, invoked, on_path, shown):
    monkeypatch.setattr(sys, "argv", [invoked])
    monkeypatch.setattr(shutil, "which", lambda name: on_path)
    assert command_name() == shown


def test_finished_run_to_a_folder_to_upload(finished, tmp_path):
    _, run, _ = finished
    done = halo("export", run, tmp_path / "release", "--shard-gb", "0.0001")
    assert done.returncode == 0, done.stdout + done.stderr
    (published,) = run.glob("export/*/hypenet")
    card = (tmp_path / "release" / "README.md").read_text()
    assert card == (published / "README.md").read_text()
    assert "## Scores" in card and "## Data" in card and "layer selection" in card
    assert 'license: "apache-2.0"' in card, "the teacher's"
    assert len(list((tmp_path / "release").glob("model-*.safetensors"))) > 2
    same = halo("verify", published, tmp_path / "release", "--json")
    assert same.returncode == 0, same.stdout + same.stderr
    assert json.loads(same.stdout)["match"] is True
    assert json.loads(same.stdout).keys() <= words_of_help("verify")


def test_weights_of_a_stage_say_how_they_came_about(finished):
    _, run, _ = finished
    (weights,) = run.glob("finetune.hybrid/*/hybrid")
    done = halo("inspect", weights, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts.keys() <= words_of_help("inspect")
    steps = [step["step"] for step in facts["provenance"]]
    assert steps == ["convert", "students", "align", "distill.hybrid", "finetune.hybrid"]
    assert facts["files_not_matching_their_checksum"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on_to_the_same_weights(finished, tmp_path, number):
    recipe, whole, _ = finished
    rng = random.Random(f"{os.environ.get('HALO_TEST_SEED', '5')} {number}")
    command = halo_command("run", recipe, "--runs", tmp_path)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    # By stage, not by the clock: on a fast machine all of the run is over in four seconds.
    stage = rng.choice(["init", "align", "select", "distill.hybrid", "finetune.hybrid"])
    while not (tmp_path / "tiny" / stage).exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 0.3))
    # A terminal's Ctrl-C reaches every process of the foreground, kill only the one.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    if (
        number == signal.SIGTERM and process.returncode == 75
    ):  # it came during a training, which then saves first
        assert re.fullmatch(
            r"\w+(\.\w+)?: stopped by SIGTERM after step \d of \d, which is saved in \S+/checkpoints/step-\d{8}; "
            r"the same command resumes there\n",
            stderr,
        )
    else:
        assert process.returncode == 130
        assert stderr == "interrupted; the same command resumes\n"
    with pytest.raises(ProcessLookupError):  # nobody is left of its session
        os.killpg(process.pid, 0)
    again = halo("run", recipe, "--runs", tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert _weights(tmp_path / "tiny") == _weights(whole)


def test_training_asked_to_stop_saves_first(finished, tmp_path):
    recipe, _, _ = finished
    changes = ("align.steps=100000", "align.checkpoint_every=100000", "align.recall_share=0")
    settings = [word for change in changes for word in ("--set", change)]
    process = subprocess.Popen(
        halo_command("run", recipe, "--runs", tmp_path, *settings), stderr=subprocess.PIPE, text=True
    )
    while not any(path.read_text().count("\n") >= 2 for path in tmp_path.glob("tiny/align/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    (align,) = (tmp_path / "tiny" / "align").iterdir()
    done = len((align / "metrics.jsonl").read_text().splitlines())
    (checkpoint,) = (align / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{done:08d}"
    assert stderr == (
        f"align: stopped by SIGUSR2 after step {done} of 100000, which is saved in {checkpoint}; "
        "the same command resumes there\n"
    )
    training = read_json(checkpoint / "TRAINING.json")
    assert training["step"] == done and training["consumed_samples"] == 4 * done
    assert training["recipe_hash"] == align.name and training["section"]["learning_rate"] == 1e-3
    end = read_json(align / "attempt.1" / "exit.json")
    assert end["state"] == "interrupted" and "stopped by SIGUSR2" in end["reason"]


@pytest.fixture
def small_disk(mounted_disk) -> Path:
    """Large enough for init, too small for align."""
    return mounted_disk("1200k")


def test_full_disk(finished, small_disk):
    recipe, whole, _ = finished
    message = error_sentence(halo("run", recipe, "--runs", small_disk), 1)
    (align,) = (small_disk / "tiny" / "align").iterdir()
    assert f"{align} cannot be written: No space left on device" in message
    assert "free some space there" in message
    kept = {path: path.stat().st_mtime_ns for path in small_disk.rglob("DONE.json")}
    assert [path.parent.parent.name for path in sorted(kept)] == ["init", "recall.128", "tokenize"]
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    again = halo("run", recipe, "--runs", small_disk)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert _weights(small_disk / "tiny") == _weights(whole)


def test_read_only_disk(finished, small_disk):
    recipe, _, _ = finished
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = error_sentence(halo("run", recipe, "--runs", small_disk / "runs"), 1)
    assert f"{small_disk / 'runs'}" in message and "remount it writable" in message


def test_training_that_diverges(finished, tmp_path):
    recipe, _, _ = finished
    settings = ["--set", "align.learning_rate=1e30", "--set", "align.warmup_steps=0"]
    message = error_sentence(halo("run", recipe, "--runs", tmp_path, *settings), 1)
    assert "stage align failed: " in message and "lower learning_rate" in message
    (saved,) = (tmp_path / "tiny" / "align").glob("*/bad_batch.json")
    batch = read_json(saved)
    assert batch["step"] >= 2 and len(batch["windows"]) == 4
    assert {window["source"] for window in batch["windows"]} <= {"train", "recall"}


def test_teacher_that_is_not_finite(finished, tiny_teacher, tmp_path):
    recipe, _, _ = finished
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    file, name = teacher / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file)
    message = error_sentence(halo("run", recipe, "--runs", tmp_path, "--set", f"teacher={teacher}"), 2)
    assert f"{file}: tensor {name} holds NaN or infinite values; " in message


def test_malformed_line(tiny_corpus, tiny_tokenizer, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text((tiny_corpus / "text.jsonl").read_text() + '{"text": "cut sho')
    message = error_sentence(halo("tokenize", text, "--tokenizer", tiny_tokenizer, "--out", tmp_path / "store"), 2)
    assert f"{text}:61 " in message
    assert sorted(tmp_path.iterdir()) == [text]


def test_corrupt_parquet_ends_a_run(finished, tmp_path):
    recipe, _, _ = finished
    text = tmp_path / "text.parquet"
    text.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    message = error_sentence(halo("run", recipe, "--runs", tmp_path, "--set", f"corpus.train=[{text}]"), 2)
    assert f"{text} is not a readable parquet file" in message and "download it again" in message


def test_store_of_another_tokenizer(finished, tiny_corpus, tiny_tokenizer, tmp_path):
    """As an attempt might have left it that was killed before the run's tokenizer was replaced."""
    recipe, whole, _ = finished
    (stage,) = (whole / "tokenize").iterdir()
    foreign = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer, foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    (foreign / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))
    store = tmp_path / "runs" / "tiny" / "tokenize" / stage.name / "train"
    store.parent.mkdir(parents=True)
    tokenize_text([tiny_corpus], foreign, store)
    message = error_sentence(halo("run", recipe, "--runs", tmp_path / "runs"), 2)
    assert f"{store} was made with the tokenizer" in message
    assert "tokenize the text again" in message


def test_status_and_report_of_an_unfinished_run(finished, tmp_path):
    _, whole, _ = finished
    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    for stage in ("export", "evaluate.hybrid"):
        shutil.rmtree(run / stage)
    (run / "report.html").unlink()
    (attempt,) = (run / "finetune.hybrid").glob("*/attempt.1")
    (attempt.parent / "DONE.json").unlink()
    end = {**read_json(attempt / "exit.json"), "state": "failed", "reason": "the [disk] was full"}
    (attempt / "exit.json").write_text(json.dumps(end))
    with open(attempt.parent / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 4, "lo')
    seen = halo("status", run)
    assert seen.returncode == 0, seen.stderr
    rows = {line.split()[0]: line for line in seen.stdout.splitlines()[:-1] if line.strip()}
    last = json.loads((attempt.parent / "metrics.jsonl").read_text().splitlines()[2])
    assert "failed" in rows["finetune.hybrid"] and f"{last['loss']:.4g}" in rows["finetune.hybrid"]
    assert "done" in rows["align"]
    assert seen.stdout.splitlines()[-1] == "finetune.hybrid failed: the [disk] was full"
    written = halo("report", run)
    assert written.returncode == 0, written.stderr
    page = (run / "report.html").read_text()
    assert "Layer importance" in page or "Layers that keep attention" in page


def test_status_of_what_is_no_run(tmp_path):
    assert "is not a run folder" in error_sentence(halo("status", tmp_path), 2)


def test_tokenize_makes_a_store_once(tiny_corpus, tiny_tokenizer, tmp_path):
    arguments = ("tokenize", tiny_corpus, "--tokenizer", tiny_tokenizer, "--out", tmp_path / "store")
    killed = {"host": socket.gethostname(), "pid": 1, "birth": "an earlier process with this number"}
    (tmp_path / "store.unfinished-deadbeef").mkdir()
    write_json(tmp_path / "store.unfinished-deadbeef" / "owner.json", killed)
    made = halo(*arguments)
    assert made.returncode == 0, made.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    store = TokenStore.open(tmp_path / "store")
    assert f"{store.num_tokens:,} tokens in 60 documents" in made.stdout
    assert "already exists" in error_sentence(halo(*arguments), 2)


def test_help_loads_nothing_heavy():
    """Every command is in the help, and neither torch nor zarr has to be there for it."""
    probe = (
        "import sys; from halo_jobs.cli import app; "
        "print([m for m in ('torch', 'megatron', 'zarr', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    shown = halo("--help")
    assert shown.returncode == 0
    for command in ("demo", "run", "status", "logs", "metrics", "report", "tokenize", "generate", "doctor"):
        assert f"│ {command} " in shown.stdout


def words_of_help(command: str) -> set[str]:
    return set(re.findall(r"\w+", CliRunner().invoke(app, [command, "--help"]).output))


def test_keys_of_status_are_in_its_help():
    assert {field.name for field in fields(StageReading)} | {"queue"} <= words_of_help("status")


def test_inspect_without_json_is_readable(finished):
    _, run, _ = finished
    (weights,) = run.glob("finetune.hybrid/*/hybrid")
    shown = halo("inspect", weights)
    assert shown.returncode == 0, shown.stderr
    assert f"folder: {weights}\nkind: " in shown.stdout and "\nlayout:\n  tensor: 1\n" in shown.stdout


def test_version_and_short_help():
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"halo {version('hypenet-megatron')}\n")
    assert CliRunner().invoke(app, ["status", "-h"]).output == CliRunner().invoke(app, ["status", "--help"]).output


def test_shell_completion_knows_the_commands():
    words = {"_HALO_COMPLETE": "complete_bash", "COMP_WORDS": "halo re", "COMP_CWORD": "1"}
    completed = CliRunner().invoke(app, [], prog_name="halo", env=words)
    assert completed.output.split() == ["report", "reshard"]
