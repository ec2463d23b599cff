"""Runs a recipe: all stages that are not done, then the report. The same call resumes a run that was stopped."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from halo_cluster import Attempt, PlannedStage, RunFolder, StageResult, run_stages, storage_errors
from halo_cluster.jobs import StageJob
from halo_cluster.reconcile import Reconciler, RetryPolicy, submit_chain
from halo_cluster.slurm import Slurm
from halo_jobs.checks import check_recipe, named_in_errors
from halo_jobs.plan import TOKENIZE, Plan, make_plan
from halo_jobs.recipe import Recipe, recipe_yaml
from halo_jobs.sources import SourceChecksums
from halo_jobs.stages.context import StageContext, layout_of
from halo_jobs.stages.table import STAGES
from halo_jobs.work import StageWork
from halo_jobs.worker import run_in_processes
from halo_reports.build import build_report
from hypenet_megatron.runtime import ONE_PROCESS, model_parallel, reset_seeds


def _checked_sources(recipe: Recipe, run: RunFolder) -> SourceChecksums:
    """The known checksums of the recipe's sources. ValueError if a stage that is not done cannot succeed."""
    sources = SourceChecksums(run.folder)
    plan = make_plan(recipe, sources.digest)
    done = {stage.id: stage.record(run).done() is not None for stage in plan.stages.values()}
    if not all(done.values()):
        check_recipe(recipe, tokenized=done[TOKENIZE])
    return sources


def _published_plan(recipe: Recipe, run: RunFolder, sources: SourceChecksums, console: Console) -> Plan:
    """Read the sources that are new or changed, and write the resulting plan to the run folder."""
    with storage_errors(run.folder):
        sources.read(make_plan(recipe, sources.digest).sources, console)
    plan = make_plan(recipe, sources.digest)
    run.write_plan(recipe_yaml(recipe), plan.input_hashes())
    return plan


def _run_stage(work: StageWork, console: Console, device: torch.device, attempt: Attempt) -> StageResult:
    work.record_in(attempt.folder)
    if work.processes > 1:
        # A rank uses this process's GPU, so free its memory. Hooks put models in reference cycles, so collect first.
        gc.collect()
        torch.cuda.empty_cache()
        return run_in_processes(attempt.folder, work.to_json(), work.processes)
    reset_seeds(work.recipe.seed)
    trains = work.id.kind in work.recipe.training_sections
    layout = layout_of(work.recipe) if trains else ONE_PROCESS
    context = StageContext(**vars(work), console=console, device=device, attempt=attempt, layout=layout)
    return STAGES[work.id.kind](context)


def run_recipe(recipe: Recipe, runs: Path, console: Console) -> Path:
    """Run every stage of `recipe` in `runs`/<recipe name> and return the path of its report.html.

    Stages that are already done are kept, also those of an earlier recipe with the same inputs.
    """
    run = RunFolder(runs / recipe.name)
    sources = _checked_sources(recipe, run)
    with run.opened():
        plan = _published_plan(recipe, run, sources, console)
        with model_parallel(seed=recipe.seed) as device:
            planned = []
            for stage in plan.stages.values():
                run_here = partial(_run_stage, plan.work(stage, run), console, device)
                planned.append(PlannedStage(stage.stage, stage.record(run), run_here, tuple(stage.stages)))
            run_stages(planned, console)
        return _write_report(run)


def _write_report(run: RunFolder) -> Path:
    folders = {record.stage: record.folder for record in run.planned()}
    with storage_errors(run.folder):
        return build_report(run.folder, folders, run.folder / "report.html")


def _slurm(recipe: Recipe, retries_by_job: int = 0) -> Slurm:
    with named_in_errors("cluster"):
        recipe.cluster.check()
    return Slurm(recipe.cluster, ("-m", "halo_jobs.stage_job"), retries_by_job)


def _stage_jobs(plan: Plan, run: RunFolder) -> list[StageJob]:
    processes, nodes = plan.recipe.layout.processes, plan.recipe.cluster.nodes
    if processes % nodes:
        raise ValueError(f"layout.processes {processes} is not a multiple of cluster.nodes {nodes}")
    jobs = []
    for stage in plan.stages.values():
        work = plan.work(stage, run)
        jobs.append(
            StageJob(stage.stage, stage.record(run), work.to_json(), work.processes, tuple(stage.stages))
        )
    return jobs


def run_recipe_on_slurm(
    recipe: Recipe, runs: Path, console: Console, *, detach: bool = False
) -> Path | None:
    """Like `run_recipe`, with every stage as a Slurm job. With `detach`, submit all jobs and return None."""
    run = RunFolder(runs / recipe.name)
    sources = _checked_sources(recipe, run)
    slurm = _slurm(recipe, recipe.cluster.retries if detach else 0)
    run.prepare()
    jobs = _stage_jobs(_published_plan(recipe, run, sources, console), run)
    if detach:
        for name, job in submit_chain(jobs, slurm).items():
            console.print(f"{name}: job {job}", highlight=False)
        return None
    policy = RetryPolicy(recipe.cluster.retries, recipe.cluster.backoff_seconds)
    Reconciler(jobs, slurm, console, policy).run()
    return _write_report(run)


def print_batch_script(recipe: Recipe, runs: Path, console: Console) -> None:
    """Print the batch script of the stage with the most processes."""
    run = RunFolder(runs / recipe.name)
    jobs = _stage_jobs(make_plan(recipe, SourceChecksums(run.folder).digest), run)
    job = max(jobs, key=lambda job: job.processes)
    console.print(f"\nBatch script of stage {job.name}:", highlight=False)
    console.print(_slurm(recipe).preview(job), markup=False, highlight=False, soft_wrap=True)


