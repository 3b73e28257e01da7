"""Megatron-Core's GPTModel for a Hugging Face architecture; its last stage returns hidden states, not logits."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    layers,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

from megatron_stepkto.architectures.adapters import AdaptedLinear
from megatron_stepkto.architectures.layout import layout_faults, refuse
from megatron_stepkto.architectures.model_config import ModelConfig
from megatron_stepkto.architectures.sharding import padded_vocab_size
from megatron_stepkto.logprobs import linear_log_probs, linear_log_probs_and_entropy
from megatron_stepkto.megatron.acceleration import PLAIN, Acceleration
from megatron_stepkto.megatron.context_parallel import ContextParallelAttention
from megatron_stepkto.megatron.layers import GatedMLP, PackedAttention, RMSNorm, ScoredLayer
from megatron_stepkto.megatron.lora import add_adapters
from megatron_stepkto.megatron.memory import activation_fields
from megatron_stepkto.recipe.keys import LoRA, Parallel, Recompute


class PolicyModel(GPTModel):
    """GPTModel whose last pipeline stage returns final hidden states: of the R scored positions [R, 1, H] where
    ``keeps_scored_rows``, else of all positions of this rank [t, 1, H]. ``log_probs`` turns them into token log-probs
    without a logits tensor."""

    words: int  # tokens of the vocabulary, without the rows that pad it for tensor parallelism
    keeps_scored_rows: bool

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def log_probs(
        self, hidden: Tensor, rows: Tensor, targets: Tensor, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """log p(targets[i] | tokens up to packed position rows[i]): [n] float32, nats; and on request the entropy of
        that distribution: [n] float32, nats, without gradient."""
        if self.config.sequence_parallel:
            # The head's gradient differs per rank (each holds other words): sum while scattering it back.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        if not self.keeps_scored_rows:
            hidden = hidden.index_select(0, rows)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        group = parallel_state.get_tensor_model_parallel_group()
        # Where the layers add their weights' gradients into DDP's float32 buffer, so does the head.
        fused = self.config.gradient_accumulation_fusion and weight.requires_grad
        buffer = weight.main_grad if fused and weight.main_grad.dtype == torch.float32 else None
        # A weight that is the embedding too still gets that gradient by autograd, and DDP adds it. Any other gets a
        # placeholder, which tells DDP that the gradient is whole and may be summed over ranks, and is not added.
        placeholder = buffer is not None and not (self.share_embeddings_and_output_weights and self.pre_process)
        if placeholder:
            weight.grad_added_to_main_grad = True
        fusion: dict[str, Any] = {"grad_buffer": buffer, "placeholder": placeholder}
        head = (hidden[:, 0], weight, targets, self.words, group)
        if entropy:
            return linear_log_probs_and_entropy(*head, **fusion)
        return linear_log_probs(*head, **fusion), None


def transformer_config(
    config: ModelConfig,
    parallel: Parallel,
    dtype: torch.dtype,
    acceleration: Acceleration = PLAIN,
    *,
    on_cpu: bool,
    recompute: bool | Recompute = False,
    offload_layers: int = 0,
) -> TransformerConfig:
    """Megatron-Core's config of a model and layout."""
    refuse(layout_faults(config, parallel))
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_size,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # YaRN multiplies cosine and sine of query and key; over whole heads that is a factor of their product.
        softmax_scale=config.rope.attention_factor**2 / math.sqrt(config.head_dim),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        use_cpu_initialization=on_cpu,
        # Weights come from a checkpoint: random ones would only cost time.
        perform_initialization=False,
        # Micro-batches are packed to different lengths. Megatron asks for this dispatcher even when dense.
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        **_expert_settings(config, acceleration),
        # Interleaved schedules give wrong gradients with batched p2p at pipeline 2, without an error: never both.
        batch_p2p_comm=parallel.virtual_pipeline is None,
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_sync=False,
        # The loss is a sum over units; Megatron divides the gradient once by the units of the global batch.
        calculate_per_token_loss=True,
        # These fusions are torch.compile'd: not on CPU.
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=not on_cpu,
        masked_softmax_fusion=False,
        **{
            # layers.rotate_packed, installed by patches.install; it does not split documents for context parallelism
            "apply_rope_fusion": on_cpu and parallel.context == 1,
            **acceleration.transformer_fields(),
        },
        **activation_fields(recompute, offload_layers),
    )


def _expert_settings(config: ModelConfig, acceleration: Acceleration) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_grouped_gemm": acceleration.transformer_engine,
        # softmax over all experts and then top-k, or top-k and then softmax: the renormalised weights of the former
        "moe_router_pre_softmax": not experts.renormalize,
        "moe_router_dtype": "fp32",
        # Preference training is short and starts from a balanced router: no auxiliary loss, and no token is dropped.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _keeps_scored_rows(config: ModelConfig, megatron: TransformerConfig, acceleration: Acceleration) -> bool:
    """Whether the model's last layer drops positions that nothing reads: where a rank holds all of a micro-batch, and
    the layer treats positions independently after attention."""
    split = megatron.sequence_parallel or megatron.context_parallel_size > 1
    return not (split or config.experts or acceleration.transformer_engine)


