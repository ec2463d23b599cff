"""The functions of all kinds of stages, and the entry point of a process that runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console

from halo_cluster import StageResult
from halo_jobs.stages.context import StageContext, layout_of
from halo_jobs.stages.data import run_recall, run_tokenize
from halo_jobs.stages.export import run_export
from halo_jobs.stages.init import run_init
from halo_jobs.stages.measure import run_calibrate, run_evaluate
from halo_jobs.stages.select import run_select
from halo_jobs.stages.training import run_align, run_distill, run_finetune, run_pretrain
from halo_jobs.work import StageWork
from halo_training.trainer import AttemptInProgress
from hypenet_megatron.runtime import ONE_PROCESS, RENDEZVOUS_SECONDS, model_parallel

STAGES: Mapping[str, Callable[[StageContext], StageResult]] = {
    "tokenize": run_tokenize,
    "recall": run_recall,
    "init": run_init,
    "align": run_align,
    "select": run_select,
    "distill": run_distill,
    "finetune": run_finetune,
    "calibrate": run_calibrate,
    "evaluate": run_evaluate,
    "export": run_export,
    "pretrain": run_pretrain,
}


def run_stage(work: StageWork, attempt: AttemptInProgress, console: Console) -> StageResult:
    """Run this process's part of `work`: in the world that its environment describes, or alone."""
    section = work.recipe.training_sections.get(work.id.kind)
    layout = layout_of(work.recipe) if section else ONE_PROCESS
    timeout = section.watchdog_seconds if section else RENDEZVOUS_SECONDS
    with model_parallel(layout, seed=work.recipe.seed, rendezvous_timeout=timeout) as device:
        context = StageContext(**vars(work), console=console, device=device, attempt=attempt, layout=layout)
        return STAGES[work.id.kind](context)
