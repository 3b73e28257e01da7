"""The section sample of a recipe, which evaluations and rollouts use as well."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_stepkto.recipe.section import Added, Dtype, RecipePath, Section, TrainingSamples, Unkeyed


class Speculative(Section):
    """Tokens are proposed cheaply and checked by the model in one step; their distribution stays the model's."""

    method: Literal["ngram", "eagle", "eagle3", "draft_model"] = Field(
        description="what proposes tokens: earlier text, or a smaller model"
    )
    num_tokens: int = Field(ge=1, description="tokens proposed per step")
    model: RecipePath | None = Field(None, description="folder of the proposing model; null with method: ngram")

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.method == "ngram") != (self.model is None):
            raise ValueError("method: ngram takes no model; every other method needs one (a Hugging Face folder)")
        return self


class Sampling(Section):
    backend: Literal["vllm", "transformers"] = Field("vllm", description="the engine that generates")
    num_samples: TrainingSamples[int] = Field(8, ge=1, description="K, solutions per problem")
    temperature: TrainingSamples[float] = Field(1.0, gt=0, description="sampling temperature of training samples")
    top_p: TrainingSamples[float] = Field(1.0, gt=0, le=1, description="nucleus sampling of training samples; 1: off")
    max_tokens: int = Field(ge=1, description="limit of a response; a longer one is cut and marked truncated")
    workers: Unkeyed[int] = Field(1, ge=1, description="processes, each with its own engine")
    chunk_problems: int = Field(32, ge=1, description="problems in one chunk: the unit of resuming")
    reproducible: Added[bool] = Field(
        True, description="one chunk at a time in an engine, so that a resumed run samples the same tokens"
    )
    dtype: Dtype = Field(
        "auto",
        description="auto: train.dtype (in measure: that of the weights); float32 on a CPU without instructions for it",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs per engine")
    gpu_memory_utilization: Unkeyed[float | None] = Field(
        None, gt=0, le=1, description="share of a GPU's memory for weights and cache; null: vLLM's own (0.92)"
    )
    max_num_seqs: Added[int | None] = Field(
        None, ge=1, description="sequences in one batch; null: vLLM's own for the GPU"
    )
    quantization: Added[Literal["fp8"] | None] = Field(None, description="round the weights to 8 bits as they load")
    kv_cache_dtype: Added[Literal["auto", "fp8"]] = Field(
        "auto", description="of the cache; auto: that of the activations"
    )
    enable_prefix_caching: Added[bool | None] = Field(
        None, description="compute the prompt that K samples share once; null: vLLM's own (where it can)"
    )
    speculative: Added[Speculative | None] = Field(None, description="speculative decoding; null: none")
    stall_timeout_s: Unkeyed[float] = Field(
        600.0, gt=0, description="seconds without a token after which an engine is restarted"
    )
    gap_problems: TrainingSamples[int] = Field(
        8, ge=0, description="problems whose samples carry log-probs for the trainer to compare; 0: no comparison"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_pipelines(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and not {"pipeline_parallel", "pipeline_parallel_size"}.isdisjoint(keys):
            raise ValueError(
                "an engine does not span nodes; use tensor_parallel up to the GPUs of a node, quantization: fp8 where "
                "the weights do not fit, and more workers (on a cluster SAMPLE_ELEMENTS) for speed"
            )
        return keys

    @property
    def is_rounded(self) -> bool:
        """Whether the sampler computes with fewer bits than the weights have."""
        return self.quantization is not None or self.kv_cache_dtype != "auto"
