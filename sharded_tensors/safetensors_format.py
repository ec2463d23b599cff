"""What a safetensors file says about its tensors, and the tensors themselves as pages of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # as safetensors headers spell them
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsFiles:
    """Open safetensors files, memory-mapped; opened again in a process that this is sent to."""

    def __init__(self) -> None:
        self._handles: dict[Path, Any] = {}

    def tensor(self, path: Path, name: str) -> Tensor:
        """A tensor whose elements are the pages of the file: nothing is read before it is used."""
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt", device="cpu")
        return self._handles[path].get_tensor(name)

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": {}}


Header = dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: Path) -> Header:
    """Name -> (dtype as the header spells it, shape). Overlaps and gaps are refused, as is a file cut short."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: (str(piece.get_dtype()), tuple(piece.get_shape())) for name, piece in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); fetch or copy it again"
        ) from None
