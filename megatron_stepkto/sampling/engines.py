"""One interface over the programs that draw tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_stepkto.base.dtypes import gpu_count
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling.interface import Completion, Engine
from megatron_stepkto.sampling.job import EngineSettings


def open_engine(settings: EngineSettings, end_ids: Sequence[int]) -> Engine:
    """Load the model into the engine that the recipe names.

    Raises:
        UserError: the engine is not installed, or cannot run this model here.
    """
    if settings.settings.backend == "vllm":
        from megatron_stepkto.sampling.vllm_engine import VLLMEngine

        return VLLMEngine(settings, end_ids)
    from megatron_stepkto.sampling.transformers_engine import TransformersEngine

    return TransformersEngine(settings, end_ids)


def check_engines(settings: Sampling, model: Path) -> None:
    """Whatever ``open_engine`` refuses that shows without opening one: packages, GPUs, keys that do not go together.

    Args:
        model: the folder that will be opened; what depends on its config.json is left out while there is none.

    Raises:
        UserError: names the key, or the package.
    """
    if settings.backend == "vllm":
        from megatron_stepkto.sampling.vllm_engine import check_vllm

        check_vllm(settings, model)
    else:
        from megatron_stepkto.sampling.transformers_engine import check_transformers

        check_transformers(settings)
        if 0 < (found := gpu_count()) < settings.workers:
            raise UserError(
                f"sample.workers: expected a GPU for each of {settings.workers} workers, {found} are visible; "
                f"the others would sample on the CPU; set sample.workers: {found}"
            )


def check_completion(completion: Completion, vocab_size: int | None, where: str) -> None:
    """Refuse what no sane engine returns; NaN weights show here.

    Raises:
        UserError: names the sample.
    """
    ids, log_probs = completion.token_ids, completion.log_probs
    if completion.finish_reason not in ("stop", "length"):
        fault = f'finish reason "{completion.finish_reason}" instead of "stop" or "length"'
    elif not ids:
        fault = "no token, not even the end token"
    elif vocab_size is not None and not all(0 <= token < vocab_size for token in ids):
        fault = f"a token id past the vocabulary of {vocab_size}"
    elif log_probs is not None and len(log_probs) != len(ids):
        fault = f"{len(log_probs)} log-probs for {len(ids)} tokens"
    elif log_probs is not None and not all(map(math.isfinite, log_probs)):
        fault = "a log-prob that is not a finite number"
    else:
        return
    raise UserError(f"sample {where}: the engine returned {fault}; check the model's weights (NaN?)")
