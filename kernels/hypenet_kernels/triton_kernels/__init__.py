"""Triton kernels. Only operators import them, when they run, so the package works without triton."""
