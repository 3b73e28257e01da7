"""Floating-point operations of a forward pass."""

from __future__ import annotations

from megatron_stepkto.architectures.model_config import ModelConfig


def forward_flops(config: ModelConfig, tokens: float, response_tokens: float, length: float) -> tuple[float, float]:
    """(of one layer, of the head) of a forward pass over ``tokens`` in documents of ``length`` tokens."""
    layer = tokens * sum(layer_flops(config, length).values())
    return layer, response_tokens * 2 * config.hidden_size * config.vocab_size


def layer_flops(config: ModelConfig, length: float) -> dict[str, float]:
    """Of one layer's forward pass per token, by part: projections, attention, mlp.

    Causal attention sees half the pairs: 2 x 2 x length / 2 x (heads x head size) per token.
    """
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = config.hidden_size * (2 * queries + 2 * keys)
    mlp = 3 * config.hidden_size * config.ffn_size
    if config.experts:  # the experts that a token is routed to, and the router
        mlp = config.hidden_size * (3 * config.experts.ffn_size * config.experts.per_token + config.experts.number)
    return {"projections": 2 * projections, "attention": 2 * length * queries, "mlp": 2 * mlp}
