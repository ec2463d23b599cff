"""Tokenisation, sweep and evaluation by one worker, by several, and after kills: always the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from halo_cluster import RunFolder, StageRecord
from halo_cluster.fan_out.ray_cluster import RayCluster, wait_for_address
from halo_cluster.stage_id import StageId
from halo_jobs.plan import make_plan
from halo_jobs.recipe import ConversionRecipe, FanOutSection, Recipe
from halo_jobs.stages.table import run_stage as run_stage_here


def run_stage(recipe: Recipe, name: str, run: Path, folder: Path) -> Path:
    """One stage of `recipe` in `folder`, from the stages in `run`."""
    plan = make_plan(recipe, lambda source: source.name)
    stage = plan.stages[StageId.parse(name)]
    folders = {before: run / str(before) / "inputs" for before in stage.depends_on}
    attempt = StageRecord(folder).begin_attempt()
    work = replace(plan.work(stage, RunFolder(run)), folder=folder, folders=folders)
    run_stage_here(work, attempt, Console(quiet=True))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a CPU the number of threads decides how sums are cut; workers have as many as OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(pipeline_recipe_content: dict) -> ConversionRecipe:
    return ConversionRecipe.model_validate(pipeline_recipe_content)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, recipe: ConversionRecipe) -> Path:
    """A run that has come as far as the sweep."""
    run = tmp_path_factory.mktemp("run")
    for name in ("tokenize", "recall.128", "init", "align"):
        run_stage(recipe, name, run, run / name / "inputs")
    return run


@pytest.fixture(scope="module")
def by_one_worker(aligned: Path, recipe: ConversionRecipe) -> bytes:
    folder = run_stage(recipe, "select", aligned, aligned / "select" / "one")
    assert len(list((folder / "sweep" / "results").iterdir())) == 7, "one per evaluation, and the divergence"
    return (folder / "selection.json").read_bytes()


# Ray takes a minute: its workers import torch one after the other.
@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.faults)])
def test_bits_do_not_depend_on_the_workers(
    backend: str, aligned: Path, recipe: ConversionRecipe, by_one_worker: bytes, tmp_path: Path
) -> None:
    several = recipe.model_copy(update={"fan_out": FanOutSection(backend=backend, workers=2)})
    folder = run_stage(several, "select", aligned, tmp_path / "select")
    assert (folder / "selection.json").read_bytes() == by_one_worker
    assert len(list((folder / "sweep" / "results").iterdir())) == 7 * 3
    others = {path.stem.partition("-")[0] for path in (folder / "sweep" / "workers").glob("*.heartbeat")}
    assert others == {backend}, "not by the stage's own process"


def test_another_number_of_workers_goes_on_with_the_same_tasks(
    aligned: Path, recipe: ConversionRecipe, by_one_worker: bytes, tmp_path: Path
) -> None:
    several = recipe.model_copy(update={"fan_out": FanOutSection(workers=2)})
    folder = run_stage(several, "select", aligned, tmp_path / "select")
    (folder / "selection.json").unlink()
    kept = sorted((folder / "sweep" / "results").iterdir())
    times = {path: path.stat().st_mtime_ns for path in kept[::2]}
    for path in kept[1::2]:
        path.unlink()
    run_stage(recipe, "select", aligned, folder)
    assert (folder / "selection.json").read_bytes() == by_one_worker
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert sorted((folder / "sweep" / "results").iterdir()) == kept


@pytest.fixture(scope="module")
def evaluated_by_one(aligned: Path, recipe: ConversionRecipe) -> bytes:
    folder = run_stage(recipe, "evaluate.teacher", aligned, aligned / "evaluate.teacher" / "one")
    assert len(list((folder / "tasks" / "results").iterdir())) == 7 + 2, "the suite, and two context lengths"
    return (folder / "evaluation.json").read_bytes()


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.cluster)])
def test_evaluation_by_several(
    backend: str, aligned: Path, recipe: ConversionRecipe, evaluated_by_one: bytes, tmp_path: Path
) -> None:
    several = recipe.model_copy(update={"fan_out": FanOutSection(backend=backend, workers=2)})
    folder = run_stage(several, "evaluate.teacher", aligned, tmp_path / "evaluate.teacher")
    assert (folder / "evaluation.json").read_bytes() == evaluated_by_one
    others = {path.stem.partition("-")[0] for path in (folder / "tasks" / "workers").glob("*.heartbeat")}
    assert others == {backend}, "not by the stage's own process"


def files_of(stores: Path) -> dict[str, bytes]:
    """Content by name of every file of the stores in a folder."""
    paths = [path for path in stores.glob("*/**/*") if path.is_file() and "attempt" not in str(path)]
    return {str(path.relative_to(stores)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.cluster)])
def test_tokens_by_several(
    backend: str, aligned: Path, recipe: ConversionRecipe, tiny_corpus: Path, tmp_path: Path
) -> None:
    text = (tiny_corpus / "text.jsonl").read_text().splitlines(keepends=True)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(5):
        (corpus / f"{number}.jsonl").write_text("".join(text[12 * number : 12 * (number + 1)]))
    section = recipe.corpus.model_copy(update={"train": [str(corpus)]})
    alone = recipe.model_copy(update={"corpus": section})
    several = alone.model_copy(update={"fan_out": FanOutSection(backend=backend, workers=2)})
    found = files_of(run_stage(several, "tokenize", aligned, tmp_path / "tokenize" / "several"))
    assert found == files_of(run_stage(alone, "tokenize", aligned, tmp_path / "tokenize" / "alone"))
    assert {name.partition("/")[0] for name in found} == {"train", "held_out"}


def test_malformed_line_in_a_worker(aligned: Path, recipe: ConversionRecipe, tmp_path: Path) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text('{"text": "The river feeds the garden."}\n{"text": 5}\n')
    update = {"corpus": recipe.corpus.model_copy(update={"train": [str(corpus)]})}
    several = recipe.model_copy(update=update | {"fan_out": FanOutSection(workers=2)})
    with pytest.raises(ValueError, match=r'bad.jsonl:2 is not a JSON object with a "text" string; fix'):
        run_stage(several, "tokenize", aligned, tmp_path / "tokenize")


@pytest.mark.cluster
def test_cluster_that_is_joined_by_address(
    aligned: Path,
    recipe: ConversionRecipe,
    evaluated_by_one: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was started in another folder, and goes on afterwards."""
    monkeypatch.chdir(tmp_path)
    cluster = RayCluster(tmp_path, "shared", cpus=2)
    monkeypatch.chdir(Path(recipe.teacher).parent)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, cluster.environment[name])
    section = FanOutSection(backend="ray", workers=2, ray_address=wait_for_address(cluster.address_file))
    joined = recipe.model_copy(update={"fan_out": section, "teacher": Path(recipe.teacher).name})
    try:
        folder = run_stage(joined, "evaluate.teacher", aligned, tmp_path / "evaluate.teacher")
        assert (folder / "evaluation.json").read_bytes() == evaluated_by_one
        assert cluster.has_head
    finally:
        cluster.end()
