"""Weights folders: the sentence for each kind of damage, and that there is no pickle."""

import json

import pytest

from hypenet_tools.convert import convert_job
from hypenet_tools.folder_job import run_job
from hypenet_tools.layout import FolderLayout
from hypenet_tools.open_model import open_model
from sharded_tensors.index import INDEX_FILE
from sharded_tensors.reader import StoredTensors
from tests.support.tiny_models import TINY

KEY = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture
def weights(hf_folder, tmp_path):
    run_job(
        convert_job(hf_folder("source", TINY), tmp_path / "weights", FolderLayout(2, 2), max_shard_bytes=30_000)
    )
    return tmp_path / "weights"


@pytest.fixture
def edit(weights):
    """Changes the index, keeping the manifest's size of it true."""

    def change(what):
        path = weights / INDEX_FILE
        content = json.loads(path.read_text())
        what(content)
        path.write_text(json.dumps(content))
        manifest = json.loads((weights / "MANIFEST.json").read_text())
        manifest[INDEX_FILE][0] = path.stat().st_size
        (weights / "MANIFEST.json").write_text(json.dumps(manifest))

    return change


def rectangles(content):
    return content["tensors"][KEY]["rectangles"]


def test_only_safetensors_and_json(weights):
    kinds = {path.suffix for path in weights.glob("*")} - {""}
    assert kinds == {".safetensors", ".json"}
    StoredTensors(weights).require_intact()


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_truncated_file(weights, keep):
    path = weights / "t0-p0-e0-00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t0-p0-e0-00001\.safetensors has \d+ bytes instead of \d+"):
        StoredTensors(weights)


def test_missing_file(weights):
    (weights / "t1-p1-e0-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"t1-p1-e0-00001\.safetensors is missing"):
        StoredTensors(weights)


def test_flipped_bit(weights):
    path = weights / "t1-p0-e0-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = StoredTensors(weights)
    with pytest.raises(ValueError, match=r"t1-p0-e0-00002\.safetensors does not match its checksum"):
        opened.require_intact()
    assert open_model(weights).damaged_files() == ["t1-p0-e0-00002.safetensors"]


@pytest.mark.parametrize("name", ["../t0-p0-e0-00001.safetensors", "/etc/passwd", "TENSORS.json", 3])
def test_index_that_leaves_the_folder(weights, edit, name):
    edit(lambda content: rectangles(content)[0].update(file=name))
    with pytest.raises(
        ValueError, match=r"TENSORS\.json is damaged .*not a safetensors file of its own folder"
    ):
        StoredTensors(weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it is not a list of files with sizes and checksums"),
        ({"TENSORS.json": 3}, "it is not a list of files with sizes and checksums"),
        ({"TENSORS.json": ["much", "a"]}, "it is not a list of files with sizes and checksums"),
        ({"../TENSORS.json": [3, "a"]}, r"it names '\.\./TENSORS\.json', which is not in its folder"),
        ({"/etc/passwd": [3, "a"]}, "it names '/etc/passwd', which is not in its folder"),
    ],
)
def test_manifest_that_is_none(weights, content, message):
    (weights / "MANIFEST.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"MANIFEST\.json is damaged: " + message):
        StoredTensors(weights)


def test_file_that_the_manifest_does_not_have(weights, edit):
    edit(lambda content: rectangles(content)[0].update(file="other.safetensors"))
    with pytest.raises(ValueError, match=r"names other\.safetensors, which MANIFEST\.json does not list"):
        StoredTensors(weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: rectangles(content).pop(),
        lambda content: rectangles(content)[1].update(offset=[0, 0]),
        lambda content: rectangles(content).append(rectangles(content)[0]),
    ],
    ids=["gap", "overlap", "twice"],
)
def test_rectangles_that_do_not_cover_the_tensor(weights, edit, change):
    edit(change)
    with pytest.raises(ValueError, match=rf"the rectangles of {KEY} leave a gap or overlap"):
        StoredTensors(weights)


def test_index_of_another_dtype_than_the_files(weights, edit):
    edit(lambda content: content["tensors"][KEY].update(dtype="F16"))
    with pytest.raises(ValueError, match=rf"safetensors and TENSORS\.json disagree about the tensor {KEY}"):
        StoredTensors(weights)[KEY]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="other"), "is not an index of tensors"),
        (lambda content: content.update(version=2), "has format version 2 but this halo reads 1"),
        (lambda content: content["metadata"].pop("layout"), "is damaged .*layout"),
        (lambda content: content["tensors"][KEY].update(dtype="F8_E4M3"), "is damaged .*F8_E4M3"),
    ],
)
def test_unreadable_index(weights, edit, change, message):
    edit(change)
    with pytest.raises(ValueError, match=r"TENSORS\.json " + message):
        open_model(weights)


def test_folder_of_neither_kind(tmp_path):
    with pytest.raises(ValueError, match=r"neither a Hugging Face folder .* nor a weights folder"):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["weights.json", "INDEX.json"])
def test_folder_of_an_earlier_version_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"was written by an earlier version of hypenet-megatron; convert"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match="was written by an earlier version"):
        StoredTensors(tmp_path)
