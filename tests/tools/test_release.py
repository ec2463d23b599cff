"""Exported folders: contents, checksums, sharding, refusals, and transformers' own Qwen3 as a judge."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hypenet_tools.hugging_face.folder import read_model_folder
from hypenet_tools.release import special_token_ids, write_hf_folder
from tests.support.conversions import to_hugging_face
from tests.support.tiny_models import HYBRID, TINY


@pytest.fixture
def export(random_tensors, tokenizer_folder, tmp_path):
    def write(shape=TINY, name="export", **changes):
        options = {
            "logits_scaling_base": 500.0,
            "tokenizer_folder": tokenizer_folder,
            "dtype": torch.float32,
            "model_card": "# A tiny hybrid\n",
        }
        out = tmp_path / name
        write_hf_folder(out, random_tensors(shape, HYBRID), shape, HYBRID, **{**options, **changes})
        return out

    return write


def test_contents_and_checksums(export):
    folder = export()
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "cache_hypenet.py",
        "config.json",
        "configuration_hypenet.py",
        "generation_config.json",
        "mixer_attn.py",
        "mixer_base.py",
        "mixer_lightning_attn.py",
        "mixer_table.py",
        "model.safetensors",
        "modeling_hypenet.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "README.md").read_text() == "# A tiny hybrid\n"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 13
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_config_is_the_released_layout(export):
    config = json.loads((export() / "config.json").read_text())
    expected = {
        "model_type": "hypenet",
        "architectures": ["HypeNetForCausalLM"],
        "mixer_types": ["lightning-attn", "attn", "lightning-attn", "attn"],
        "attn_use_rope": False,
        "attn_use_output_gate": True,
        "attn_logits_scaling": "hype 500",
        "lightning_use_rope": True,
        "lightning_nh": 4,
        "lightning_nkv": 4,
        "lightning_head_dim": 16,
        "lightning_scale": "1/sqrt(d)",
        "lightning_use_qk_norm": True,
        "lightning_use_output_norm": True,
        "lightning_use_output_gate": True,
        "head_dim": 16,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 89,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert (
        json.loads((export(name="off", logits_scaling_base=None) / "config.json").read_text())[
            "attn_logits_scaling"
        ]
        is None
    )


def test_shards_hold_everything_once(export, random_tensors):
    shape = replace(TINY, tied_embeddings=False)
    folder = export(shape, max_shard_bytes=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert all(path.stat().st_size < 45_000 for path in shards)
    expected = to_hugging_face(random_tensors(shape, HYBRID), shape, HYBRID)
    tensors = read_model_folder(folder).tensors
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_dtype(export, random_tensors):
    tensors = read_model_folder(export(dtype=torch.bfloat16)).tensors
    expected = to_hugging_face(random_tensors(TINY, HYBRID), TINY, HYBRID)
    assert all(tensors[name].equal(expected[name].bfloat16()) for name in expected)


def test_an_earlier_export_is_replaced_and_nothing_else(export, tmp_path):
    export()
    folder = export(model_card="second")
    assert (folder / "README.md").read_text() == "second"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("precious")
    with pytest.raises(ValueError, match="thesis exists and is not an earlier export"):
        export(name="thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "precious"


def test_a_failed_export_leaves_nothing(export, tmp_path, monkeypatch):
    def full_disk(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sharded_tensors.direct_file.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export()
    assert list(tmp_path.iterdir()) == []


def test_missing_tensor_stops_the_export(random_tensors, tokenizer_folder, tmp_path):
    tensors = random_tensors(TINY, TINY.teacher_mixers())
    del tensors["decoder.final_layernorm.weight"]
    with pytest.raises(ValueError, match=r"lack decoder\.final_layernorm\.weight"):
        write_hf_folder(
            tmp_path / "out",
            tensors,
            TINY,
            None,
            tokenizer_folder=tokenizer_folder,
            dtype=torch.float32,
            model_card="",
        )
    assert list(tmp_path.iterdir()) == []


def test_special_tokens(tokenizer_folder, tmp_path):
    assert special_token_ids(tokenizer_folder, 96) == {"eos_token_id": 89, "pad_token_id": 89}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tokenizer_folder / name).read_text())
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [89, 7], "bos_token_id": 5, "top_p": 0.8}'
    )
    assert special_token_ids(tmp_path, 96) == {"eos_token_id": [89, 7], "bos_token_id": 5, "pad_token_id": 89}


def test_tokenizer_of_a_larger_model_is_refused(tokenizer_folder):
    with pytest.raises(ValueError, match=r"tokenizer\.json has token ids up to 89 but .* 64 entries"):
        special_token_ids(tokenizer_folder, 64)


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_unreadable_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing or not a tokenizer"):
        special_token_ids(tmp_path, 96)


def test_tokenizer_without_an_end_token_is_refused(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names no known eos_token"):
        special_token_ids(tmp_path, 96)


@pytest.mark.parametrize("tied", [True, False])
def test_teacher_survives_the_way_through_megatron(tmp_path, tokenizer_folder, tied):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    before = Qwen3ForCausalLM(config).eval()
    before.save_pretrained(tmp_path / "before")
    model = read_model_folder(tmp_path / "before")
    write_hf_folder(
        tmp_path / "after",
        dict(model.megatron_view()),
        model.description.shape,
        None,
        tokenizer_folder=tokenizer_folder,
        dtype=torch.float32,
        model_card="# Teacher\n",
        max_shard_bytes=50_000,
    )
    after, report = Qwen3ForCausalLM.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    input_ids = torch.randint(96, (2, 40))
    assert after.eval()(input_ids).logits.equal(before(input_ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert tokenizer("w3 w5").input_ids == [3, 5]
    assert after.generation_config.eos_token_id == tokenizer.eos_token_id == 89
