"""The section sample of a recipe, which evaluations and rollouts use as well."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_stepkto.recipe.section import Dtype, Section, TrainingSamples, Unkeyed


class Sampling(Section):
    backend: Literal["vllm", "transformers"] = Field("vllm", description="the engine that generates")
    num_samples: TrainingSamples[int] = Field(8, ge=1, description="K, solutions per problem")
    temperature: TrainingSamples[float] = Field(1.0, gt=0, description="sampling temperature of training samples")
    top_p: TrainingSamples[float] = Field(1.0, gt=0, le=1, description="nucleus sampling of training samples; 1: off")
    max_tokens: int = Field(ge=1, description="limit of a response; a longer one is cut and marked truncated")
    workers: Unkeyed[int] = Field(1, ge=1, description="processes, each with its own engine")
    chunk_problems: int = Field(32, ge=1, description="problems in one chunk: the unit of resuming")
    reproducible: bool = Field(
        True, description="one chunk at a time in an engine, so that a resumed run samples the same tokens"
    )
    dtype: Dtype = Field("auto", description="auto: that of the weights; float32 on a CPU without instructions for it")
    tensor_parallel: int = Field(1, ge=1, description="GPUs per engine")
    stall_timeout_s: Unkeyed[float] = Field(
        600.0, gt=0, description="seconds without a token after which an engine is restarted"
    )
    gap_problems: TrainingSamples[int] = Field(
        8, ge=0, description="problems whose samples carry log-probs for the trainer to compare; 0: no comparison"
    )
