"""Reading model folders: what comes back, and what each kind of damage says."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypenet_megatron.presets import QWEN3_SHAPES
from hypenet_tools.hugging_face.config import hypenet_config, qwen3_config, read_config
from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.release import write_hf_folder
from tests.support.tiny_models import HYBRID, TINY, tiny


@pytest.fixture
def teacher(random_tensors, tokenizer_folder, tmp_path):
    """A teacher folder in several shards."""
    tensors = random_tensors(TINY, TINY.teacher_mixers())
    write_hf_folder(
        tmp_path / "teacher",
        tensors,
        TINY,
        None,
        tokenizer_folder=tokenizer_folder,
        dtype=torch.float32,
        model_card="",
        max_shard_bytes=60_000,
    )
    return tmp_path / "teacher"


@pytest.fixture
def hybrid(random_tensors, tokenizer_folder, tmp_path):
    """A HypeNet folder in one file."""
    write_hf_folder(
        tmp_path / "hybrid",
        random_tensors(TINY, HYBRID),
        TINY,
        HYBRID,
        logits_scaling_base=600.0,
        tokenizer_folder=tokenizer_folder,
        dtype=torch.float32,
        model_card="",
    )
    return tmp_path / "hybrid"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "absent"})
    )


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_teacher(teacher, random_tensors):
    assert len(list(teacher.glob("*.safetensors"))) > 2
    model = read_model_folder(teacher)
    assert model.description.shape == replace(TINY, name="teacher")
    assert (model.description.mixer_types, model.description.logits_scaling_base) == (None, None)
    written = random_tensors(TINY, TINY.teacher_mixers())
    read = model.megatron_view()
    assert read.keys() == written.keys()
    assert all(read[name].equal(written[name]) for name in written)


def test_hybrid(hybrid, random_tensors):
    model = read_model_folder(hybrid)
    assert model.description.shape == replace(TINY, name="hybrid")
    assert (model.description.mixer_types, model.description.logits_scaling_base) == (HYBRID, 600.0)
    written = random_tensors(TINY, HYBRID)
    assert all(tensor.equal(written[name]) for name, tensor in model.megatron_view().items())


def test_transformers_5_config_is_understood(teacher):
    edit_config(teacher, rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert read_model_folder(teacher).description.shape.rope_theta == 5e5


def test_head_stored_beside_a_tied_embedding_is_dropped_if_equal(hybrid):
    edit_weights(hybrid, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in read_model_folder(hybrid).tensors
    edit_weights(hybrid, lambda t: t["lm_head.weight"][95].add_(1))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: lm_head\.weight differs .* tie_word_embeddings"
    ):
        read_model_folder(hybrid)


def test_missing_config(teacher):
    (teacher / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_model_folder(teacher)


def test_missing_weights(hybrid):
    (hybrid / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        read_model_folder(hybrid)


def test_pickles_are_never_read(hybrid):
    (hybrid / "model.safetensors").rename(hybrid / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        read_model_folder(hybrid)


def test_missing_shard(teacher):
    shard = sorted(teacher.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing although"):
        read_model_folder(teacher)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_truncated_weights(hybrid, keep):
    path = hybrid / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        read_model_folder(hybrid)


def _overlap(header):
    first, second = sorted(
        (entry["data_offsets"], name) for name, entry in header.items() if "shape" in entry
    )[:2]
    size = second[0][1] - second[0][0]
    header[second[1]]["data_offsets"] = [first[0][0], first[0][0] + size]


def _gap(header):
    entries = [entry for entry in header.values() if "shape" in entry]
    last = max(entries, key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [at + 64 for at in last["data_offsets"]]


def _too_short(header):
    header["model.norm.weight"]["shape"] = [480]


@pytest.mark.parametrize("damage", [_overlap, _gap, _too_short])
def test_header_that_does_not_fit_the_data(hybrid, damage):
    path = hybrid / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    damage(header)
    text = json.dumps(header).encode()
    data = content[end:] + bytes(64 if damage is _gap else 0)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        read_model_folder(hybrid)


@pytest.fixture
def edit_index(teacher):
    """Changes the weight_map of the teacher's index."""

    def edit(change):
        index = teacher / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "pytorch_model.bin", "..", "", 3]
)
def test_index_that_leaves_the_folder(teacher, edit_index, name):
    save_file({"model.norm.weight": torch.ones(48)}, teacher.parent / "other.safetensors")
    edit_index(lambda weight_map: weight_map.update({"model.norm.weight": name}))
    problem = f"points at {str(name)!r}, which is not a safetensors file of its own folder"
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_model_folder(teacher)


def test_index_that_disagrees_with_a_shard(teacher, edit_index):
    edit_index(
        lambda weight_map: weight_map.update({"model.norm.weight": weight_map["model.embed_tokens.weight"]})
    )
    with pytest.raises(ValueError, match=r"lacks the tensor model\.norm\.weight"):
        read_model_folder(teacher)


def test_tensor_that_the_index_does_not_list(teacher, edit_index):
    edit_index(lambda weight_map: weight_map.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"holds the tensor model\.norm\.weight that .* does not list"):
        read_model_folder(teacher)


