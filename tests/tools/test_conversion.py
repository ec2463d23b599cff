"""Model folders to weights folders, between layouts, and back: bits, refusals, resuming."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypenet_megatron.presets import HYPENET_PRESETS, QWEN3_SHAPES
from hypenet_tools.convert import attention_layers_from, convert_job, import_job, reshard_job
from hypenet_tools.export import export_job
from hypenet_tools.folder_job import JobPart, run_job
from hypenet_tools.hugging_face.config import ModelDescription
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.hugging_face.mapping import megatron_shapes
from hypenet_tools.layout import FolderLayout
from hypenet_tools.open_model import open_model
from hypenet_tools.verify import compare_tensors
from sharded_tensors.reader import StoredTensors
from tests.support.conversions import hybrid_tensors, student_tensors
from tests.support.tiny_models import HYBRID, TINY, tiny

ONE = FolderLayout()


def convert(source, out, layout=ONE, **options):
    assert run_job(convert_job(source, out, layout, **options))
    return StoredTensors(out)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one
    )


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000], ids=["one file", "several files"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", QWEN3_SHAPES)
def test_round_trip_of_every_size(hf_folder, tmp_path, name, tied, max_shard_bytes):
    shape = replace(tiny(QWEN3_SHAPES[name]), tied_embeddings=tied)
    source = hf_folder("source", shape, max_shard_bytes=max_shard_bytes)
    layout = FolderLayout(tensor=2, pipeline=2, expert=2 if shape.experts else 1)
    weights = convert(source, tmp_path / "weights", layout, max_shard_bytes=max_shard_bytes)
    assert same(weights, read_model_folder(source).megatron_view())
    job = export_job(open_model(tmp_path / "weights"), tmp_path / "back", max_shard_bytes=max_shard_bytes)
    assert run_job(job)
    assert (tmp_path / "back" / "SHA256SUMS").read_text() == (source / "SHA256SUMS").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(hf_folder, tmp_path, dtype):
    source = hf_folder("source", TINY, dtype=dtype)
    weights = convert(source, tmp_path / "weights", FolderLayout(2))
    assert {info.dtype for info in weights.infos.values()} == {dtype}
    assert same(weights, read_model_folder(source).megatron_view())


def test_every_layout_to_every_other(hf_folder, tmp_path):
    shape = tiny(QWEN3_SHAPES["qwen3-30b-a3b"])
    expected = read_model_folder(source := hf_folder("source", shape)).megatron_view()
    layouts = [FolderLayout(1, 1, 1), FolderLayout(2, 1, 2), FolderLayout(1, 4, 4), FolderLayout(2, 2, 2)]
    for begin in layouts:
        convert(source, tmp_path / "begin", begin, max_shard_bytes=30_000)
        for end in layouts:
            job = reshard_job(open_model(tmp_path / "begin"), tmp_path / "end", end, max_shard_bytes=30_000)
            assert run_job(job)
            found = StoredTensors(tmp_path / "end")
            found.require_intact()
            assert same(found, expected), (begin, end)
            assert [step["step"] for step in open_model(found.folder).metadata.provenance] == ["convert", "reshard"]
            shutil.rmtree(tmp_path / "end")
        shutil.rmtree(tmp_path / "begin")


def test_chunks_are_what_the_ranks_hold(hf_folder, tmp_path):
    weights = convert(hf_folder("source", TINY), tmp_path / "weights", FolderLayout(2, 2))
    whole = weights["decoder.layers.3.mlp.linear_fc1.weight"]
    mine = load_file(tmp_path / "weights" / "t1-p1-e0-00001.safetensors")
    parts = [tensor for name, tensor in mine.items() if name.startswith("decoder.layers.3.mlp.linear_fc1")]
    gate, up = whole.chunk(2)
    assert torch.cat(parts).equal(torch.cat([gate[40:], up[40:]]))
    assert {name.split("@")[0] for name in mine if "layers.0." in name} == set()
    projection = next(
        tensor for name, tensor in mine.items() if "layers.3.self_attention.linear_proj" in name
    )
    assert projection.equal(weights["decoder.layers.3.self_attention.linear_proj.weight"][:, 32:])


def test_hybrid_is_stage_0(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    weights = convert(source, tmp_path / "weights", FolderLayout(2), hybrid="1,3", seed=5)
    teacher = read_model_folder(source).megatron_view()
    students = student_tensors(teacher, TINY, 5)
    assert same(weights, hybrid_tensors(teacher, students, TINY, (1, 3), 5))
    assert open_model(weights.folder).model.mixer_types == HYBRID
    (step,) = open_model(weights.folder).metadata.provenance
    assert (step["hybrid"], step["seed"]) == ([1, 3], 5)


def test_hybrid_presets_and_layers():
    for preset in HYPENET_PRESETS.values():
        found = attention_layers_from(preset.name, preset.shape)
        assert found == (preset.attention_layers, preset.logits_scaling_base)
    assert attention_layers_from("3,1", TINY) == ((1, 3), None)
    with pytest.raises(ValueError, match=r"hypenet-9b is for qwen3-8b \(36 layers"):
        attention_layers_from("hypenet-9b", TINY)
    with pytest.raises(ValueError, match="--hybrid some is neither one of hypenet-2b"):
        attention_layers_from("some", TINY)
    with pytest.raises(ValueError, match=r"attention layers \[4\] do not exist"):
        attention_layers_from("1,4", TINY)


def test_a_hypenet_survives_import_and_export(hf_folder, tmp_path):
    source = hf_folder("source", TINY, HYBRID, max_shard_bytes=20_000)
    assert run_job(import_job(source, tmp_path / "weights", FolderLayout(2, 2)))
    assert run_job(export_job(open_model(tmp_path / "weights"), tmp_path / "back", max_shard_bytes=20_000))
    assert (tmp_path / "back" / "SHA256SUMS").read_text() == (source / "SHA256SUMS").read_text()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["attn_logits_scaling"] == "hype 7"


def test_export_of_an_untrained_hybrid_says_so(hf_folder, tmp_path):
    source = hf_folder("Qwen3-tiny", TINY)
    settings = {"top_p": 0.95, "eos_token_id": [89, 3]}
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert(source, tmp_path / "weights", hybrid="1,3", seed=5)
    job = export_job(open_model(tmp_path / "weights"), tmp_path / "out", logits_scaling_base=9.0)
    assert run_job(job)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0\nbase_model: Qwen3-tiny\n" in card
    assert "**Not trained**" in card
    assert "seed 5" in card
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {**settings, "pad_token_id": 89}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attn_logits_scaling"] == "hype 9"


def test_slim_copy_in_another_dtype(hf_folder, tmp_path):
    exact = convert(hf_folder("source", TINY, dtype=torch.float32), tmp_path / "weights")
    job = reshard_job(open_model(tmp_path / "weights"), tmp_path / "slim", FolderLayout(), dtype=torch.bfloat16)
    assert run_job(job)
    slim = StoredTensors(tmp_path / "slim")
    assert all(slim[name].equal(exact[name].bfloat16()) for name in exact)
    assert open_model(slim.folder).metadata.provenance[-1]["dtype"] == "BF16"


def stage_1(tensors):
    """The reference's stage-1 checkpoint: a teacher mixer and a student mixer in every layer, wrapped twice."""
    wrapped = {}
    for name, tensor in tensors.items():
        if ".self_attn." not in name:
            wrapped["model." + name] = tensor
            continue
        head, tail = name.split(".self_attn.")
        attention = int(head.split(".")[2]) in (1, 3)
        if not tail.startswith("o_gate"):
            wrapped[f"model.{head}.self_attn.{'teacher' if attention else 'student'}_layer.{tail}"] = tensor
        other = "student" if attention else "teacher"
        wrapped[f"model.{head}.self_attn.{other}_layer.{tail}"] = torch.zeros(2)
    return wrapped


