"""Sampling solutions from a Hugging Face checkpoint. Nothing here imports Megatron."""