def test_tensor_in_two_shards(teacher):
    first, second, *_ = sorted(teacher.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(ValueError, match=f"{second.name} and .*{first.name} both hold the tensor {name}"):
        read_model_folder(teacher)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_index_without_a_map(teacher, content):
    (teacher / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json has no weight_map of tensor names to files"):
        read_model_folder(teacher)


def test_tensor_that_disagrees_with_the_config(hybrid):
    edit_config(hybrid, intermediate_size=96)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight has shape \[80, 48\] but .* \[96, 48\]"):
        read_model_folder(hybrid)


def test_layers_that_disagree_with_the_config(hybrid):
    edit_config(hybrid, mixer_types=["attn", "attn", "lightning-attn", "attn"])
    with pytest.raises(
        ValueError, match=r"lack model\.layers\.0\.self_attn\.o_gate\.weight and .*unexpected model\.lay"
    ):
        read_model_folder(hybrid)


def test_surplus_tensor(hybrid):
    edit_weights(hybrid, lambda t: t.update({"model.layers.0.self_attn.bias": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.0\.self_attn\.bias"):
        read_model_folder(hybrid)


def test_missing_tensor(hybrid):
    edit_weights(hybrid, lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lack model\.layers\.3\.mlp\.up_proj\.weight"):
        read_model_folder(hybrid)


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (torch.int8, "I8"),
        (torch.int32, "I32"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.float64, "F64"),
    ],
)
def test_tensor_of_a_dtype_that_is_not_supported(hybrid, dtype, code):
    """Quantised weights are refused also where the config does not say that they are."""
    edit_weights(hybrid, lambda t: t.update({"model.norm.weight": torch.zeros(48).to(dtype)}))
    with pytest.raises(
        ValueError, match=rf"model\.norm\.weight has dtype {code}, but only .*unquantised model"
    ):
        read_model_folder(hybrid)


def test_weights_of_gptq_without_a_word_in_the_config(hybrid):
    def quantise(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(6, 80, dtype=torch.int32)
        tensors["model.layers.0.mlp.up_proj.scales"] = torch.zeros(1, 80, dtype=torch.float16)

    edit_weights(hybrid, quantise)
    with pytest.raises(ValueError, match=r"up_proj\.qweight has dtype I32"):
        read_model_folder(hybrid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 2}, "sparse_step is 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"are quantised \(gptq\)"),
        ({"attn_use_rope": True}, "attn_use_rope is True, but only False"),
        ({"lightning_use_output_gate": "absent"}, "lightning_use_output_gate is None, but only True"),
        ({"lightning_nkv": 2}, "lightning_nkv is 2, but only 4"),
        ({"lightning_use_short_conv": True}, "lightning_use_short_conv is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"are quantised \(awq\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"are quantised \(fp8\)"),
        ({"mixer_types": ["attn", "gdn", "attn", "kda"]}, "mixer_types holds gdn, kda"),
        ({"mixer_types": ["attn"]}, "one mixer for each of the 4 layers"),
        ({"attn_logits_scaling": "hype"}, "attn_logits_scaling is 'hype'"),
        ({"attn_logits_scaling": "hype 0.5"}, "attn_logits_scaling is 'hype 0.5'"),
        ({"hidden_size": "48"}, "hidden_size is '48' instead of a positive number"),
        ({"head_dim": "absent"}, "head_dim is None instead of a positive number"),
        ({"num_key_value_heads": 3}, "query_heads 4 is not a multiple of kv_groups 3"),
        ({"tie_word_embeddings": "absent"}, "tie_word_embeddings is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn' instead of an object"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "'yarn' .* remove rope_parameters"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
            "'yarn' .* remove rope_scaling",
        ),
        ({"rope_theta": math.inf}, "rope_theta is inf instead of a positive number"),
        ({"layer_types": 3}, "layer_types holds 3, but only 'full_attention'"),
    ],
)
def test_config_that_cannot_be_read(hybrid, changes, message):
    edit_config(hybrid, **changes)
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        read_model_folder(hybrid)


STRANGE = (None, "x", -1, 0, 3, 1.5, True, [], ["x"], [None], {}, {"a": 1})


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_any_value_of_any_key_is_read_or_refused_in_a_sentence(tmp_path, strange):
    path = tmp_path / "config.json"
    configs = [
        qwen3_config(TINY, "bfloat16"),
        qwen3_config(tiny(QWEN3_SHAPES["qwen3-30b-a3b"]), "bfloat16"),
        hypenet_config(TINY, HYBRID, 7.0, "bfloat16"),
    ]
    also = ("rope_scaling", "rope_parameters", "layer_types", "quantization_config", "use_sliding_window")
    for config in configs:
        for key in (*config, *also):
            path.write_text(json.dumps({**config, key: strange}))
            try:
                read_config(path)
            except ValueError as refusal:
                assert str(path) in str(refusal), (key, refusal)


@pytest.mark.parametrize("name", QWEN3_SHAPES)
def test_configs_as_they_are_published(tmp_path, name):
    """As transformers 4.51 wrote them: keys without a meaning for us, absent ones as null, instruct models' ids."""
    shape = QWEN3_SHAPES[name]
    config = qwen3_config(shape, "bfloat16")
    config["torch_dtype"] = config.pop("dtype")
    config |= {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "max_window_layers": shape.num_layers,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
    }
    if shape.experts:
        config |= {"output_router_logits": False, "router_aux_loss_coef": 0.001, "mlp_only_layers": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_config(tmp_path / "config.json")
    assert (found.shape, found.mixer_types) == (replace(shape, name=tmp_path.name), None)


def test_damaged_config(hybrid):
    (hybrid / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_model_folder(hybrid)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_model_folder(tmp_path / "nowhere")
    shutil.copytree(tmp_path, tmp_path / "empty", ignore=lambda *_: ["empty"])
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_model_folder(tmp_path / "empty")
