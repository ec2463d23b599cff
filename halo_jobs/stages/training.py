"""The training stages: pretrain, align, distill, finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halo_cluster import StageResult
from halo_jobs.recipe import TrainingSection
from halo_jobs.stages.context import TRAIN_STORE, StageContext
from halo_training.models import is_student_key, write_shape
from halo_training.objectives import AlignmentObjective, DistillationObjective, NextTokenObjective, Objective
from hypenet_megatron.presets import ModelShape
from hypenet_tools.model_weights import save_weights
from hypenet_tools.open_model import open_model
from sharded_tensors.reader import NameFilter

TEACHER_WEIGHTS, STUDENT_WEIGHTS, HYBRID_WEIGHTS = "teacher", "students", "hybrid"


def _train_and_publish(
    context: StageContext,
    section: TrainingSection,
    objective: Objective,
    weights: str,
    *,
    began_from: Path | None = None,
    keep_keys: NameFilter | None = None,
) -> StageResult:
    """Train to the last step and write the weights. The checkpoints stay until the stage is published.

    `began_from` is the weights folder that training starts from. The new folder continues its provenance.
    """
    summary: dict[str, Any] = context.train(section, objective, keep_keys).run()
    folder = context.folder / weights
    earlier = open_model(began_from).metadata.provenance if began_from else []
    step = {"step": context.name, "run": context.recipe.name, "inputs": context.folder.name}
    save_weights(folder, objective.model, keep_keys, provenance=[*earlier, step])
    return StageResult([folder, context.folder / "metrics.jsonl"], summary)


def run_pretrain(context: StageContext) -> StageResult:
    recipe = context.pretraining
    vocabulary = context.store(TRAIN_STORE).tokenizer.vocab_size
    shape = ModelShape(name=recipe.name, vocab_size=vocabulary, **recipe.shape.model_dump())
    objective = NextTokenObjective(context.builder(shape).fresh_teacher(recipe.seed), context.layout)
    result = _train_and_publish(context, recipe.pretrain, objective, TEACHER_WEIGHTS)
    return StageResult([*result.outputs, write_shape(context.folder, shape)], result.summary)


def run_align(context: StageContext) -> StageResult:
    start = context.before("init")
    model = context.builder().aligned(start / TEACHER_WEIGHTS, start / STUDENT_WEIGHTS)
    objective = AlignmentObjective(model, context.layout)
    return _train_and_publish(
        context,
        context.conversion.align,
        objective,
        STUDENT_WEIGHTS,
        began_from=start / STUDENT_WEIGHTS,
        keep_keys=is_student_key,
    )


def run_distill(context: StageContext) -> StageResult:
    builder = context.builder()
    teacher_weights = context.before("init") / TEACHER_WEIGHTS
    layers = context.attention_layers
    students = context.before("align") / STUDENT_WEIGHTS
    student = builder.hybrid_from_parts(teacher_weights, students, layers, context.recipe.seed)
    objective = DistillationObjective(student, builder.teacher(teacher_weights), context.layout)
    return _train_and_publish(
        context, context.conversion.distill, objective, HYBRID_WEIGHTS, began_from=students
    )


def run_finetune(context: StageContext) -> StageResult:
    distilled = context.before("distill", context.variant) / HYBRID_WEIGHTS
    model = context.builder().hybrid(distilled, context.attention_layers)
    objective = NextTokenObjective(model, context.layout)
    return _train_and_publish(
        context, context.conversion.finetune, objective, HYBRID_WEIGHTS, began_from=distilled
    )
