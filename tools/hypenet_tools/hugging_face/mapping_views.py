"""The mapping table applied to views: from Hugging Face names to Megatron names and back. Nothing is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypenet_tools.hugging_face.mapping import TensorPlan, hugging_face_shapes, megatron_shapes
from sharded_tensors.views import AssembledTensors, Run, TensorInfo, TensorView


def require_shapes(view: TensorView, expected: Mapping[str, tuple[int, ...]], holder: str) -> None:
    """ValueError unless `view` holds exactly these tensors in these shapes."""
    missing = [name for name in expected if name not in view]
    unexpected = [name for name in view if name not in expected]
    if missing or unexpected:
        problems = [f"lack {_listing(missing)}"] if missing else []
        problems += [f"hold the unexpected {_listing(unexpected)}"] if unexpected else []
        raise ValueError(
            f"{holder} {' and '.join(problems)}; check that the weights, the model config and the list "
            "of attention layers belong together"
        )
    for name, shape in expected.items():
        if view.infos[name].shape != shape:
            raise ValueError(
                f"{holder}: tensor {name} has shape {list(view.infos[name].shape)} but the model config calls for "
                f"{list(shape)}; use the weights and the config of the same model"
            )


def _listing(names: Sequence[str], shown: int = 4) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def megatron_view(hugging_face: TensorView, plan: Sequence[TensorPlan], holder: str) -> TensorView:
    """Hugging Face tensors as Megatron's. ValueError unless `hugging_face` holds exactly the plan's tensors."""
    require_shapes(hugging_face, hugging_face_shapes(plan), holder)
    view = AssembledTensors()
    for entry in plan:
        dtypes = {part: hugging_face.infos[part].dtype for part in entry.parts}
        if len(set(dtypes.values())) > 1:
            found = ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items())
            raise ValueError(
                f"{entry.megatron} is made of tensors of different dtypes ({found}); save them in one dtype"
            )
        runs = [Run(hugging_face, part, start, stop) for part, start, stop in entry.rows()]
        view.add(entry.megatron, TensorInfo(entry.megatron_shape, next(iter(dtypes.values()))), runs)
    return view


def hugging_face_view(megatron: TensorView, plan: Sequence[TensorPlan], holder: str) -> TensorView:
    """The inverse of `megatron_view`, bit for bit."""
    require_shapes(megatron, megatron_shapes(plan), holder)
    view = AssembledTensors()
    for entry in plan:
        dtype = megatron.infos[entry.megatron].dtype
        for name, runs in entry.rows_of_parts().items():
            info = TensorInfo(entry.parts[name], dtype)
            view.add(name, info, [Run(megatron, entry.megatron, start, stop) for start, stop in runs])
    return view
