"""The section train of a recipe; a warm-up has the same."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from megatron_stepkto.recipe.section import Added, RecipePath, Section, Unkeyed, of_type

Method = str  # a name of methods/registry.py, which checks it, and the keys beside it, right after loading


class Parallel(Section):
    """Megatron-Core's layout. Data parallel size = ranks / (tensor * pipeline * context).

    The ranks of a stage are cut twice: for attention into tensor x context x data, for a mixture's experts into
    expert_tensor x expert x replicas of the experts.
    """

    ranks: int = Field(1, ge=1, description="processes of the training, one per GPU")
    tensor: int = Field(1, ge=1, description="ranks that share each matrix")
    pipeline: int = Field(1, ge=1, description="ranks that share the layers")
    virtual_pipeline: int | None = Field(
        None, ge=2, description="model chunks per pipeline rank; null: not interleaved"
    )
    context: int = Field(1, ge=1, description="ranks that share the tokens of each document")
    expert: int = Field(1, ge=1, description="ranks that share the experts of a mixture of experts")
    expert_tensor: int = Field(1, ge=1, description="ranks that share each matrix of an expert")
    sequence: bool = Field(False, description="share activations between the tensor-parallel ranks along the sequence")
    distributed_optimizer: bool = Field(False, description="share the optimizer's state between data-parallel ranks")
    overlap: bool = Field(True, description="sum gradients and gather weights of data parallelism during computation")

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if self.ranks % (self.tensor * self.pipeline * self.context):
            raise ValueError(
                f"ranks ({self.ranks}) must be a multiple of tensor x pipeline x context "
                f"({self.tensor} x {self.pipeline} x {self.context})"
            )
        if self.ranks % (self.expert * self.expert_tensor * self.pipeline):
            raise ValueError(
                f"ranks ({self.ranks}) must be a multiple of expert x expert_tensor x pipeline "
                f"({self.expert} x {self.expert_tensor} x {self.pipeline})"
            )
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline >= 2")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence parallelism needs tensor >= 2")
        return self


class Optimizer(Section):
    lr: float = Field(gt=0, description="learning rate after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate falls after the warm-up"
    )
    warmup_updates: int = Field(0, ge=0, description="updates over which the learning rate rises linearly")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate of a schedule, as a share of lr")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW; on matrices and embeddings, not on norms and biases")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    beta2: float = Field(0.98, ge=0, lt=1, description="decay of AdamW's second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    clip_grad: float = Field(1.0, ge=0, description="gradient norm above which gradients are scaled down; 0: never")
    offload: Added[float] = Field(
        0.0, ge=0, le=1, description="share of main weights and moments that the host holds and updates"
    )
    moment_dtype: Added[Literal["float32", "bfloat16"]] = Field("float32", description="of AdamW's two moments")
    gradient_dtype: Added[Literal["float32", "bfloat16"]] = Field(
        "float32", description="in which gradients are added up and summed over ranks"
    )


class Recompute(Section):
    """Which activations the backward pass computes again instead of keeping; one of the keys."""

    modules: list[Literal["core_attn", "layernorm", "mlp", "moe"]] | None = Field(
        None, min_length=1, description="these modules of every layer: their outputs are not kept"
    )
    layers: int | None = Field(
        None, ge=1, description="so many first layers of each model chunk, whole: only their inputs are kept"
    )
    every: int | None = Field(None, ge=1, description="all layers; only the input of every n-th is kept")

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("modules", "layers", "every") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of modules, layers and every, got {' and '.join(given) or 'none'}")
        if self.modules and len(set(self.modules)) < len(self.modules):
            raise ValueError(f"modules names one twice: {', '.join(self.modules)}")
        return self


class Loss(Section):
    """Step-KTO's knobs (see losses.py). KTO is Step-KTO with step_weight = 0."""

    beta_outcome: float = Field(0.1, gt=0, description="beta of solutions: how far the policy may move")
    beta_step: float = Field(0.1, gt=0, description="beta of steps")
    desirable_weight_outcome: float = Field(1.0, gt=0, description="lambda_D of solutions")
    undesirable_weight_outcome: float = Field(1.0, gt=0, description="lambda_U of solutions")
    desirable_weight_step: float = Field(1.0, gt=0, description="lambda_D of steps")
    undesirable_weight_step: float = Field(1.0, gt=0, description="lambda_U of steps")
    balance: Literal["fixed", "auto"] = Field(
        "fixed",
        description="auto raises one lambda per level until the total weight of right examples is 1 to 4/3 times that "
        "of wrong ones",
    )
    outcome_weight: float = Field(1.0, ge=0, description="w_o, weight of the solution part of the loss")
    step_weight: float = Field(1.0, ge=0, description="w_s, weight of the step part of the loss; 0: KTO")
    step_reduction: Literal["mean", "sum"] = Field("mean", description="over the judged steps of a solution")
    reference_point: Literal["mismatched", "batch", "none"] = Field(
        "mismatched", description="z: mean log-ratio of mismatched pairs, of the previous update's batch, or 0"
    )
    nll_weight: float = Field(1.0, ge=0, description="alpha of IRPO: weight of the chosen side's likelihood")
    dpo_beta: float = Field(0.1, gt=0, description="beta of DPO and IRPO")

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.outcome_weight == 0 and self.step_weight == 0:
            raise ValueError("outcome_weight and step_weight are both 0: nothing would train")
        return self


