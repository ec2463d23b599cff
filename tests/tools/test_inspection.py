"""What `halo inspect` counts and what `halo verify` notices."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypenet_tools.convert import convert_job, reshard_job
from hypenet_tools.folder_job import run_job
from hypenet_tools.inspection import inspect_model
from hypenet_tools.layout import FolderLayout
from hypenet_tools.open_model import open_model
from hypenet_tools.verify import verify
from tests.support.tiny_models import TINY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_counted(hf_folder, dtype):
    source = hf_folder("source", TINY, dtype=dtype)
    tensors = load_file(source / "model.safetensors")
    up, norm = "model.layers.2.mlp.up_proj.weight", "model.norm.weight"
    tensors[up].view(-1)[[5, 700, 3839]] = float("nan")
    tensors[up].view(-1)[9] = -float("inf")
    tensors[norm][47] = float("inf")
    save_file(tensors, source / "model.safetensors")
    report = inspect_model(open_model(source))
    assert report["tensors_not_finite"] == {up: {"nan": 3, "inf": 1}, norm: {"nan": 0, "inf": 1}}
    assert (report["nan"], report["inf"]) == (3, 2)
    assert report["files_not_matching_their_checksum"] == ["model.safetensors"]


def test_sizes_dtypes_layout_and_the_way_it_came_about(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    tensors = load_file(source / "model.safetensors")
    tensors = {name: x.float() if "norm" in name else x for name, x in tensors.items()}
    save_file(tensors, source / "model.safetensors")
    assert run_job(convert_job(source, tmp_path / "one", FolderLayout(), hybrid="1,3", seed=5))
    assert run_job(reshard_job(open_model(tmp_path / "one"), tmp_path / "two", FolderLayout(2, 2)))
    counted = []
    report = inspect_model(open_model(tmp_path / "two"), advance=counted.append)
    assert report["kind"] == "weights folder"
    assert report["layout"] == {"tensor": 2, "pipeline": 2, "expert": 1}
    assert report["model"]["mixer_types"] == ("lightning", "attn", "lightning", "attn")
    assert {"BF16", "F32"} == report["dtypes"].keys()
    assert report["dtypes"]["F32"]["tensors"] == 4 * 4 + 1, "two norms of a layer, two of its heads, the last"
    assert report["parameters"] == sum(entry["elements"] for entry in report["dtypes"].values())
    of_dtypes = 2 * report["dtypes"]["BF16"]["elements"] + 4 * report["dtypes"]["F32"]["elements"]
    assert report["bytes"] == of_dtypes and sum(counted) >= of_dtypes
    steps = [(step["step"], step.get("hybrid"), step.get("seed")) for step in report["provenance"]]
    assert steps == [("convert", [1, 3], 5), ("reshard", None, None)]
    assert all(len(step["digest"]["sha256"]) == 64 for step in report["provenance"])


def test_verify_notices_a_bit_that_flipped_on_the_disk(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    assert run_job(convert_job(source, tmp_path / "weights", FolderLayout(2)))
    assert verify(open_model(source), open_model(tmp_path / "weights"))["match"]
    path = tmp_path / "weights" / "t1-p0-e0-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    report = verify(open_model(source), open_model(tmp_path / "weights"))
    assert not report["match"]
    assert report["files_not_matching_their_checksum"] == {str(tmp_path / "weights"): [path.name]}
    assert len(report["tensors"]["differing"]) == 1
    assert report["tensors"]["compared"] == report["tensors"]["equal"] + 1
