"""TENSORS.json: which rectangle of which tensor lies in which file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from durable_files import FolderManifest, read_json, write_text
from sharded_tensors.rectangles import Rectangle, TensorInfo
from sharded_tensors.safetensors_format import DTYPE_CODES, DTYPES

INDEX_FILE, TRAINING_FILE = "TENSORS.json", "TRAINING.json"
FORMAT, VERSION = "hypenet-megatron tensors", 1
# Names of what a training checkpoint holds beside the weights.
OPTIMIZER_PREFIX, RANDOM_PREFIX = "optimizer.", "random."
_EARLIER_INDEXES = ("weights.json", "INDEX.json")

Sums = Mapping[str, tuple[int, str]]  # file -> (bytes, SHA-256)


def is_weight(name: str) -> bool:
    """Whether a tensor is part of the model, not optimizer or random state."""
    return not name.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))


def stored_name(name: str, rectangle: Rectangle, info: TensorInfo) -> str:
    """Name of a rectangle in its safetensors file: the tensor's own if it is all of it, else with its offset."""
    if rectangle.shape == info.shape:
        return name
    return f"{name}@{','.join(map(str, rectangle.offset))}"


@dataclass(frozen=True)
class StoredRectangle:
    """A rectangle of a tensor, and the file that holds it."""

    file: str
    rectangle: Rectangle


@dataclass(frozen=True)
class Index:
    """Shape and dtype of every tensor, its rectangles, and what the writer of the folder says about it (JSON)."""

    tensors: Mapping[str, TensorInfo]
    rectangles: Mapping[str, Sequence[StoredRectangle]]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Iterable[Index], metadata: Mapping[str, Any]) -> Index:
        """The index of a folder to which several ranks wrote."""
        tensors: dict[str, TensorInfo] = {}
        rectangles: dict[str, list[StoredRectangle]] = {}
        for part in parts:
            tensors |= part.tensors
            for name, stored in part.rectangles.items():
                rectangles.setdefault(name, []).extend(stored)
        return cls(tensors, rectangles, metadata)

    def write(self, folder: Path) -> None:
        head = json.dumps({"format": FORMAT, "version": VERSION, "metadata": self.metadata}, indent=1)
        lines = []
        for name, info in self.tensors.items():
            stored = [
                {"file": s.file, "offset": s.rectangle.offset, "shape": s.rectangle.shape}
                for s in self.rectangles[name]
            ]
            entry = {"shape": info.shape, "dtype": DTYPE_CODES[info.dtype], "rectangles": stored}
            lines.append(f"  {json.dumps(name)}: {json.dumps(entry)}")
        tensors = '"tensors": {\n' + ",\n".join(lines) + "\n }"  # a line per tensor, for readers and diff
        write_text(folder / INDEX_FILE, f"{head[:-2]},\n {tensors}\n}}\n")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """ValueError names the file and what is wrong with it."""
        require_current_format(folder)
        path = folder / INDEX_FILE
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not an index of tensors; give a folder that halo wrote")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path} has format version {content.get('version')!r} but this halo reads {VERSION}; use the halo "
                "that wrote it, or a newer one"
            )
        try:
            return cls._parse(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); restore it or write the folder again") from None

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> Index:
        tensors: dict[str, TensorInfo] = {}
        rectangles: dict[str, list[StoredRectangle]] = {}
        for name, entry in content["tensors"].items():
            tensors[name] = TensorInfo(tuple(map(int, entry["shape"])), DTYPES[entry["dtype"]])
            rectangles[name] = [
                StoredRectangle(
                    _name_in_folder(stored["file"]),
                    Rectangle(tuple(map(int, stored["offset"])), tuple(map(int, stored["shape"]))),
                )
                for stored in entry["rectangles"]
            ]
        return cls(tensors, rectangles, dict(content["metadata"]))


def _name_in_folder(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is not a safetensors file of its own folder")
    return name


def has_index(folder: Path) -> bool:
    """Whether `folder` is a weights folder or a training checkpoint. ValueError for one of an earlier version."""
    require_current_format(folder)
    return (folder / INDEX_FILE).is_file()


def require_current_format(folder: Path) -> None:
    """ValueError if an earlier version wrote `folder`."""
    if not (folder / INDEX_FILE).is_file() and any((folder / name).is_file() for name in _EARLIER_INDEXES):
        raise ValueError(
            f"{folder} was written by an earlier version of hypenet-megatron; convert the model again, "
            "or start the run again under another name"
        )


def finish_folder(folder: Path, written: Sequence[tuple[Index, Sums]], metadata: Mapping[str, Any]) -> None:
    """Add index and manifest to a folder whose safetensors files are written already, by one or several ranks."""
    Index.merged((index for index, _ in written), metadata).write(folder)
    FolderManifest.write(folder, {name: entry for _, sums in written for name, entry in sums.items()})
