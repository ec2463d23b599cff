"""HypeNet as Megatron-Core layer specs. Knows tensors and process groups; knows no files and no jobs."""

import os

import torch

if not torch.cuda.is_available():
    # Megatron decorates small functions with torch.compile when it is imported; on CPU that would start a C++ compiler
    # for every shape. The variable is read at decoration time, so it has to be set before the first megatron import.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
