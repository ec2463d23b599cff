"""The safetensors files of a model folder as a lazy mapping. Pickled weights are never opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from durable_files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = {"F32", "BF16", "F16"}  # as safetensors headers spell them


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsWeights(Mapping[str, Tensor]):
    """Tensors of a folder by name. Opening reads all headers; a tensor is read when it is asked for.

    ValueError names the tensor when a value is not finite.
    """

    def __init__(self, folder: Path) -> None:
        """ValueError names the file that is missing, truncated, pickled, or at odds with the index."""
        if (folder / SINGLE_FILE).is_file():
            self.stored = _read_header(folder / SINGLE_FILE)
        elif (folder / INDEX_FILE).is_file():
            self.stored = _read_shards(folder)
        else:
            raise ValueError(_no_weights(folder))
        for name, tensor in self.stored.items():
            if tensor.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, but only float32, bfloat16 and "
                    "float16 are supported; use the weights of the unquantised model"
                )

    def __getitem__(self, name: str) -> Tensor:
        file = self.stored[name].file
        with safe_open(file, framework="pt", device="cpu") as handle:
            tensor = handle.get_tensor(name)
        if not tensor.isfinite().all():
            raise ValueError(
                f"{file}: tensor {name} holds NaN or infinite values; fetch the model again, or use another"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def drop(self, name: str) -> None:
        """Leave a tensor out of the mapping."""
        del self.stored[name]

    def same_content(self, first: str, second: str, rows_at_once: int = 8192) -> bool:
        """Whether two tensors are equal bit for bit, compared piecewise because they may be huge."""
        one, other = self.stored[first], self.stored[second]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        with (
            safe_open(one.file, framework="pt", device="cpu") as one_file,
            safe_open(other.file, framework="pt", device="cpu") as other_file,
        ):
            one_rows, other_rows = one_file.get_slice(first), other_file.get_slice(second)
            return all(
                one_rows[start : start + rows_at_once].equal(other_rows[start : start + rows_at_once])
                for start in range(0, one.shape[0], rows_at_once)
            )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: StoredTensor(path, tuple(piece.get_shape()), str(piece.get_dtype()))
                for name, piece in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); fetch or copy it again"
        ) from None


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_FILE
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of tensor names to files; fetch or copy it again")
    stored: dict[str, StoredTensor] = {}
    for file_name in sorted(set(map(str, weight_map.values()))):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise ValueError(
                f"{index} points at {file_name!r}, which is not a safetensors file of its own folder"
            )
        if not (folder / file_name).is_file():
            raise ValueError(
                f"{folder / file_name} is missing although {index.name} lists it; fetch or copy it again"
            )
        stored |= _read_header(folder / file_name)
    for name, file_name in weight_map.items():
        if name not in stored or stored[name].file.name != file_name:
            raise ValueError(
                f"{folder / file_name} lacks the tensor {name} that {index.name} puts there; fetch it again"
            )
    unlisted = sorted(stored.keys() - weight_map.keys())
    if unlisted:
        raise ValueError(
            f"{stored[unlisted[0]].file} holds the tensor {unlisted[0]} that {index.name} does not list"
        )
    return stored


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give the folder that holds config.json and model.safetensors"
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        return (
            f"{pickled[0]} is a pickle, which can run code when opened and is therefore never read; "
            "save the model with safetensors first"
        )
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; fetch or copy the weights"
