"""The safetensors files of a Hugging Face folder as a view. Pickled weights are never opened."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from durable_files import read_json
from sharded_tensors.rectangles import TensorInfo
from sharded_tensors.safetensors_format import DTYPES, Header, open_mapped, read_header
from sharded_tensors.views import TensorView, blocks

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Per dtype of weights: the integers of its bits, the bits of magnitude, and the magnitude of infinity (above it: NaN).
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
}


def is_finite(block: Tensor) -> bool:
    """Whether no element is NaN or infinite. Works on the bits, which is several times faster than on the values."""
    integers, mask, infinity = _BITS[block.dtype]
    bits = block.reshape(-1).view(integers)
    return all(int((part & mask).max()) < infinity for part in bits.split(2**19))


def count_nan_and_inf(block: Tensor) -> tuple[int, int]:
    integers, mask, infinity = _BITS[block.dtype]
    magnitude = block.reshape(-1).view(integers) & mask
    return int((magnitude > infinity).sum()), int((magnitude == infinity).sum())


class SafetensorsWeights(TensorView):
    """Tensors of a model folder by name. Opening reads all headers; rows are read on demand.

    ValueError names the tensor when a value is not finite, unless `check_finite` is False.
    """

    def __init__(self, folder: Path, *, check_finite: bool = True) -> None:
        """ValueError names the file that is missing, truncated, pickled, or at odds with the index."""
        if (folder / SINGLE_FILE).is_file():
            self.files = dict.fromkeys(headers := read_header(folder / SINGLE_FILE), folder / SINGLE_FILE)
        elif (folder / INDEX_FILE).is_file():
            headers, self.files = _read_shards(folder)
        else:
            raise ValueError(_no_weights(folder))
        for name, (dtype, _) in headers.items():
            if DTYPES.get(dtype) not in _BITS:
                raise ValueError(
                    f"{self.files[name]}: tensor {name} has dtype {dtype}, but only float32, bfloat16 and "
                    "float16 are supported; use the weights of the unquantised model"
                )
        self.infos = {name: TensorInfo(shape, DTYPES[dtype]) for name, (dtype, shape) in headers.items()}
        self.check_finite = check_finite
        self._open = cache(open_mapped)

    def rows(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        matrix = self._open(self.files[name]).get_tensor(name).view(-1, self.infos[name].columns)
        for block in blocks(matrix[start:stop]):
            if self.check_finite and not is_finite(block):
                raise ValueError(
                    f"{self.files[name]}: tensor {name} holds NaN or infinite values; fetch the model again, "
                    "or use another"
                )
            yield block

    def drop(self, name: str) -> None:
        """Leave a tensor out of the view."""
        del self.infos[name], self.files[name]

    def require_tied(self, head: str, embedding: str) -> None:
        """ValueError if a head is stored that differs from the embedding to which the config ties it."""
        if embedding not in self:
            return
        info = self.infos[head]
        blocks_of_both = zip(
            self.rows(head, 0, info.rows), self.rows(embedding, 0, info.rows), strict=True
        )
        if info != self.infos[embedding] or not all(one.equal(other) for one, other in blocks_of_both):
            raise ValueError(
                f"{self.files[head]}: {head} differs from {embedding} although config.json ties them; set "
                "tie_word_embeddings to false to keep the head"
            )


def _read_shards(folder: Path) -> tuple[Header, dict[str, Path]]:
    index = folder / INDEX_FILE
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of tensor names to files; fetch or copy it again")
    headers: Header = {}
    files: dict[str, Path] = {}
    for file_name in sorted(set(map(str, weight_map.values()))):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise ValueError(
                f"{index} points at {file_name!r}, which is not a safetensors file of its own folder"
            )
        path = folder / file_name
        if not path.is_file():
            raise ValueError(f"{path} is missing although {index.name} lists it; fetch or copy it again")
        header = read_header(path)
        for name in header:
            if name in files:
                raise ValueError(
                    f"{path} and {files[name]} both hold the tensor {name}; fetch the model again"
                )
        headers |= header
        files |= dict.fromkeys(header, path)
    for name, file_name in weight_map.items():
        if name not in files or files[name].name != file_name:
            raise ValueError(
                f"{folder / file_name} lacks the tensor {name} that {index.name} puts there; fetch it again"
            )
    unlisted = sorted(files.keys() - weight_map.keys())
    if unlisted:
        raise ValueError(
            f"{files[unlisted[0]]} holds the tensor {unlisted[0]} that {index.name} does not list"
        )
    return headers, files


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
