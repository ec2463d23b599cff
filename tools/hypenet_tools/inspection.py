"""What a model folder contains: sizes, layout, dtypes, provenance, and NaN or infinite values."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from hypenet_tools.hugging_face.weights import count_nan_and_inf
from hypenet_tools.open_model import HUGGING_FACE, OpenedModel
from sharded_tensors.safetensors_format import DTYPE_CODES
from sharded_tensors.writer import Advance

LISTED = 20


def inspect_model(opened: OpenedModel, *, advance: Advance = lambda count: None) -> dict[str, Any]:
    """Facts (JSON) about a model on disk. Reads every tensor once; `advance` is told the number of bytes."""
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    not_finite: dict[str, dict[str, int]] = {}
    for name, info in opened.stored.infos.items():
        code = DTYPE_CODES[info.dtype]
        tensors[code] += 1
        elements[code] += info.elements
        nan = infinite = 0
        for block in opened.stored.rows(name, 0, info.rows):
            of_block = count_nan_and_inf(block)
            nan, infinite = nan + of_block[0], infinite + of_block[1]
            advance(block.nbytes)
        if nan or infinite:
            not_finite[name] = {"nan": nan, "inf": infinite}
    return {
        "folder": str(opened.folder),
        "kind": opened.kind,
        "model": None if opened.metadata.model is None else opened.metadata.model.to_json(),
        "complete": opened.metadata.complete,
        "layout": None if opened.kind == HUGGING_FACE else asdict(opened.metadata.layout),
        "tensors": len(opened.stored),
        "parameters": opened.stored.elements,
        "bytes": opened.stored.nbytes,
        "files": sum(1 for path in opened.folder.glob("*.safetensors")),
        "dtypes": {code: {"tensors": tensors[code], "elements": elements[code]} for code in tensors},
        "nan": sum(entry["nan"] for entry in not_finite.values()),
        "inf": sum(entry["inf"] for entry in not_finite.values()),
        "tensors_not_finite": dict(list(not_finite.items())[:LISTED]),
        "files_not_matching_their_checksum": opened.damaged_files(),
        "provenance": list(opened.metadata.provenance),
    }
