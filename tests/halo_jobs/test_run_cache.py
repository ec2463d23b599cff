"""A run is a cache: a changed recipe runs what depends on the change, through the command that users type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from durable_files import read_json
from halo_cluster import RunFolder
from halo_jobs.commands.gc import gc
from tests.support.halo import checked_halo, halo_command, set_options

AFTER_FINETUNE = {
    "finetune.hybrid",
    "calibrate.hybrid",
    "evaluate.hybrid",
    "export",
    "finetune.uniform",
    "calibrate.uniform",
    "evaluate.uniform",
}
CHANGE = "finetune.learning_rate=2e-3"
HOOK = """
import os, sys
def _hook(event, arguments, log=os.environ["OPENED_LOG"], below=os.environ["OPENED_BELOW"]):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(below):
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
            file.write(arguments[0] + "\\n")
sys.addaudithook(_hook)
"""


def _hooked_halo(environment: dict[str, str], *arguments: object) -> None:
    """Run a command in interpreters that begin with HOOK, ranks included."""
    subprocess.run(halo_command(*arguments), env=environment, timeout=280, check=True, capture_output=True)


def _done(run: Path) -> dict[Path, int]:
    return {path.relative_to(run).parent: path.stat().st_mtime_ns for path in run.glob("*/*/DONE.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request) -> tuple[Path, Path]:
    """(recipe file, run folder) of a finished run."""
    folder = tmp_path_factory.mktemp("cache")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(request.getfixturevalue("pipeline_recipe_content")))
    checked_halo("run", recipe, "--runs", folder / "runs")
    return recipe, folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def changed(finished, tmp_path_factory) -> Path:
    """A copy of the finished run, after a run with another learning rate of finetune."""
    recipe, whole = finished
    run = tmp_path_factory.mktemp("changed") / "tiny"
    shutil.copytree(whole, run)
    checked_halo("run", recipe, "--runs", run.parent, "--set", CHANGE)
    return run


def test_dry_run_names_the_change_and_writes_nothing(finished) -> None:
    recipe, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    printed = checked_halo("run", recipe, "--runs", run.parent, "--set", CHANGE, "--dry-run")
    lines = {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in printed.splitlines()}
    assert lines["distill.hybrid"] == lines["align"] == lines["tokenize"] == "kept"
    assert lines["finetune.uniform"] == "new, because finetune.learning_rate changed from 0.001 to 0.002"
    assert lines["export"] == "new, because finetune.hybrid is new"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_changed_learning_rate_runs_exactly_the_stages_after_it(finished, changed) -> None:
    before, after = _done(finished[1]), _done(changed)
    assert {folder: after[folder] for folder in before} == before
    assert sorted(folder.parts[0] for folder in after if folder not in before) == sorted(AFTER_FINETUNE)


def test_changed_checkpoint_interval_runs_nothing_and_becomes_the_runs_recipe(finished, changed) -> None:
    recipe, before = finished[0], _done(changed)
    settings = ("--set", CHANGE, "--set", "align.checkpoint_every=2", "--set", "finetune.spike_factor=30")
    printed = checked_halo("run", recipe, "--runs", changed.parent, "--set", CHANGE, *settings, "--dry-run")
    assert " new" not in printed and " resumes" not in printed
    checked_halo("run", recipe, "--runs", changed.parent, *settings)
    assert _done(changed) == before
    assert yaml.safe_load((changed / "recipe.yaml").read_text())["align"]["checkpoint_every"] == 2
    (attempt,) = changed.glob("align/*/attempt.1")
    assert yaml.safe_load((attempt / "recipe.yaml").read_text())["align"]["checkpoint_every"] == 4


def test_compare_shows_the_change_and_what_came_of_it(finished, changed) -> None:
    seen = json.loads(checked_halo("compare", finished[1], changed, "--json"))
    assert seen["recipe"]["finetune.learning_rate"] == [0.001, 0.002]
    assert not any(key.startswith("distill") for key in seen["recipe"])
    one, other = seen["results"]["finetune.hybrid final loss"]
    assert one != other
    one, other = seen["results"]["distill.hybrid final loss"]
    assert one == other
    table = checked_halo("compare", finished[1], changed)
    assert "finetune.learning_rate" in table and "hybrid perplexity" in table


def test_status_and_export_follow_the_latest_recipe(finished, changed, tmp_path) -> None:
    stages = {stage["stage"]: stage for stage in json.loads(checked_halo("status", changed, "--json"))["stages"]}
    old = {folder.parts[0]: folder.parts[1] for folder in _done(finished[1])}
    assert stages["align"]["input_hash"] == old["align"]
    assert stages["finetune.hybrid"]["input_hash"] != old["finetune.hybrid"]
    checked_halo("export", changed, tmp_path / "release")
    (folder,) = changed.glob(f"export/{stages['export']['input_hash']}/hypenet")
    (weights,) = folder.glob("*.safetensors")
    (released,) = (tmp_path / "release").glob("*.safetensors")
    assert released.read_bytes() == weights.read_bytes()


def test_gc_lists_and_removes_what_the_latest_recipe_does_not_refer_to(finished, changed, tmp_path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(changed, run)
    old = {folder for folder in _done(finished[1]) if folder.parts[0] in AFTER_FINETUNE}
    listed = checked_halo("gc", run)
    assert all(folder.name in listed for folder in old)
    assert old <= _done(run).keys(), "without --yes nothing goes"
    began = next((run / min(old)).glob("attempt.1"))
    ended = (began / "exit.json").read_bytes()
    (began / "exit.json").unlink()
    process = read_json(began / "started.json") | {"host": "another"}
    (began / "started.json").write_text(json.dumps(process))
    with pytest.raises(ValueError, match=f"{min(old)} of an earlier recipe is still in use"):
        gc(run, yes=True)
    assert old <= _done(run).keys(), "what a running stage may still read stays"
    (began / "exit.json").write_bytes(ended)
    killed = run / "align" / "0123456789ab.unfinished-0a1b2c3d"  # by a `halo gc` that was killed
    killed.mkdir()
    checked_halo("gc", run, "--yes")
    assert not killed.exists()
    assert not old & _done(run).keys()
    checked_halo("run", finished[0], "--runs", run.parent, "--set", CHANGE)
    assert _done(run).keys() == _done(changed).keys() - old


def test_gc_refuses_a_run_of_which_it_cannot_know_what_is_in_use(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: old\n")
    RunFolder(tmp_path).stage("align", "0123456789ab").begin_attempt().end("failed", "killed")
    with pytest.raises(ValueError, match="has no plan"):
        gc(tmp_path, yes=True)
    assert (tmp_path / "align").exists()


def test_a_removed_corpus_is_not_missed_and_no_rank_reads_a_source(finished, tmp_path) -> None:
    recipe, whole = finished
    shutil.copytree(whole, tmp_path / "tiny")
    moved = tmp_path / "corpus"
    (corpus,) = yaml.safe_load(recipe.read_text())["corpus"]["train"]
    shutil.copytree(corpus, moved)
    settings = ("--runs", tmp_path, "--set", f"corpus.train=[{moved}]")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "opened.txt"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path / 'hook'}:{os.environ.get('PYTHONPATH', '')}",
        "OPENED_LOG": str(log),
        "OPENED_BELOW": str(moved),
    }
    before = _done(tmp_path / "tiny")
    _hooked_halo(environment, "run", recipe, *settings)
    assert _done(tmp_path / "tiny") == before, "the same text in another place is the same source"
    assert set(log.read_text().splitlines()) == {str(moved / "text.jsonl")}, "read once, for its checksum"
    log.unlink()
    _hooked_halo(environment, "run", recipe, *settings)
    _hooked_halo(environment, "status", tmp_path / "tiny")
    _hooked_halo(environment, "run", recipe, *settings, *set_options(CHANGE, "layout.processes=2"))
    assert not log.exists()
    assert list(tmp_path.glob("tiny/finetune.hybrid/*/attempt.1/rank-1.txt"))
    shutil.rmtree(moved)
    checked_halo("run", recipe, *settings, "--set", "calibrate.windows=1")
    assert len(_done(tmp_path / "tiny")) > len(before) + len(AFTER_FINETUNE)
