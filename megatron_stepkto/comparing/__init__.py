"""Do two copies of a model (Hugging Face folder, Megatron folder, vLLM server) give the same token log-probs?"""
