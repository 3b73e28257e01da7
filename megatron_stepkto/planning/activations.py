"""Activation memory of this package's layers: Korthikanti et al. (arXiv 2205.05198), recounted for packed documents.

Their 34 s b h bytes per layer (5 a s^2 b of attention aside) assume dropout and an MLP of 4 h. Here there is no
dropout, the MLP is gated, attention is torch's scaled-dot-product kernel (no s^2 term) over a loop of documents,
and RoPE, norm and SwiGLU save what their implementations save. ``tests/unit/planning/test_activations.py`` counts
the tensors that autograd actually keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.recipe.keys import Parallel, Recompute


@dataclass(frozen=True)
class Kernels:
    """Which fused kernels run: an unfused operation saves more.

    fused_experts: an expert's SwiGLU keeps the output of linear_fc1 alone, as every dense one does.
    fused_rope: cosines and sines are computed once per micro-batch, not for queries and keys of every layer.
    scored_rows: after its attention the last layer keeps only scored positions (counted on the CPU only: elsewhere it
    depends on the layers used, and the estimate stays conservative).
    """

    fused_experts: bool
    fused_rope: bool
    scored_rows: bool


CUDA = Kernels(fused_experts=True, fused_rope=False, scored_rows=False)
CPU = Kernels(fused_experts=False, fused_rope=True, scored_rows=True)


@dataclass(frozen=True)
class Layout:
    """What determines a rank's activations. num_bytes: of the compute dtype. recompute: as ``train.recompute``.
    low_rank: ``low_rank_width``. chunk_layers: of one model chunk. expert_tensor: ranks that share an expert."""

    tensor: int
    sequence: bool
    num_bytes: int
    recompute: bool | Recompute
    kernels: Kernels
    low_rank: float = 0.0
    chunk_layers: int = 1
    expert_tensor: int = 1

    @property
    def hidden_share(self) -> int:
        """Sequence parallelism also splits the tokens of norms and residuals over the tensor-parallel ranks."""
        return self.tensor if self.sequence else 1

    def norm_bytes(self, config: ModelConfig) -> float:
        """Bytes per token that one RMSNorm keeps: its input and a float32 statistic."""
        return (config.hidden_size * self.num_bytes + 4) / self.hidden_share

    @property
    def modules(self) -> list[str]:
        """Of every layer, that are computed again alone."""
        return list(self.recompute.modules or []) if isinstance(self.recompute, Recompute) else []

    @property
    def whole_share(self) -> float:
        """Share of a chunk's layers that are computed again whole: only inputs of theirs are kept."""
        if isinstance(self.recompute, Recompute):
            return (self.recompute.layers or 0) / self.chunk_layers if self.recompute.every is None else 1.0
        return float(self.recompute)

    @property
    def layers_at_once(self) -> int:
        """Layers whose activations exist again at one time in the backward pass."""
        every = self.recompute.every if isinstance(self.recompute, Recompute) else None
        return every or int(self.whole_share > 0)


def layer_bytes(config: ModelConfig, layout: Layout) -> dict[str, float]:
    """Bytes per token that one layer keeps for its backward pass on one rank, by part."""
    hidden = config.hidden_size / layout.hidden_share
    queries = config.num_heads * config.head_dim / layout.tensor
    keys = config.num_kv_heads * config.head_dim / layout.tensor
    b = layout.num_bytes
    return {
        "norms": 2 * layout.norm_bytes(config),
        "attention input": hidden * b,
        # cosines and sines, for queries and for keys; then both rotated, and all of q, k, v for the value's sake
        "rotary": 0 if layout.kernels.fused_rope else 4 * config.head_dim * b,
        "query, key, value": (2 * queries + 3 * keys) * b,
        # one output per document, their concatenation (the input of the projection), the log-sum-exp
        "attention output": 2 * queries * b + 4 * config.num_heads / layout.tensor,
        "mlp input": hidden * b,
        "mlp": _mlp_bytes(config, layout),
        "adapters": layout.low_rank * b,
    }


