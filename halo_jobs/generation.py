"""Text from an exported model folder. Code from a folder runs only when the caller trusts it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from durable_files import read_json
from hypenet_tools.hugging_face.config import read_config
from hypenet_tools.remote_code import modeling_files


def load_model(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of `folder`, in its own dtype on the GPU if there is one, and its tokenizer.

    Raises ValueError when `folder` holds no model, or needs modelling code that is not byte-equal to this package's and
    `trust_remote_code` is false. Equal code is loaded from this package, so no file of `folder` is ever executed.
    """
    model_class: Any = AutoModelForCausalLM
    if not trust_remote_code and "auto_map" in read_json(folder / "config.json"):
        _require_our_code(folder)
        model_class = import_module("hypenet_tools.remote_code.modeling_hypenet").HypeNetForCausalLM
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = model_class.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _require_our_code(folder: Path) -> None:
    """ValueError names the first modelling file in `folder` that differs from this package's."""
    mixer_types = read_config(folder / "config.json").mixer_types or ()
    for name, text in modeling_files(mixer_types).items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            raise ValueError(
                f"{path} is not the modelling code of this hypenet-megatron, so it was not run; read the code, and add "
                "--trust-remote-code if you trust it"
            )


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 100,
    temperature: float | None = None,
    seed: int = 0,
) -> None:
    """Print the continuation of `prompt` to standard output, word by word.

    With `chat`, `prompt` is the user's message and only the reply is printed. `temperature` None samples as the model's
    generation_config.json says; 0 takes the most likely token. Raises ValueError when there is no chat template.
    """
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"{tokenizer.name_or_path} has no chat template; leave --chat out")
        message = {"role": "user", "content": prompt}
        prompt = str(tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt has no tokens; give some text")
    sampling: dict[str, Any] = {}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    transformers.set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
