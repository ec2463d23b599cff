"""Text to train on: documentation and public-domain prose, a small tokenizer, an n-gram baseline."""
