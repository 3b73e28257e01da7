"""Step-KTO (arXiv 2501.10799) as a Megatron-Core extension."""

__version__ = "0.1.0"
