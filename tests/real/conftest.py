"""The real models, each found or made once a session, and what their tests share: a round trip, and real samples."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_stepkto.base.records import (
    JudgedSample,
    KLPartner,
    Problem,
    Sample,
    TrainExample,
    TrainStep,
    read_records,
    write_records,
)
from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_stepkto.judging.stage import judge_file
from megatron_stepkto.recipe.keys import Judging, Prompt, Sampling
from megatron_stepkto.sampling.draw import new_drawing, read_prompts
from megatron_stepkto.sampling.job import Pass
from tests.conftest import REPOSITORY

MATHEMATICS = Path(__file__).with_name("mathematics.jsonl")  # written for these tests
WORD_PROBLEMS = 8  # the first of it; the others are in LaTeX
PROMPT = Prompt(
    chat=True, template="{problem}\nWork step by step, one short step on each line. End with: The answer is N."
)
MAKING_LIMIT_S = 900


@dataclass(frozen=True)
class RealModel:
    """A Hugging Face folder, the layouts that its heads allow, and its copy that went through Megatron."""

    name: str
    folder: Path
    layouts: dict[str, dict[str, int]]
    megatron: Path
    back: Path


LAYOUTS = {
    "smollm2-135m": {"TP 3": {"ranks": 3, "tensor": 3}, "PP 2": {"ranks": 2, "pipeline": 2}},
    "qwen2.5-coder-0.5b": {"TP 2": {"ranks": 2, "tensor": 2}, "PP 2": {"ranks": 2, "pipeline": 2}},
}


def find_or_make(name: str) -> Path:
    """$STEPKTO_REAL_MODELS/NAME, or the one made from the package index in build/real_models (kept for later runs)."""
    given = os.environ.get("STEPKTO_REAL_MODELS")
    if given is not None:
        folder = Path(given) / name
        if not (folder / "config.json").is_file():
            pytest.skip(f"no {folder}; make it: python -m tests.real.make_models {given} {name}")
        return folder
    out = REPOSITORY / "build" / "real_models"
    if not (out / name / "config.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.real.make_models", str(out), name]
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=MAKING_LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} was not made within {MAKING_LIMIT_S} s; set STEPKTO_REAL_MODELS to a folder with it")
        if done.returncode != 0:
            if "ERROR: No matching distribution" in done.stderr or "ERROR: Could not find" in done.stderr:
                pytest.skip(f"the package index does not have {name}; set STEPKTO_REAL_MODELS to a folder with it")
            raise AssertionError(done.stderr[-3000:])
    return out / name


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Where other programs use the cores, two threads of a product wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    scope="session", params=["smollm2-135m", pytest.param("qwen2.5-coder-0.5b", marks=pytest.mark.big_model)]
)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    folder = find_or_make(request.param)
    there = tmp_path_factory.mktemp("converted")
    hf_to_megatron(folder, there / "megatron")
    megatron_to_hf(there / "megatron", there / "back")
    return RealModel(request.param, folder, LAYOUTS[request.param], there / "megatron", there / "back")


@dataclass(frozen=True)
class Sampled:
    """What vLLM sampled from the model that went through Megatron, and what the judge stage made of it."""

    greedy: list[Sample]
    judged: list[JudgedSample]

    @property
    def examples(self) -> list[TrainExample]:
        """The judged samples with labels in turns: what a small model gets right must not decide what is tested."""
        partners = [
            KLPartner(example_id=sample.sample_id, token_ids=sample.token_ids, steps=_labelled(sample))
            for sample in (*self.judged[1:], self.judged[0])
        ]
        return [
            TrainExample(
                example_id=sample.sample_id, problem_id=sample.problem_id, prompt_token_ids=sample.prompt_token_ids,
                token_ids=sample.token_ids, steps=_labelled(sample), outcome=(0, 1)[number % 2], kl_partner=partner,
                token_log_probs=sample.token_log_probs,
            )
            for number, (sample, partner) in enumerate(zip(self.judged, partners, strict=True))
        ]  # fmt: skip


def _labelled(sample: JudgedSample) -> list[TrainStep]:
    return [
        TrainStep(token_start=step.token_start, token_end=step.token_end, label=(1, 0, None)[number % 3])
        for number, step in enumerate(sample.steps) if step.token_end > step.token_start
    ]  # fmt: skip


@pytest.fixture(scope="session")
def sampled(real: RealModel, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    folder = tmp_path_factory.mktemp("sampled")
    problems, judged = folder / "problems.jsonl", folder / "judged.jsonl"
    write_records(problems, list(read_records(MATHEMATICS, Problem))[:WORD_PROBLEMS])
    settings = Sampling(max_tokens=64, dtype="float32", gap_problems=WORD_PROBLEMS)
    passes = [
        Pass(name="greedy", num_samples=1, temperature=0, top_p=1),
        Pass(name="samples", num_samples=1, temperature=1, top_p=1),
    ]
    prompts = read_prompts(problems, PROMPT, real.back)
    title = f"samples of {real.name}"
    drawing = new_drawing(real.back, "M0", prompts, passes, settings, 7, folder / "sample", title=title)
    drawing.draw()
    drawn = drawing.finish()
    judge_file(problems, drawn.paths["samples"], judged, real.back, Judging(split="line", process="equations"))
    return Sampled(list(read_records(drawn.paths["greedy"], Sample)), list(read_records(judged, JudgedSample)))
