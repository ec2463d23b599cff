"""Conversions between Hugging Face folders and Megatron tensors, HALO's initialisation, and the release."""

from hypenet_tools.hugging_face.folder import HFModel, read_model_folder
from hypenet_tools.hugging_face.initialise import hybrid_tensors, student_tensors
from hypenet_tools.hugging_face.mapping import conversion_plan, to_hugging_face, to_megatron
from hypenet_tools.release import write_hf_folder, write_qwen3_folder

__all__ = [
    "HFModel",
    "conversion_plan",
    "hybrid_tensors",
    "read_model_folder",
    "student_tensors",
    "to_hugging_face",
    "to_megatron",
    "write_hf_folder",
    "write_qwen3_folder",
]
