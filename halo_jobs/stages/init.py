"""init (HALO stage 0): writes the Hugging Face teacher and its student mixers as weights folders."""

from __future__ import annotations

from typing import Any

from halo_cluster import StageResult
from halo_jobs.recipe import resolve_path
from halo_jobs.stages.context import StageContext
from halo_jobs.stages.training import STUDENT_WEIGHTS, TEACHER_WEIGHTS
from halo_training.models import DTYPES, write_shape
from hypenet_tools.hugging_face.aux_files import source_digest
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.hugging_face.initialise import students_of
from hypenet_tools.model_weights import read_weights, save_tensors


def run_init(context: StageContext) -> StageResult:
    recipe = context.conversion
    teacher = read_model_folder(resolve_path(recipe.teacher))
    dtype = DTYPES[recipe.precision]
    outputs = [context.folder / TEACHER_WEIGHTS, context.folder / STUDENT_WEIGHTS]
    origin: dict[str, Any] = {
        "step": "convert",
        "from": teacher.description.shape.name,
        "digest": source_digest(teacher.folder),
    }
    save_tensors(
        outputs[0], teacher.megatron_view(), model=teacher.description, dtype=dtype, provenance=[origin]
    )
    weights = read_weights(outputs[0])  # in the recipe's precision, which the students start from
    students = [origin, {"step": "students", "mixer": recipe.student, "seed": recipe.seed}]
    mixers = students_of(weights, teacher.description.shape, recipe.student, recipe.seed)
    save_tensors(outputs[1], mixers, provenance=students)
    summary = {
        "teacher": teacher.description.shape.name,
        "layers": teacher.description.shape.num_layers,
        "parameters": weights.elements,
    }
    return StageResult([*outputs, write_shape(context.folder, teacher.description.shape)], summary)
