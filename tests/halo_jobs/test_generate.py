"""halo generate: text from exported folders, and no code from them unless it is trusted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halo_jobs.cli import app
from hypenet_megatron.presets import ModelShape
from hypenet_tools.hugging_face.mapping import conversion_plan, megatron_shapes
from hypenet_tools.release import write_hf_folder

PROMPT = "The river near the council"


@pytest.fixture(scope="module")
def exported_hybrid(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random HypeNet export of 4 layers."""
    shape = ModelShape("tiny", 4, 32, 48, 2, 1, 16, 600, tied_embeddings=True, max_positions=512)
    mixers = shape.hybrid_mixers([1], "lightning")
    generator = torch.Generator().manual_seed(1)
    plan = conversion_plan(shape, mixers)
    tensors = {
        name: torch.ones(size) if "norm" in name else torch.randn(size, generator=generator) * 0.1
        for name, size in megatron_shapes(plan).items()
    }
    folder = tmp_path_factory.mktemp("hybrid") / "hypenet"
    write_hf_folder(
        folder, tensors, shape, mixers, tokenizer_folder=tiny_tokenizer, dtype=torch.float32, model_card="tiny\n"
    )
    return folder


@pytest.fixture
def hybrid(exported_hybrid, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(exported_hybrid, tmp_path / "hypenet"))


@pytest.fixture
def generate(capsys):
    def run(*arguments: object) -> str:
        app(["generate", *map(str, arguments), "--max-new-tokens", "8"], standalone_mode=False)
        return capsys.readouterr().out

    return run


def greedy(folder: Path) -> str:
    """What transformers itself continues PROMPT with."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_plain_qwen3_folder_is_continued(generate, tiny_teacher):
    assert generate(tiny_teacher, PROMPT) == greedy(tiny_teacher) + "\n"


def test_hybrid_is_continued_without_running_a_file_of_its_folder(generate, hybrid, tmp_path):
    expected = greedy(hybrid)
    marker = tmp_path / "executed"
    for name in ("tokenization_hypenet.py", "custom_generate/generate.py"):
        (hybrid / name).parent.mkdir(exist_ok=True)
        (hybrid / name).write_text(f"open({str(marker)!r}, 'w')\n")
    assert generate(hybrid, PROMPT) == expected + "\n"
    assert not marker.exists()


def test_modelling_code_of_others_is_refused_unless_it_is_trusted(generate, exported_hybrid, hybrid, tmp_path):
    expected = greedy(exported_hybrid)
    hybrid = hybrid.rename(tmp_path / "changed")  # transformers imports the code of a folder name once
    marker, code = tmp_path / "executed", hybrid / "modeling_hypenet.py"
    code.write_text(f"{code.read_text()}\nopen({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match=f"{code} is not the modelling code of this hypenet-megatron"):
        generate(hybrid, PROMPT)
    assert not marker.exists()
    assert generate(hybrid, PROMPT, "--trust-remote-code") == expected + "\n"
    assert marker.exists()


def test_code_from_another_repository_is_never_fetched(generate, hybrid):
    config = json.loads((hybrid / "config.json").read_text())
    config["auto_map"] = {name: f"somebody/model--{target}" for name, target in config["auto_map"].items()}
    (hybrid / "config.json").write_text(json.dumps(config))
    assert generate(hybrid, PROMPT).startswith(PROMPT), "with the package's own code"
    (hybrid / "modeling_hypenet.py").unlink()
    with pytest.raises(ValueError, match="is not the modelling code of this hypenet-megatron"):
        generate(hybrid, PROMPT)


def test_seed_and_temperature_decide_the_sample(generate, tiny_teacher):
    one, again, other = (
        generate(tiny_teacher, PROMPT, "--temperature", 1, "--seed", seed) for seed in (1, 1, 2)
    )
    assert one == again != other
    assert generate(tiny_teacher, PROMPT, "--temperature", 0, "--seed", 1) == generate(tiny_teacher, PROMPT)


def test_chat_prints_the_reply_to_a_message(generate, tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match=f"{tiny_teacher} has no chat template; leave --chat out"):
        generate(tiny_teacher, PROMPT, "--chat")
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} again.")
    reply = generate(folder, PROMPT, "--chat")
    assert reply == generate(folder, f"{PROMPT} again.").removeprefix(f"{PROMPT} again.")


def test_what_cannot_be_generated_from_is_refused_in_a_sentence(generate, tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        generate(tmp_path, PROMPT)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        generate(tiny_teacher, "")
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ValueError, match="has not exported its model yet; finish it with `halo run`"):
        generate(tmp_path, PROMPT)