def stage_2(tensors):
    """Of its stage 2: teacher and student whole, side by side, the student with a stored tied head."""
    teacher = {f"teacher_model.{name}": torch.zeros(2) for name in tensors}
    head = {"student_model.lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    return {**teacher, **{f"student_model.{name}": tensor for name, tensor in tensors.items()}, **head}


def test_checkpoints_of_the_references_stage_2(hf_folder, tmp_path):
    source = hf_folder("source", TINY, HYBRID)
    expected = dict(read_model_folder(source).megatron_view())
    save_file(stage_2(load_file(source / "model.safetensors")), source / "model.safetensors")
    assert run_job(import_job(source, tmp_path / "weights", FolderLayout(2)))
    assert same(StoredTensors(tmp_path / "weights"), expected)


def test_checkpoints_of_the_references_stage_1_get_gates(hf_folder, tmp_path):
    source = hf_folder("source", TINY, HYBRID)
    expected = read_model_folder(source).tensors
    expected = {name: expected[name] for name in expected}
    save_file(stage_1(load_file(source / "model.safetensors")), source / "model.safetensors")
    assert run_job(import_job(source, tmp_path / "weights", FolderLayout(2), seed=4))
    found = open_model(tmp_path / "weights")
    hybrid = found.hugging_face()
    gates = {f"model.layers.{layer}.self_attn.o_gate.weight" for layer in (1, 3)}
    assert all(hybrid[name].equal(expected[name]) for name in expected.keys() - gates)
    assert {step["seed"] for step in found.metadata.provenance} == {4}
    assert found.metadata.provenance[0]["new_gates"] == [1, 3]
    for name in gates:
        assert 0.01 < hybrid[name].float().std() < 0.03
    del expected, hybrid
    stored = load_file(source / "model.safetensors")
    del stored["model.model.layers.0.self_attn.student_layer.z_proj.weight"]
    save_file(stored, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.self_attn\.z_proj\.weight"):
        import_job(source, tmp_path / "other", FolderLayout())


def test_import_and_convert_take_their_own_kind(hf_folder, tmp_path):
    with pytest.raises(ValueError, match="is a HypeNet already; import it with --from-hypenet"):
        convert_job(hf_folder("hybrid", TINY, HYBRID), tmp_path / "out", FolderLayout())
    with pytest.raises(ValueError, match="describes a Qwen3, not a HypeNet; leave --from-hypenet out"):
        import_job(hf_folder("teacher", TINY), tmp_path / "out", FolderLayout())
    moe = hf_folder("moe", tiny(QWEN3_SHAPES["qwen3-235b-a22b"]))
    with pytest.raises(ValueError, match="mixture of experts, which can be a teacher but not a hybrid"):
        convert_job(moe, tmp_path / "out", FolderLayout(), hybrid="1,3")
    convert(moe, tmp_path / "weights")
    with pytest.raises(ValueError, match="is a Hugging Face folder; use halo convert"):
        reshard_job(open_model(moe), tmp_path / "out", FolderLayout())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (FolderLayout(tensor=4), "--tp 4 does not divide the 2 key/value heads of source; choose one of 1, 2"),
        (FolderLayout(pipeline=3), "--pp 3 does not divide the 4 layers of source; choose one of 1, 2, 4"),
        (FolderLayout(expert=2), "--ep 2 does not divide the 1 experts"),
    ],
)
def test_layouts_that_do_not_divide(hf_folder, tmp_path, layout, message):
    with pytest.raises(ValueError, match=message):
        convert_job(hf_folder("source", TINY), tmp_path / "out", layout)
    assert not (tmp_path / "out.unfinished").exists()


