"""Text as zarr v3 token stores, and deterministic resumable sampling from them. Imports no model code."""

from tokenized_data.identity import TokenizerIdentity, load_tokenizer_identity
from tokenized_data.sampling import BlendedSampler, Window, WindowSampler
from tokenized_data.store import TokenStore
from tokenized_data.text import Split, tokenize_text
from tokenized_data.writer import TokenStoreWriter

__all__ = [
    "BlendedSampler",
    "Split",
    "TokenStore",
    "TokenStoreWriter",
    "TokenizerIdentity",
    "Window",
    "WindowSampler",
    "load_tokenizer_identity",
    "tokenize_text",
]