def _mlp_bytes(config: ModelConfig, layout: Layout) -> float:
    """Output of linear_fc1, input of linear_fc2 and, unfused, what SwiGLU is made of. Experts also keep a copy of the
    hidden states per chosen expert; tokens are assumed to be spread evenly, which a real router only approximates."""
    if config.experts is None:
        return 3 * config.ffn_size / layout.tensor * layout.num_bytes
    experts = config.experts
    # unfused, the output weighted by the router's probability is one more tensor
    # ranks that share an expert gather each other's tokens: each holds all of these, and a part of the features
    per_expert = config.hidden_size * layout.expert_tensor
    per_expert += (3 if layout.kernels.fused_experts else 6) * experts.ffn_size
    router = 5 * experts.number + 32 * experts.per_token  # probabilities and masks, float32, bool and int64
    return (experts.per_token * per_expert * layout.num_bytes + router) / layout.tensor


def saved_per_layer(config: ModelConfig, layout: Layout) -> float:
    """Bytes per token kept from forward to backward, mean over the layers of a chunk: of layers that are computed again
    whole the input (with ``every`` one for so many of them), of the others all but what their recomputed modules give.
    """
    share = layout.whole_share
    inputs = config.hidden_size / layout.hidden_share * layout.num_bytes / max(1, layout.layers_at_once)
    kept = sum(layer_bytes(config, layout).values()) - sum(recomputed_bytes(config, layout).values())
    return share * inputs + (1 - share) * kept


def recomputed_bytes(config: ModelConfig, layout: Layout) -> dict[str, float]:
    """Bytes per token of one layer that ``recompute.modules`` do not keep, by module.

    core_attn keeps query, key and value, and its output as the projection's input; layernorm the norms' inputs; mlp and
    moe what the norm before them gives.
    """
    parts, b = layer_bytes(config, layout), layout.num_bytes
    queries = config.num_heads * config.head_dim / layout.tensor
    saved = {
        "core_attn": parts["attention output"] - queries * b,
        "layernorm": parts["attention input"] + parts["mlp input"],
        "mlp": parts["mlp"],
        "moe": parts["mlp"],
    }
    return {module: saved[module] for module in layout.modules}


def working_bytes(config: ModelConfig, layout: Layout) -> float:
    """Bytes per token that live only while one layer's backward runs.

    Gradients of the widest tensors (linear_fc1's output and SwiGLU's) and of the hidden states, gathered under
    sequence parallelism; under recompute also what is computed again at one time.
    """
    gradients = (3 * widest(config) / layout.tensor + 3 * config.hidden_size) * layout.num_bytes
    again = layout.layers_at_once * sum(layer_bytes(config, layout).values())
    return gradients + again + sum(recomputed_bytes(config, layout).values())


def widest(config: ModelConfig) -> int:
    """Elements per token of the feed-forward part, all chosen experts together."""
    return config.experts.ffn_size * config.experts.per_token if config.experts else config.ffn_size


def head_saved_bytes(config: ModelConfig, layout: Layout) -> tuple[float, float]:
    """(bytes per token, bytes per response token) that the last stage keeps besides its layers: the final norm;
    the hidden states of the scored rows and their log-sum-exp; a micro-batch's cosines and sines.

    Where the last layer drops positions that are not scored, its MLP and the final norm count per response token.
    """
    norm, head = layout.norm_bytes(config), config.hidden_size * layout.num_bytes + 4.0
    angles = config.head_dim * layout.num_bytes if layout.kernels.fused_rope else 0.0
    if not layout.kernels.scored_rows or layout.sequence or config.experts:
        return norm + angles, head
    # the head reads the final norm's output itself, which is of scored rows already
    parts, again = layer_bytes(config, layout), recomputed_bytes(config, layout)
    moved = parts["norms"] / 2 + parts["mlp"] - again.get("mlp", 0.0)
    moved += 0.0 if "layernorm" in again else parts["mlp input"]
    if layout.whole_share == 1:  # the last layer of the last chunk
        moved = 0.0
    return angles - moved, head + norm + moved


def layers_in_flight(config: ModelConfig, parallel: Parallel, stage: int, num_micro_batches: int) -> int:
    """Layer-passes (a layer of one micro-batch) whose activations a stage holds at its peak.

    1F1B: stage p of P holds min(m, P - p) micro-batches. Interleaved: 2 (P - p - 1) + (v - 1) P warm-up chunks and
    the running one, at most m v.
    """
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline or 1
    if virtual == 1:
        chunks = min(num_micro_batches, stages - stage)
    else:
        chunks = min(num_micro_batches * virtual, 2 * (stages - stage - 1) + (virtual - 1) * stages + 1)
    return chunks * config.num_layers // (stages * virtual)
