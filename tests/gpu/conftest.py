"""The environment of a training process, before any test of this folder has used cuBLAS."""

import os

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # as in hypenet_megatron.runtime.joined_world
