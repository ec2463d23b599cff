"""Token stores in zarr v3, and deterministic sampling from them that resumes at any step. Imports no model code."""

from tokenized_data.encoded_files import read_encoded, write_encoded
from tokenized_data.identity import TokenizerIdentity, load_tokenizer_identity
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
    "read_encoded",
    "text_files",
    "tokenize_text",
    "write_encoded",
    "write_text_store",
]
