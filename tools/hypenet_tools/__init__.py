"""Models between Hugging Face folders and weights folders: convert, reshard, export, verify, inspect."""
