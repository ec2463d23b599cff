"""init (HALO stage 0): the Hugging Face teacher and its student mixers as Megatron weights."""

from __future__ import annotations

from halo_jobs.models import DTYPES, write_shape
from halo_jobs.recipe import resolve_path
from halo_jobs.stages.context import StageContext, StageResult
from halo_jobs.stages.training import STUDENT_WEIGHTS, TEACHER_WEIGHTS
from halo_jobs.training.checkpoints import save_tensors
from hypenet_tools import read_model_folder, student_tensors


def run_init(context: StageContext) -> StageResult:
    recipe = context.conversion
    teacher = read_model_folder(resolve_path(recipe.teacher))
    if teacher.mixer_types is not None:
        raise ValueError(f"{teacher.folder} is a HypeNet already; give a Qwen3 model as teacher")
    dtype = DTYPES[recipe.precision]
    weights = {key: tensor.to(dtype) for key, tensor in teacher.megatron_tensors().items()}
    save_tensors(context.folder / TEACHER_WEIGHTS, weights)
    save_tensors(context.folder / STUDENT_WEIGHTS, student_tensors(weights, teacher.shape, recipe.seed))
    outputs = [context.folder / TEACHER_WEIGHTS, context.folder / STUDENT_WEIGHTS]
    summary = {
        "teacher": teacher.shape.name,
        "layers": teacher.shape.num_layers,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }
    return StageResult([*outputs, write_shape(context.folder, teacher.shape)], summary)