class FP8(Section):
    """8-bit matrix products of Transformer Engine. Loss, log-probs, reference points, embedding and head stay as they
    are; optimizer and main weights stay in fp32."""

    format: Literal["e4m3", "hybrid"] = Field("hybrid", description="hybrid: e4m3 forward, e5m2 gradients")
    scaling: Literal["delayed", "current", "blockwise", "mxfp8"] = Field(
        "current", description="scale from a tensor's history, its own maximum, 128-value or 32-value blocks"
    )
    bf16_layers_at_start: int = Field(0, ge=0, description="first layers that stay in bfloat16")
    bf16_layers_at_end: int = Field(0, ge=0, description="last layers that stay in bfloat16")
    weights: bool = Field(
        False, description="keep and gather matrices in FP8; checkpoints hold the main weights in bf16"
    )

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.scaling == "delayed" and (self.bf16_layers_at_start or self.bf16_layers_at_end):
            raise ValueError("scaling: delayed cannot leave first or last layers in bf16; choose current or blockwise")
        if self.weights and self.scaling not in ("current", "blockwise"):
            # delayed would round the weights that are loaded by a scale of 1; megatron-core cannot gather mxfp8's
            raise ValueError(f"weights: true goes with scaling: current or blockwise, got {self.scaling}")
        return self


