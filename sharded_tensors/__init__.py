"""Rectangles of named global tensors in safetensors files, with a JSON index and a manifest of checksums."""
