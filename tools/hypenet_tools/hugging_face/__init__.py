"""Model folders in Hugging Face form: their configuration, weights and names, and how these map to Megatron's."""
