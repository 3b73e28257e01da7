"""Drawing solutions from a model with vLLM or transformers. Never imports Megatron."""
