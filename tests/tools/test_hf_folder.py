"""Reading model folders: what comes back, and what each kind of damage says."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypenet_tools.hf_folder import read_model_folder
from hypenet_tools.release import write_hf_folder, write_qwen3_folder
from tests.tools.tiny_models import HYBRID, TINY


@pytest.fixture
def teacher(random_tensors, tokenizer_folder, tmp_path):
    """A teacher folder in several shards."""
    tensors = random_tensors(TINY, TINY.teacher_mixers(), False)
    write_qwen3_folder(
        tmp_path / "teacher",
        tensors,
        TINY,
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
        random_tensors(TINY, HYBRID, True),
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
    assert model.shape == replace(TINY, name="teacher")
    assert (model.mixer_types, model.logits_scaling_base) == (None, None)
    assert [path.name for path in model.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    written = random_tensors(TINY, TINY.teacher_mixers(), False)
    read = model.megatron_tensors()
    assert read.keys() == written.keys()
    assert all(read[name].equal(written[name]) for name in written)


def test_hybrid(hybrid, random_tensors):
    model = read_model_folder(hybrid)
    assert model.shape == replace(TINY, name="hybrid")
    assert (model.mixer_types, model.logits_scaling_base) == (HYBRID, 600.0)
    written = random_tensors(TINY, HYBRID, True)
    assert all(tensor.equal(written[name]) for name, tensor in model.megatron_tensors().items())


def test_transformers_5_config_is_understood(teacher):
    edit_config(teacher, rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert read_model_folder(teacher).shape.rope_theta == 5e5


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


def test_index_that_leaves_the_folder(teacher):
    index = teacher / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"'\.\./other\.safetensors', which is not a safetensors file of its own"
    ):
        read_model_folder(teacher)


def test_index_that_disagrees_with_a_shard(teacher):
    index = teacher / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks the tensor model\.norm\.weight"):
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


def test_integer_tensor(hybrid):
    edit_weights(hybrid, lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype I8"):
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
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"mixer_types": ["attn", "gdn", "attn", "kda"]}, "mixer_types holds gdn, kda"),
        ({"mixer_types": ["attn"]}, "one mixer for each of the 4 layers"),
        ({"attn_logits_scaling": "hype"}, "attn_logits_scaling is 'hype'"),
        ({"attn_logits_scaling": "hype 0.5"}, "attn_logits_scaling is 'hype 0.5'"),
        ({"hidden_size": "48"}, "hidden_size is '48' instead of a positive number"),
        ({"head_dim": "absent"}, "head_dim is None instead of a positive number"),
        ({"num_key_value_heads": 3}, "query_heads 4 is not a multiple of kv_groups 3"),
        ({"tie_word_embeddings": "absent"}, "tie_word_embeddings is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
    ],
)
def test_config_that_cannot_be_read(hybrid, changes, message):
    edit_config(hybrid, **changes)
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        read_model_folder(hybrid)


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