def _block_spec(
    config: ModelConfig, num_layers: int, context: int, acceleration: Acceleration, *, scored: bool
) -> TransformerBlockSubmodules:
    """``scored``: the last of these layers is the model's last, and keeps only scored positions."""
    kinds: dict[str, Any] = {
        "num_experts": config.experts.number if config.experts else None,
        "qk_layernorm": config.qk_norm,
    }
    if acceleration.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        spec: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(**kinds, moe_grouped_gemm=bool(config.experts))
        return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=TENorm)
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm", **kinds))
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = ContextParallelAttention if context > 1 else PackedAttention
    if config.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.experts:
        # The local spec would save this norm as part of a missing linear_fc1; use Transformer Engine's name.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    elif isinstance(mlp := spec.submodules.mlp, functools.partial):  # 0.19: of the function that makes one
        spec.submodules.mlp = functools.partial(GatedMLP.as_mlp_submodule, **mlp.keywords)
    else:
        mlp.module = GatedMLP
    layers = [spec] * num_layers
    if scored:
        layers[-1] = dataclasses.replace(spec, module=ScoredLayer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _mark_tensor_parallel(chunk: PolicyModel) -> None:
    """Mark the weights that are split over tensor-parallel ranks.

    Megatron-Core 0.16 sets these marks while it initialises weights, which is off here (0.19 sets them always).
    Without them the gradient norm counts only rank 0's part of a split weight: clipping is silently wrong.
    """
    split_dim = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        weight = getattr(module, "weight", None)
        if type(module) not in split_dim or weight is None:
            continue
        if hasattr(weight, "tensor_model_parallel"):
            assert (weight.tensor_model_parallel, weight.partition_dim) == (True, split_dim[type(module)])
        else:
            set_tensor_model_parallel_attributes(weight, True, split_dim[type(module)], 1)


def _mark_experts(chunk: PolicyModel) -> None:
    """Mark replicated experts as Megatron marks only those that it splits over ranks (expert parallel size above 1).

    Their gradients are then summed over the tensor-parallel ranks too. Each of these sends other tokens to its copy:
    without the mark the copies would silently drift apart. And experts have an optimizer of their own at every layout,
    so that a checkpoint of one can be read at another. The gradient norm counts every rank's experts, as those that
    share a matrix hold parts, and the others' replicas are left out by the experts' own data-parallel group.
    """
    for module in chunk.modules():
        if isinstance(module, SequentialMLP | TEGroupedMLP):
            for weight in module.parameters():
                weight.allreduce = False
                if not hasattr(weight, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(weight, True, 0, 1)


@contextlib.contextmanager
def _heads_without_apex() -> Iterator[None]:
    """Let Megatron build a ColumnParallelLinear under gradient accumulation fusion where Apex is not installed.

    It refuses, because its own product would need Apex's extension. Transformer Engine's layers bring theirs, and the
    one ColumnParallelLinear beside them, the model's head, only holds a weight: ``log_probs`` computes.
    """
    before = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = before


def build_model_chunks(
    config: ModelConfig,
    megatron: TransformerConfig,
    acceleration: Acceleration = PLAIN,
    lora: LoRA | None = None,
    adapted: Mapping[str, AdaptedLinear] | None = None,
) -> list[PolicyModel]:
    """This rank's part of the model: one chunk, or one per virtual pipeline stage. Weights are not initialised.

    Args:
        lora, adapted: train only these layers' adapters.
    """
    stages: list[int | None] = (
        list(range(megatron.virtual_pipeline_model_parallel_size))
        if megatron.virtual_pipeline_model_parallel_size
        else [None]
    )
    keeps_scored_rows = _keeps_scored_rows(config, megatron, acceleration)
    chunks = []
    for stage in stages:
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        num_layers = get_num_layers_to_build(megatron, vp_stage=stage)
        with _heads_without_apex() if acceleration.transformer_engine else contextlib.nullcontext():
            chunk = PolicyModel(
                config=megatron,
                transformer_layer_spec=_block_spec(
                    config, num_layers, megatron.context_parallel_size, acceleration,
                    scored=is_last and keeps_scored_rows,
                ),
                vocab_size=padded_vocab_size(config.vocab_size, megatron.tensor_model_parallel_size),
                max_sequence_length=config.max_positions,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=is_last,
                position_embedding_type="rope",
                rotary_base=int(config.rope.base),
                share_embeddings_and_output_weights=config.tied,
                vp_stage=stage,
            )  # fmt: skip
        # Megatron fixes the llama3 constants and rounds the base to an int: give it the model's own frequencies.
        chunk.rotary_pos_emb.inv_freq = config.inv_freq().to(chunk.rotary_pos_emb.inv_freq.device)
        chunk.words = config.vocab_size
        chunk.keeps_scored_rows = keeps_scored_rows
        _mark_tensor_parallel(chunk)
        _mark_experts(chunk)
        if lora is not None:
            assert adapted is not None
            add_adapters(chunk, adapted, lora)
        chunk.model_type = ModelType.encoder_or_decoder
        chunks.append(chunk)
    return chunks
