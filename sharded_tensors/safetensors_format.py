"""Dtypes and headers of safetensors files, and their tensors as memory-mapped pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {  # by their names in safetensors headers
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

Header = dict[str, tuple[str, tuple[int, ...]]]


def open_mapped(path: Path) -> Any:
    """An open file. The elements of its `get_tensor(name)` are pages of the file: nothing is read before it is used."""
    return safe_open(path, framework="pt", device="cpu")


def read_header(path: Path) -> Header:
    """Name -> (dtype code, shape). ValueError if the file is truncated or its tensors overlap or leave a gap."""
    try:
        with open_mapped(path) as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); fetch or copy it again"
        ) from None
