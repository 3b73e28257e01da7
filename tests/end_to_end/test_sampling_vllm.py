"""vLLM draws from a small random Llama: same samples on any number of workers, after a kill, and as transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_stepkto.base.records import Sample, read_records
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.sampling.draw import DrawResult, new_drawing
from megatron_stepkto.sampling.job import Pass, PromptRow

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
PASSES = [
    Pass(name="greedy", num_samples=1, temperature=0, top_p=1),
    Pass(name="samples", num_samples=4, temperature=1.0, top_p=0.95),
]
NUM_PROBLEMS, MAX_TOKENS = 24, 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(0)
    # initializer_range: large enough for a distribution that is far from uniform
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        num_key_value_heads=4, intermediate_size=344, tie_word_embeddings=True, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def prompts() -> list[PromptRow]:
    draw_ = random.Random(3)
    return [
        PromptRow(problem_id=f"p{n}", token_ids=[1] + [draw_.randrange(4, 40) for _ in range(20 + n)])
        for n in range(NUM_PROBLEMS)
    ]


def draw_all(model: Path, directory: Path, workers: int, reproducible: bool = True) -> DrawResult:
    settings = Sampling(
        max_tokens=MAX_TOKENS, num_samples=4, workers=workers, chunk_problems=4, gap_problems=6, dtype="float32",
        reproducible=reproducible,
    )  # fmt: skip
    return draw(model, settings, directory)


def draw(model: Path, settings: Sampling, directory: Path) -> DrawResult:
    drawing = new_drawing(model, "M0", prompts(), PASSES, settings, 7, directory, title="test")
    drawing.draw()
    return drawing.finish()


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> DrawResult:
    return draw_all(model, tmp_path_factory.mktemp("one"), workers=1)


def read(result: DrawResult, name: str) -> list[Sample]:
    return list(read_records(result.paths[name], Sample))


def test_every_sample_is_there_once_and_whole(undisturbed: DrawResult, model: Path) -> None:
    samples = read(undisturbed, "samples")
    assert [s.sample_id for s in samples] == [f"p{n}/M0/samples/{j}" for n in range(NUM_PROBLEMS) for j in range(4)]
    assert len({s.sampler.seed for s in samples if s.sampler}) == len(samples)
    assert len({tuple(s.token_ids) for s in samples[:4]}) > 1
    tokenizer = load_tokenizer(model)
    end = tokenizer.eos_token_id
    for sample in samples:
        stopped = sample.finish_reason == "stop"
        assert stopped or len(sample.token_ids) == MAX_TOKENS
        assert (sample.token_ids[-1] == end) == stopped
        assert end not in sample.token_ids[:-1]
        assert "</s>" not in sample.text
    assert {s.finish_reason for s in samples} == {"stop", "length"}  # or the checks above show little
    counts = undisturbed.counts
    assert counts["solutions"] == NUM_PROBLEMS * 5
    assert counts["tokens"] == sum(len(s.token_ids) for name in ("greedy", "samples") for s in read(undisturbed, name))
    directory = undisturbed.paths["greedy"].parent
    assert sorted(path.name for path in directory.iterdir()) == ["greedy.jsonl", "logs", "samples.jsonl"]


def test_greedy_is_what_transformers_decodes(undisturbed: DrawResult, model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for sample in read(undisturbed, "greedy"):
        ids = torch.tensor([sample.prompt_token_ids])
        with torch.inference_mode():
            output = reference.generate(ids, do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0)
        assert sample.token_ids == output[0, ids.shape[1] :].tolist(), sample.sample_id


def test_log_probs_are_those_of_temperature_one(undisturbed: DrawResult, model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    samples = read(undisturbed, "samples")
    with_values = [s for s in samples if s.token_log_probs is not None]
    assert [s.problem_id for s in with_values] == [f"p{n}" for n in range(6) for _ in range(4)]
    for sample in with_values:
        ids = torch.tensor([sample.prompt_token_ids + sample.token_ids])
        with torch.inference_mode():
            logits = reference(ids).logits[0, len(sample.prompt_token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        assert sample.token_log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def without_speed(result: DrawResult) -> dict[str, Any]:
    return {
        k: v
        for k, v in result.counts.items()
        if k not in ("engines", "tokens_per_second_per_engine", "engine_seconds", "engine_start_seconds")
    }


@pytest.mark.parametrize(
    "reproducible", [pytest.param(True, marks=pytest.mark.long), False], ids=["reproducible", "fed"]
)
def test_killed_with_two_workers_and_resumed_equals_one_worker(
    undisturbed: DrawResult, model: Path, tmp_path: Path, reproducible: bool
) -> None:
    """SIGKILL of the parent after the first chunk: the workers die with it, and the next call draws the rest."""
    script = (
        "from pathlib import Path; from tests.end_to_end.test_sampling_vllm import draw_all\n"
        f"draw_all(Path({str(model)!r}), Path({str(tmp_path)!r}), workers=2, reproducible={reproducible})"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    chunks = tmp_path / "chunks"
    deadline = time.monotonic() + 600
    while not list(chunks.glob("*-0*.jsonl")):
        assert parent.poll() is None, "the drawing ended before it could be killed"
        assert time.monotonic() < deadline, "no chunk in 600 s"
        time.sleep(0.002)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    drawn = {path.name: path.stat().st_mtime_ns for path in chunks.glob("*-0*.jsonl")}
    time.sleep(1.0)
    after = {path.name: path.stat().st_mtime_ns for path in chunks.glob("*-0*.jsonl")}
    assert len(after) <= len(drawn) + (2 if reproducible else 8)  # a rename was under way, of each worker's chunks
    left = 6 + 2 - len(after)  # 24 problems: 6 chunks of 4 problems of "samples", 2 of 16 of "greedy"
    assert left > 0, "nothing was left to draw: the test shows nothing"

    resumed = draw_all(model, tmp_path, 2, reproducible)
    assert resumed.counts["reproducible"] is reproducible
    if reproducible:
        for name in ("greedy", "samples"):
            assert resumed.paths[name].read_bytes() == undisturbed.paths[name].read_bytes()
        assert without_speed(resumed) == without_speed(undisturbed)
        return
    for name in ("greedy", "samples"):
        fed, alone = read(resumed, name), read(undisturbed, name)
        assert [(s.sample_id, s.sampler) for s in fed] == [(s.sample_id, s.sampler) for s in alone]
        # the tokens too, but where two are equally likely to the last bits
        assert sum(a.token_ids == b.token_ids for a, b in zip(fed, alone, strict=True)) > 0.9 * len(alone)


def test_transformers_engine_agrees_on_greedy_and_repeats_itself(
    undisturbed: DrawResult, model: Path, tmp_path: Path
) -> None:
    settings = Sampling(
        backend="transformers", max_tokens=MAX_TOKENS, num_samples=4, chunk_problems=4, gap_problems=1, dtype="float32"
    )
    first = draw(model, settings, tmp_path / "first")
    second_settings = settings.model_copy(update={"workers": 2})
    second = draw(model, second_settings, tmp_path / "second")
    for name in ("greedy", "samples"):
        assert first.paths[name].read_bytes() == second.paths[name].read_bytes()
    greedy = [(s.token_ids, s.text, s.finish_reason) for s in read(undisturbed, "greedy")]
    assert [(s.token_ids, s.text, s.finish_reason) for s in read(first, "greedy")] == greedy
    row = json.loads(first.paths["samples"].read_text().splitlines()[0])
    assert len(row["token_log_probs"]) == len(row["token_ids"])
