"""Any division of a tensor into rectangles can be stored, and any rectangle of it read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_tensors.index import Index, finish_folder
from sharded_tensors.reader import StoredTensors
from sharded_tensors.rectangles import Rectangle, TensorInfo
from sharded_tensors.views import LocalRectangles, TensorsInMemory, copy_blocks
from sharded_tensors.writer import FileTensor, TensorFile, write_files

NAME = "weight"


def part_of(tensor: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
    place = zip(rectangle.offset, rectangle.shape, strict=True)
    return tensor[tuple(slice(offset, offset + size) for offset, size in place)].contiguous()


def cut(rectangle: Rectangle, draw: Callable[[st.SearchStrategy[int]], int], depth: int) -> list[Rectangle]:
    """The rectangle divided by cuts that need not go through all of it: no grid, as with a distributed optimizer."""
    axis = draw(st.integers(0, len(rectangle.shape) - 1))
    if depth == 0 or rectangle.shape[axis] < 2:
        return [rectangle]
    size = draw(st.integers(1, rectangle.shape[axis] - 1))
    halves = []
    for start, length in ((0, size), (size, rectangle.shape[axis] - size)):
        offset, shape = list(rectangle.offset), list(rectangle.shape)
        offset[axis] += start
        shape[axis] = length
        halves += cut(Rectangle(tuple(offset), tuple(shape)), draw, depth - 1)
    return halves


def write(folder: Path, tensor: torch.Tensor, rectangles: list[Rectangle]) -> Index:
    """Two ranks' files, each with every other rectangle."""
    info = TensorInfo(tuple(tensor.shape), tensor.dtype)
    files = []
    for rank in range(2):
        own = {(NAME, rectangle): part_of(tensor, rectangle) for rectangle in rectangles[rank::2]}
        view = LocalRectangles({NAME: info}, own)
        content = [FileTensor(view, *key, tensor.dtype) for key in own]
        files.append(TensorFile(f"rank-{rank}.safetensors", content))
    written = [write_files(folder, [file]) for file in files]
    finish_folder(folder, written, {"by": "a test"})
    return Index.read(folder)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_rectangle_of_every_division_is_read_exactly(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    everything = Rectangle((0,) * len(shape), shape)
    rectangles = cut(everything, data.draw, depth=3)
    wanted = cut(everything, data.draw, depth=3)[0]
    with TemporaryDirectory() as folder:
        write(Path(folder), tensor, rectangles)
        stored = StoredTensors(Path(folder))
        assert stored.index.metadata == {"by": "a test"}
        assert stored[NAME].equal(tensor)
        found = torch.empty(wanted.shape)
        copy_blocks(stored.rectangle(NAME, wanted), found)
        assert found.equal(part_of(tensor, wanted))


def test_a_rectangle_is_read_from_its_own_files_alone(tmp_path: Path) -> None:
    """A tensor-parallel rank of a column-parallel layer needs nothing of the other ranks."""
    tensor = torch.randn(6, 8)
    halves = [Rectangle((0, 0), (6, 4)), Rectangle((0, 4), (6, 4))]
    write(tmp_path, tensor, halves)
    stored = StoredTensors(tmp_path)
    (tmp_path / "rank-1.safetensors").unlink()
    mine = torch.empty(6, 4)
    copy_blocks(stored.rectangle(NAME, halves[0]), mine)
    assert mine.equal(tensor[:, :4])
    with pytest.raises((ValueError, OSError), match=r"rank-1\.safetensors"):
        list(stored.rectangle(NAME, halves[1]))


@pytest.mark.parametrize("change", ["gap", "overlap", "beyond"])
def test_rectangles_that_are_not_the_tensor_are_refused(tmp_path: Path, change: str) -> None:
    tensor = torch.randn(4, 6)
    halves = [Rectangle((0, 0), (4, 3)), Rectangle((0, 3), (4, 3))]
    index = write(tmp_path, tensor, halves)
    first, second = index.rectangles[NAME]
    other = {
        "gap": [first],
        "overlap": [first, replace(second, rectangle=Rectangle((0, 2), (4, 3)))],
        "beyond": [first, replace(second, rectangle=Rectangle((1, 3), (4, 3)))],
    }[change]
    finish_folder(tmp_path, [(replace(index, rectangles={NAME: other}), {})], {})
    with pytest.raises(ValueError, match="the rectangles of weight leave a gap or overlap"):
        StoredTensors(tmp_path)


def test_dtypes_and_empty_tensors_keep_every_bit(tmp_path: Path) -> None:
    tensors = TensorsInMemory(
        {
            "double": torch.randn(3, dtype=torch.float64),
            "integers": torch.tensor([-(2**62), 7]),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "none": torch.empty(0, dtype=torch.float64),
        }
    )
    file = TensorFile("a.safetensors", [FileTensor.entire(tensors, name) for name in tensors])
    finish_folder(tmp_path, [write_files(tmp_path, [file])], {})
    stored = StoredTensors(tmp_path)
    assert stored.keys() == tensors.keys()
    assert all(stored[name].equal(tensors[name]) for name in tensors)
