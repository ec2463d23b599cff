"""Text as zarr v3 token stores, and deterministic resumable sampling from them. Imports no model code."""

from tokenized_data.identity import TokenizerIdentity, load_tokenizer_identity
from tokenized_data.parts import read_part, write_part
from tokenized_data.sampling import BlendedSampler, Window, WindowSampler
from tokenized_data.store import TokenStore
from tokenized_data.text import Split, encoded_documents, text_files, tokenize_text, write_text_store
from tokenized_data.writer import TokenStoreWriter

__all__ = [
    "BlendedSampler",
    "Split",
    "TokenStore",
    "TokenStoreWriter",
    "TokenizerIdentity",
    "Window",
    "WindowSampler",
    "encoded_documents",
    "load_tokenizer_identity",
    "read_part",
    "text_files",
    "tokenize_text",
    "write_part",
    "write_text_store",
]
