"""Judged samples -> training examples -> packed micro-batches. Imports neither Megatron nor vLLM."""
