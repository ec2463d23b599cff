"""Triton kernels; imported only inside operators, so that the package works without triton."""