class LoRA(Section):
    """Trains low-rank updates of linear layers alone: W + alpha / rank * B A (arXiv 2106.09685); the base is frozen.

    The adapter is one for all iterations, and the reference is the base without it (reference: initial) or with the
    adapter of the iteration before (previous): no second model is read.
    """

    rank: int = Field(16, ge=1, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: Annotated[
        Annotated[Literal["all"], Tag("#all")] | Annotated[list[str], Tag("#list")], of_type(list, "#list", "#all")
    ] = Field(
        "all", description="linear layers by the last part of their Hugging Face name (q_proj, down_proj), or all"
    )
    start: RecipePath | None = Field(
        None, description="PEFT folder of an adapter of initial_model, to train further; null: a new adapter"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="0: with dropout the policy would not be the one that sampled")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dropout:
            raise ValueError(
                f"dropout must be 0, got {self.dropout}: with dropout the log-ratios would not start at 0, and the "
                "model that trains would not be the one that sampled; lower rank or optimizer.lr against overfitting"
            )
        if not self.targets:
            raise ValueError("targets is empty: nothing would train; name layers, or set targets: all")
        return self


class Log(Section):
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = Field(True, description="event files in the train stage's folder tensorboard/")
    wandb: str | None = Field(None, min_length=1, description="project of Weights & Biases (package wandb)")
    entropy: bool = Field(False, description="mean entropy at response tokens (one more pass over the logits)")


class Training(Section):
    method: Method = Field("step_kto", description="what is trained on, and with which loss")
    parallel: Unkeyed[Parallel] = Field(Parallel(), description="Megatron-Core's layout")
    optimizer: Optimizer = Field(description="AdamW and its schedule")
    loss: Loss = Field(Loss(), description="weights of the loss")
    epochs: int = Field(1, ge=1, description="passes over the data set per iteration")
    max_updates: int | None = Field(
        None, ge=1, description="updates after which an iteration's training ends; null: all"
    )
    global_batch_size: int = Field(ge=1, description="examples per update (pairs for DPO and IRPO)")
    micro_batch_tokens: Unkeyed[int] = Field(4096, ge=1, description="tokens that one packed micro-batch may hold")
    pad_documents_to: Unkeyed[int] = Field(
        1, ge=1, description="tokens: each document is padded to a multiple of it; 1: packed without gaps"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights and activations")
    device: Unkeyed[Literal["auto", "cpu", "cuda"]] = Field("auto", description="auto: CUDA where there is a GPU")
    reference: Literal["previous", "initial"] = Field(
        "previous", description="the model that log-ratios are measured against"
    )
    checkpoint_every: Unkeyed[int] = Field(50, ge=1, description="updates between checkpoints")
    keep_checkpoints: Unkeyed[int] = Field(2, ge=1, description="how many of the newest checkpoints to keep")
    async_checkpoints: Unkeyed[bool] = Field(False, description="write checkpoints in processes beside the training")
    recompute: Unkeyed[
        Annotated[Annotated[bool, Tag("#whole")] | Annotated[Recompute, Tag("#part")], of_type(dict, "#part", "#whole")]
    ] = Field(False, description="recompute activations in the backward pass: true: all, or those named below")
    offload_layers: Unkeyed[int] = Field(
        0, ge=0, description="first layers whose activations wait for the backward pass in the host's memory"
    )
    transformer_engine: Literal["required", "auto", "off"] = Field(
        "auto",
        description="layers of Transformer Engine: insist, use them for bfloat16 on a GPU where installed, or never",
    )
    apex: Literal["required", "auto", "off"] = Field(
        "auto", description="NVIDIA Apex's fused weight gradients and Adam"
    )
    fp8: FP8 | None = Field(None, description="8-bit matrix products; null: none")
    max_gap: Unkeyed[float] = Field(
        0.05, gt=0, description="nats: mean distance of sampler and trainer log-probs above which the run warns"
    )
    lora: Added[LoRA | None] = Field(None, description="train low-rank adapters alone; null: train all weights")
    log: Unkeyed[Log] = Field(Log(), description="where metrics go besides metrics.jsonl")
    timeout_s: Unkeyed[float] = Field(600.0, gt=0, description="seconds: limit of one collective operation")

    @property
    def document_multiple(self) -> int:
        """Tokens that every document is padded to a multiple of: context parallelism cuts it into twice its ranks."""
        return math.lcm(self.pad_documents_to, 2 * self.parallel.context if self.parallel.context > 1 else 1)

    def recomputes(self, module: str) -> bool:
        """Whether this module's output is not kept (``recompute.modules``)."""
        return isinstance(self.recompute, Recompute) and module in (self.recompute.modules or [])

    @model_validator(mode="after")
    def _check_acceleration(self) -> Self:
        if self.transformer_engine == "required" and self.dtype == "float32":
            raise ValueError(
                "transformer_engine: required goes with dtype: bfloat16: it would multiply float32 matrices in TF32, "
                "which keeps 11 bits; set dtype: bfloat16, or transformer_engine: auto"
            )
        if self.lora is not None and self.lora.start is not None and self.reference == "initial":
            raise ValueError(
                "reference: initial goes with a new adapter: with lora.start M0 is initial_model with that adapter, "
                "and the model at hand is the one without; set reference: previous"
            )
        self._check_memory()
        if self.fp8 is None:
            return self
        if self.lora is not None:
            raise ValueError("lora and fp8 together are not supported: remove one of them")
        if self.dtype != "bfloat16":
            raise ValueError(f"fp8 goes with dtype: bfloat16, got {self.dtype}")
        if self.transformer_engine == "off":
            raise ValueError("fp8 needs Transformer Engine: set transformer_engine to required or auto")
        if self.fp8.weights and not self.parallel.distributed_optimizer:
            raise ValueError(
                "fp8.weights needs parallel.distributed_optimizer: true, which holds the fp32 main weights"
            )
        return self

    def _check_memory(self) -> None:
        """Combinations that megatron-core ignores, or computes something else with."""
        optimizer = self.optimizer
        lower = {
            "offload": optimizer.offload > 0,
            "moment_dtype: bfloat16": optimizer.moment_dtype == "bfloat16",
            "gradient_dtype: bfloat16": optimizer.gradient_dtype == "bfloat16",
        }
        for name in (name for name, used in lower.items() if used):
            if self.dtype != "bfloat16":
                raise ValueError(f"optimizer.{name} goes with dtype: bfloat16, got {self.dtype}")
            if self.fp8 is not None and self.fp8.weights:
                raise ValueError(
                    f"optimizer.{name} and fp8.weights together are not supported: the latter's main weights are "
                    "megatron-core's own, in float32; remove one of them"
                )
            if not name.startswith("gradient_dtype") and not self.parallel.distributed_optimizer:
                raise ValueError(
                    f"optimizer.{name} needs parallel.distributed_optimizer: true (also with one rank), whose code "
                    "path in megatron-core it is"
                )
        if lower["offload"] and lower["moment_dtype: bfloat16"]:
            raise ValueError(
                "optimizer.offload holds moments in float32: with it megatron-core ignores moment_dtype; set "
                "moment_dtype: float32, or offload: 0"
            )
        if self.fp8 is not None and self.fp8.scaling == "delayed" and self.recomputes("layernorm"):
            raise ValueError(
                "recompute.modules: layernorm and fp8.scaling: delayed together are not supported: a history of scales "
                "would count each norm twice; choose another scaling, or leave layernorm out"
            )
        if self.offload_layers:
            if self.recompute:
                raise ValueError("offload_layers and recompute together are not supported: set one of them")
            if self.parallel.pipeline > 1:
                raise ValueError(f"offload_layers goes with parallel.pipeline: 1, got {self.parallel.pipeline}")
            if self.transformer_engine == "off" or self.dtype == "float32":
                raise ValueError(
                    "offload_layers needs the layers of Transformer Engine: set dtype: bfloat16, and "
                    "transformer_engine to required or auto"
                )
