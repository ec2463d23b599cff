"""Conversions between Hugging Face folders and Megatron tensors, HALO's initialisation, and the release."""

from hypenet_tools.hugging_face.folder import HFModel, read_model_folder
from hypenet_tools.hugging_face.mapping import conversion_plan
from hypenet_tools.release import write_hf_folder, write_qwen3_folder

__all__ = [
    "HFModel",
    "conversion_plan",
    "read_model_folder",
    "write_hf_folder",
    "write_qwen3_folder",
]
