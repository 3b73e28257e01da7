"""M0 from random weights, and real text through the same stages: shortened runs of the two recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.base.examples import Examples
from megatron_stepkto.base.packing import plan_updates
from megatron_stepkto.base.records import JudgedSample, TrainExample, read_records, write_records
from megatron_stepkto.methods.registry import load_recipe
from megatron_stepkto.problems.chained_arithmetic.student import corpus
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.report.status import status_text
from megatron_stepkto.run.folder import Run
from megatron_stepkto.run.pipeline import prepare

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]


def stepkto(*arguments: object, timeout: float = 300) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_stepkto", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_warm_up_makes_m0(repository: Path, tmp_path: Path) -> None:
    """30 updates from random weights: the loss falls below that of guessing, and transformers opens the result."""
    stepkto(
        "warm-up", repository / "recipes" / "mini_cpu.yaml", f"--set=output={tmp_path}",
        "--set=warm_up.corpus_size=960",
        "--set=evaluate=null", "--set=warm_up.training.optimizer.warmup_updates=5",
    )  # fmt: skip
    m0 = tmp_path / "mini_cpu" / "M0"
    losses = [row["loss"] for row in rows(m0 / "train" / "metrics.jsonl")]
    guessing = torch.log(torch.tensor(48.0)).item()  # 48 tokens
    assert len(losses) == 30
    assert losses[0] == pytest.approx(guessing, abs=0.5)
    assert losses[-1] < 1.5

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(m0 / "convert" / "model")
    tokenizer = AutoTokenizer.from_pretrained(m0 / "convert" / "model")
    example = Examples.open(m0 / "corpus" / "train")[0]
    ids = torch.tensor([[*example.prompt_token_ids, *example.token_ids]])
    labels = ids.clone()
    labels[0, : len(example.prompt_token_ids)] = -100
    with torch.no_grad():
        assert model(ids, labels=labels).loss.item() < 1.5
    assert tokenizer.decode(example.token_ids, skip_special_tokens=True).splitlines()[-1].startswith("Answer: \\boxed{")


def test_warm_up_of_a_pretrained_model(repository: Path, tmp_path: Path) -> None:
    """The shipped M0 on new solutions: the first loss is transformers' on those, and a sampler opens the result."""
    m0, run = repository / "recipes" / "mini_cpu_m0", tmp_path / "mini_cpu" / "M0"
    solutions = tmp_path / "solutions.jsonl"
    written = [problem.model_copy(update={"solution": text}) for problem, text in corpus(96, seed=5)]
    assert write_records(solutions, written) == 96
    training = "{method: rft, optimizer: {lr: 1.0e-3}, global_batch_size: 32, epochs: 2, device: cpu}"
    overrides = [f"output={tmp_path}", "evaluate=null", f"warm_up={{solutions: [{solutions}], training: {training}}}"]
    recipe = load_recipe(repository / "recipes" / "mini_cpu.yaml", overrides)
    prepare(Run(recipe))
    examples = list(Examples.open(run / "corpus" / "train"))
    assert len(examples) == 96
    tokenizer = load_tokenizer(m0)
    assert examples[0].token_ids == [*tokenizer.encode(written[0].solution, add_special_tokens=False), 2]

    losses = [row["loss"] for row in rows(run / "train" / "metrics.jsonl")]
    first = [examples[i] for i in plan_updates(96, 32, 2, seed=0)[0]]
    before, after = (mean_loss(folder, first) for folder in (m0, run / "convert" / "model"))
    assert len(losses) == 6
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert after < before - 0.01

    stages = {path.parent.name: path.read_bytes() for path in run.glob("*/manifest.json")}
    assert sorted(stages) == ["convert", "corpus", "train"]
    again = Run(recipe)
    prepare(again)  # nothing is done twice
    assert [name for name, _ in again.finished] == ["M0/corpus", "M0/train", "M0/convert"]
    assert again.model(0) == run / "convert" / "model"
    assert "done     M0/corpus" in status_text(run.parent)
    assert {path.parent.name: path.read_bytes() for path in run.glob("*/manifest.json")} == stages


def mean_loss(folder: Path, examples: list[TrainExample]) -> float:
    """Next-token loss of transformers over all response tokens, nats per token."""
    from transformers import AutoModelForCausalLM

    model, total = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0
    for example in examples:
        ids = torch.tensor([[*example.prompt_token_ids, *example.token_ids]])
        with torch.no_grad():
            scores = model(ids).logits[0, len(example.prompt_token_ids) - 1 : -1].log_softmax(-1)
        total -= float(scores.gather(1, torch.tensor(example.token_ids)[:, None]).sum())
    return total / sum(len(example.token_ids) for example in examples)


@pytest.mark.long
def test_real_text_with_labels_by_people(repository: Path, data_dir: Path, tmp_path: Path) -> None:
    """ProcessBench through import, byte-level BPE, warm-up, dataset, Step-KTO and export, in few updates."""
    source = data_dir / "steps" / "processbench_gsm8k.jsonl"
    stepkto(
        "run", repository / "recipes" / "gsm8k_offline_cpu.yaml", f"--set=output={tmp_path}",
        f"--set=problems.imports=[{{format: processbench, path: {source}}}]",
        "--set=warm_up.training.max_updates=4", "--set=train.max_updates=3", "--set=train.global_batch_size=16",
    )  # fmt: skip
    run = tmp_path / "gsm8k_offline_cpu"
    first = run / "iteration_1"
    raw = rows(source)
    judged = list(read_records(first / "judge" / "judged.jsonl", JudgedSample))
    # what people said, step by step, is what the records hold
    assert [[s.label for s in sample.steps] for sample in judged] == [row["labels"] for row in raw]
    assert [sample.outcome for sample in judged] == [int(row["final_answer_correct"]) for row in raw]
    train = list(Examples.open(first / "dataset" / "train"))
    held_out = list(Examples.open(first / "dataset" / "held_out"))
    assert not {e.problem_id for e in train} & {e.problem_id for e in held_out}
    longer = sum(len(s.prompt_token_ids) + len(s.token_ids) > 768 for s in judged)
    assert len(train) + len(held_out) == len(raw) - longer
    corpus = {e.problem_id for e in Examples.open(run / "M0" / "corpus" / "train")}
    assert not corpus & {e.problem_id for e in held_out}, "the warm-up must not see what measures"
    metrics = rows(first / "train" / "metrics.jsonl")
    assert [row["update"] for row in metrics if "held_out" in row] == [0, 3]
    assert metrics[0]["held_out"]["step_margin"] == pytest.approx(0.0, abs=1e-3)
    assert metrics[0]["held_out"]["num_wrong_steps"] == sum(s.label == 0 for e in held_out for s in e.steps)
    assert (run / "report.html").is_file()
