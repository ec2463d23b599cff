"""Our weights folder: a model, or part of one, under Megatron names, without a pickle and for any layout.

    weights.json              the index: every tensor's shape, dtype and chunks; model, layout, provenance
    MANIFEST.json             size and SHA-256 of every other file
    t<i>-p<j>-e<k>-<n>.safetensors   what tensor-, pipeline- and expert-parallel rank (i, j, k) has
    source/                   tokenizer, chat template, generation config and model card of the model

Tensors are whole ones in the sense of Megatron's sharded state dicts: a chunk says where in the whole it lies, so
that a folder written for one layout is read by any other. Chunks follow the layout that it was written for, and a
rank of that layout reads its own files from beginning to end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from durable_files import FolderManifest, read_json, sha256_file, write_text
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.layout import Layout
from sharded_tensors.reader import ChunkedTensors, StoredChunk
from sharded_tensors.rectangles import Chunk
from sharded_tensors.safetensors_format import DTYPE_CODES, DTYPES
from sharded_tensors.views import TensorInfo
from sharded_tensors.writer import Shard

INDEX_FILE = "weights.json"
SOURCE_FOLDER = "source"
FORMAT, VERSION = "hypenet-weights", 1


@dataclass(frozen=True)
class Index:
    """What weights.json says. `model` is None for a part of a model, such as the students of stage 1.

    `provenance` lists how the weights came about, oldest first.
    """

    tensors: Mapping[str, TensorInfo]
    chunks: Mapping[str, Sequence[StoredChunk]]
    layout: Layout
    model: ModelDescription | None
    provenance: Sequence[Mapping[str, Any]]

    @classmethod
    def of_shards(
        cls,
        shards: Iterable[Shard],
        layout: Layout,
        model: ModelDescription | None,
        provenance: Sequence[Mapping[str, Any]],
    ) -> Index:
        tensors: dict[str, TensorInfo] = {}
        chunks: dict[str, list[StoredChunk]] = {}
        for shard in shards:
            for tensor in shard.tensors:
                tensors[tensor.key] = TensorInfo(tensor.view.infos[tensor.key].shape, tensor.dtype)
                stored = StoredChunk(shard.name, tensor.name, tensor.chunk)
                chunks.setdefault(tensor.key, []).append(stored)
        return cls(tensors, chunks, layout, model, provenance)

    def write(self, folder: Path) -> None:
        head = {
            "format": FORMAT,
            "version": VERSION,
            "model": None if self.model is None else self.model.to_json(),
            "layout": asdict(self.layout),
            "provenance": list(self.provenance),
        }
        lines = []
        for name, info in self.tensors.items():
            stored = [
                {"file": c.file, "name": c.name, "offset": c.chunk.offset, "shape": c.chunk.shape}
                for c in self.chunks[name]
            ]
            entry = {"shape": info.shape, "dtype": DTYPE_CODES[info.dtype], "chunks": stored}
            lines.append(f"  {json.dumps(name)}: {json.dumps(entry)}")
        tensors = (
            '"tensors": {\n' + ",\n".join(lines) + "\n }"
        )  # a line per tensor: one can read it, and diff it
        write_text(folder / INDEX_FILE, json.dumps(head, indent=1)[:-2] + ",\n " + tensors + "\n}\n")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """ValueError names the file and what is wrong with it."""
        path = folder / INDEX_FILE
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not the index of a weights folder; give a folder that halo wrote")
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
        chunks: dict[str, list[StoredChunk]] = {}
        for name, entry in content["tensors"].items():
            tensors[name] = TensorInfo(tuple(map(int, entry["shape"])), DTYPES[entry["dtype"]])
            chunks[name] = [
                StoredChunk(
                    _safe_name(c["file"]),
                    str(c["name"]),
                    Chunk(tuple(map(int, c["offset"])), tuple(map(int, c["shape"]))),
                )
                for c in entry["chunks"]
            ]
        model = content["model"]
        return cls(
            tensors,
            chunks,
            Layout(**content["layout"]),
            None if model is None else ModelDescription.from_json(model),
            list(content["provenance"]),
        )


def _safe_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is not a safetensors file of its own folder")
    return name


class WeightsFolder(ChunkedTensors):
    """A weights folder opened for reading; nothing of the tensors is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """ValueError names the file that is missing, cut short, of another shape than the index says, or the tensor
        that the chunks do not make up."""
        self.index = Index.read(folder)
        self.manifest = FolderManifest.read(folder)
        for name, (size, _) in self.manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; copy the folder again")
            if path.stat().st_size != size:
                raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}; copy it again")
        unlisted = {
            c.file for chunks in self.index.chunks.values() for c in chunks
        } - self.manifest.files.keys()
        if unlisted:
            raise ValueError(
                f"{folder / INDEX_FILE} names {min(unlisted)}, which {FolderManifest.FILE_NAME} does not list; copy "
                "the folder again"
            )
        super().__init__(folder, INDEX_FILE, self.index.tensors, self.index.chunks)

    def require_intact(self, part: int = 0, parts: int = 1) -> None:
        """Read every `parts`-th file from number `part` on; ValueError names one that differs from its checksum."""
        for name, (_, digest) in list(self.manifest.files.items())[part::parts]:
            if sha256_file(self.folder / name) != digest:
                raise ValueError(
                    f"{self.folder / name} does not match its checksum; copy it again, or write the folder again"
                )

    def digest(self) -> str:
        """SHA-256 of the manifest, which stands for the content of the whole folder."""
        return sha256_file(self.folder / FolderManifest.FILE_NAME)


def is_weights_folder(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file()


def close_folder(folder: Path, index: Index, sums: Mapping[str, tuple[int, str]]) -> None:
    """Add index and manifest to a folder whose safetensors files are written and hashed already."""
    index.write(folder)
    others = {
        str(path.relative_to(folder)): (path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in sums and path.name != FolderManifest.FILE_NAME
    }
    FolderManifest({**sums, **others}).save(folder)