def test_dense_vocabulary_must_divide(hf_folder, tmp_path):
    source = hf_folder("source", replace(TINY, vocab_size=97))
    with pytest.raises(ValueError, match="--tp 2 does not divide the 97 vocabulary entries"):
        convert_job(source, tmp_path / "out", FolderLayout(2))


def test_nothing_is_overwritten(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already; remove it or choose another name"):
        run_job(convert_job(source, tmp_path / "out", FolderLayout()))
    assert list((tmp_path / "out").iterdir()) == []
    convert(source, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights exists already"):
        convert(source, tmp_path / "weights")


def test_parts_together_publish(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    jobs = [convert_job(source, tmp_path / "out", FolderLayout(2), max_shard_bytes=20_000) for _ in range(3)]
    assert not run_job(jobs[1], part=JobPart(1, 3))
    assert not run_job(jobs[0], part=JobPart(0, 3))
    assert not (tmp_path / "out").exists()
    assert run_job(jobs[2], part=JobPart(2, 3))
    assert run_job(jobs[1], part=JobPart(1, 3)), "a part that comes once more finds all done"
    assert same(StoredTensors(tmp_path / "out"), read_model_folder(source).megatron_view())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    with pytest.raises(ValueError, match="files, too few for 99 parts"):
        run_job(convert_job(source, tmp_path / "other", FolderLayout()), part=JobPart(0, 99))


def test_progress_adds_up_with_several_threads(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    job = convert_job(source, tmp_path / "out", FolderLayout(2), max_shard_bytes=20_000)
    counts = []
    assert run_job(job, workers=2, advance=counts.append)
    assert sum(counts) == job.nbytes == read_model_folder(source).tensors.nbytes
    assert same(StoredTensors(tmp_path / "out"), read_model_folder(source).megatron_view())


def test_values_that_are_no_numbers_stop_a_conversion(hf_folder, tmp_path):
    source = hf_folder("source", TINY, max_shard_bytes=20_000)
    path = sorted(source.glob("*.safetensors"))[2]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path)
    job = convert_job(source, tmp_path / "out", FolderLayout(2), max_shard_bytes=20_000)
    with pytest.raises(ValueError, match=f"{path.name}: tensor {name} holds NaN or infinite values"):
        run_job(job, workers=2)
    assert not (tmp_path / "out").exists()


def test_the_mapping_covers_the_published_mixtures():
    """235B-A22B at its real size: names and shapes only."""
    shape = QWEN3_SHAPES["qwen3-235b-a22b"]
    plan = ModelDescription(shape, None, None).plan
    assert sum(len(entry.parts) for entry in plan) == 94 * (9 + 3 * 128) + 3
    key = "decoder.layers.93.mlp.experts.experts.linear_fc1.weight"
    assert megatron_shapes(plan)[key] == (128, 3072, 4096)


def test_comparison_finds_one_bit(hf_folder, tmp_path):
    source = hf_folder("source", TINY)
    convert(source, tmp_path / "weights", FolderLayout(2))
    one, other = open_model(source).hugging_face(), open_model(tmp_path / "weights").hugging_face()
    assert compare_tensors(one, other) == []
    stored = load_file(source / "model.safetensors")
    stored["model.layers.2.mlp.up_proj.weight"].view(torch.int16)[7, 7] ^= 1
    save_file(stored, source / "model.safetensors")
    (found,) = compare_tensors(open_model(source).hugging_face(), other)
    assert found["name"] == "model.layers.2.mlp.up_proj.weight"
    assert 0 < found["max_difference"] < 0.01
