"""The exported modelling code: against the token-by-token reference, with padding, caches and generate()."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hypenet_tools.hugging_face.weights import SafetensorsWeights
from hypenet_tools.release import write_hf_folder
from tests.support.reference_model import hypenet_forward
from tests.support.tiny_models import HYBRID, TINY

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def export(random_tensors, tokenizer_folder, tmp_path):
    def write(shape=TINY, mixers=HYBRID, logits_scaling_base=8.0):
        write_hf_folder(
            tmp_path / "export",
            random_tensors(shape, mixers),
            shape,
            mixers,
            logits_scaling_base=logits_scaling_base,
            tokenizer_folder=tokenizer_folder,
            dtype=torch.float32,
            model_card="",
        )
        return tmp_path / "export"

    return write


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def cut_into(monkeypatch, model, tokens):
    """Blocks of `tokens` tokens in all mixers."""
    for layer in model.model.layers:
        monkeypatch.setattr(type(layer.self_attn), "block", tokens)


@pytest.fixture
def model(export, monkeypatch):
    """A loaded hybrid whose chunks are so short that tests cross several."""
    loaded = load(export())
    cut_into(monkeypatch, loaded, 8)
    return loaded


@pytest.fixture
def ids():
    return torch.randint(88, (2, 29), generator=torch.Generator().manual_seed(5))


def left_padded(rows):
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((longest - len(row),), 89), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask


@pytest.mark.parametrize(
    ("shape", "mixers", "base", "largest"),
    [
        (TINY, HYBRID, 8.0, 1e-5),
        (replace(TINY, tied_embeddings=False), HYBRID, None, 1e-5),
        (replace(TINY, query_heads=6, kv_groups=3, rope_theta=1e4), HYBRID, 500.0, 1e-5),
        (replace(TINY, query_heads=5, kv_groups=1), ("lightning",) * 4, None, 1e-5),
        # Scaled so strongly that how a CPU adds up decides about 1e-5: 1.02e-5 in one logit was seen.
        (replace(TINY, kv_groups=4), ("attn",) * 4, 2.5, 1.2e-5),
    ],
)
@pytest.mark.parametrize("chunk", [8, 256])
def test_equals_the_reference(export, monkeypatch, ids, shape, mixers, base, largest, chunk):
    folder = export(shape, mixers, base)
    model = load(folder)
    cut_into(monkeypatch, model, chunk)
    config = json.loads((folder / "config.json").read_text())
    expected = hypenet_forward(SafetensorsWeights(folder), config, ids)
    assert expected.std() > 0.1
    with torch.no_grad():
        logits = model(ids).logits.double()
        torch.testing.assert_close(logits, expected, rtol=0, atol=largest)
        assert float((logits - expected).norm() / expected.norm()) <= 3e-6
        # In fp64 what is left are the code's own fp32 norms and rotations, on any CPU.
        torch.testing.assert_close(model.double()(ids).logits, expected, rtol=0, atol=2e-6)


def test_loads_by_every_auto_class(export, ids):
    folder = export()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.rope_theta, config.logits_scaling_base()) == (1e6, 8.0)
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        hidden = model.eval()(ids, output_hidden_states=True).hidden_states
        assert bare(ids).last_hidden_state.equal(hidden[-1])
    assert len(hidden) == TINY.num_layers + 1


def test_saved_again_it_loads_with_equal_logits(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, **TOLERANCE)
    assert again.config.mixer_types == model.config.mixer_types


def test_code_needs_no_package_of_ours(export):
    for path in export().glob("*.py"):
        assert "hypenet_tools" not in path.read_text()
        assert "hypenet_megatron" not in path.read_text()


@torch.no_grad()
def test_left_padded_batch_equals_single_sequences(model, ids):
    rows = [ids[0], ids[1, :17], ids[1, :1]]
    padded, mask = left_padded(rows)
    logits = model(padded, attention_mask=mask).logits
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(found[-len(row) :], model(row[None]).logits[0], **TOLERANCE)
    assert logits.isfinite().all()


@torch.no_grad()
def test_padding_elsewhere_is_invisible_too(model, ids):
    row = ids[0, :20]
    padded = torch.cat([row[:11], torch.full((6,), 89), row[11:], torch.full((3,), 89)])[None]
    mask = torch.cat([torch.ones(11), torch.zeros(6), torch.ones(9), torch.zeros(3)]).long()[None]
    expected = model(row[None]).logits[0]
    out = model(padded, attention_mask=mask)
    torch.testing.assert_close(out.logits[0][mask[0].bool()], expected, **TOLERANCE)
    following = model(ids[:1, 20:21], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(following[:, -1], model(ids[:1, :21]).logits[:, -1], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, 7, 8, 20])
def test_prefill_and_single_steps_equal_one_forward(model, ids, prefill):
    expected = model(ids, use_cache=False)
    assert expected.past_key_values is None
    out = model(ids[:, :prefill])
    logits = [out.logits]
    for position in range(prefill, ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected.logits, **TOLERANCE)
    assert out.past_key_values.get_seq_length() == ids.shape[1]


@torch.no_grad()
def test_padded_prefill_in_pieces_equals_single_sequences(model, ids):
    rows = [ids[0], ids[1, :13]]
    padded, mask = left_padded(rows)
    cache, logits = None, []
    for start, end in [(0, 3), (3, 14), (14, 15), (15, 29)]:
        out = model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache = out.past_key_values
        logits.append(out.logits)
    for row, found in zip(rows, torch.cat(logits, dim=1), strict=True):
        torch.testing.assert_close(found[-len(row) :], model(row[None]).logits[0], **TOLERANCE)


@torch.no_grad()
def test_a_copied_cache_can_be_continued_twice(model, ids):
    prompt = model(ids[:, :20]).past_key_values
    expected = model(ids).logits[:, 20:]
    for _ in range(2):
        found = model(ids[:, 20:], past_key_values=copy.deepcopy(prompt)).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def test_reordered_cache_follows_its_sequences(model, ids):
    padded, mask = left_padded([ids[0, :20], ids[1, :12]])
    cache = model(padded, attention_mask=mask).past_key_values
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    found = model(ids[[1, 1, 0], 20:22], past_key_values=cache).logits[:, -1]
    rows = [torch.cat([ids[1, :12], ids[1, 20:22]]), torch.cat([ids[0, :20], ids[0, 20:22]])]
    expected = torch.cat([model(row[None]).logits[:, -1] for row in (rows[0], *rows)])
    torch.testing.assert_close(found, expected, **TOLERANCE)


def greedy(model, ids, steps):
    for _ in range(steps):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 6}])
def test_greedy_generation_is_the_argmax_loop(model, ids, options):
    found = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, **options)
    assert found.equal(greedy(model, ids, 12))


def test_generation_from_left_padded_text(model, export, ids):
    tokenizer = AutoTokenizer.from_pretrained(export(), padding_side="left")
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10", "w40 w7"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.attention_mask.sum() == 12
    found = model.generate(**batch, max_new_tokens=9, do_sample=False, eos_token_id=None)
    for text, row in zip(texts, found, strict=True):
        alone = tokenizer(text, return_tensors="pt").input_ids
        assert row[-9:].equal(greedy(model, alone, 9)[0, -9:])


def test_beam_search_with_and_without_cache_agree(model, ids):
    padded, mask = left_padded([ids[0, :15], ids[1, :8]])
    options = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False, "num_return_sequences": 2}
    with_cache = model.generate(padded, attention_mask=mask, **options)
    assert with_cache.equal(model.generate(padded, attention_mask=mask, use_cache=False, **options))


def test_generation_continues_from_a_cache(model, ids):
    first = model.generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    more = torch.cat([first.sequences, ids[:, :3]], dim=1)
    cache = first.past_key_values
    found = model.generate(more, past_key_values=cache, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert found.equal(greedy(model, more, 5))


def test_training_backpropagates_and_leaves_logits_scaling_off(model, ids, tmp_path):
    out = model.train()(ids, labels=ids)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    config = json.loads((tmp_path / "export" / "config.json").read_text()) | {"attn_logits_scaling": None}
    expected = hypenet_forward(SafetensorsWeights(tmp_path / "export"), config, ids)
    torch.testing.assert_close(out.logits.double(), expected, **TOLERANCE)


@torch.no_grad()
def test_bfloat16_keeps_an_fp32_state(export, ids):
    folder = export()
    exact, rounded = load(folder)(ids), load(folder, dtype=torch.bfloat16)(ids)
    assert rounded.logits.dtype == torch.bfloat16
    assert {state.dtype for state in rounded.past_key_values.states.values()} == {torch.float32}
    difference = (rounded.logits.float() - exact.logits).norm() / exact.logits.norm()
    assert difference < 0.05


def test_requests_it_cannot_serve_are_refused(model, ids):
    with pytest.raises(ValueError, match="HypeNetCache, not a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\]"):
        model(ids, attention_mask=torch.ones(2, 1, 29, 29))
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        model(ids).past_key_values.crop(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_use_rope": True}, "attn_use_rope is True"),
        ({"lightning_nkv": 2}, "lightning_nkv is 2"),
        ({"mixer_types": ["attn"] * 3}, "mixer_types must hold 4"),
        ({"attn_logits_scaling": "hype -3"}, "attn_logits_scaling"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
    ],
)
def test_config_of_another_architecture_is_refused(export, change, message):
    folder = export()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
