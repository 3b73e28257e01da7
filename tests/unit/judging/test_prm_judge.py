"""Process reward models: random ones of the true architectures, against an independent forward pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
)

from megatron_stepkto.base import dtypes
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.processes import Child
from megatron_stepkto.base.records import Problem, Step
from megatron_stepkto.judging.process import client as clients
from megatron_stepkto.judging.process import prm
from megatron_stepkto.judging.process.interface import Solution, Workplace
from megatron_stepkto.judging.process.prm import PRMJob, PRMJudge, math_shepherd_row, qwen_math_prm_row, read_scores
from megatron_stepkto.judging.process.prm_worker import batches
from megatron_stepkto.recipe.keys import PRMJudge as Settings
from tests.scripted_server import Reply, ScriptedServer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def solution(number: int, steps: list[str]) -> Solution:
    ends = list(accumulate(map(len, steps)))
    spans = tuple(
        Step(start=end - len(s), end=end, token_start=0, token_end=0) for s, end in zip(steps, ends, strict=True)
    )
    return Solution(
        f"s{number}", Problem(problem_id=f"p{number}", problem=f"What is {number}?", answer="7"), "".join(steps), spans
    )


SOLUTIONS = [solution(n, [f"We add {n}.\n\n", "Then we double it.\n", "So 7."][: 1 + n % 3]) for n in range(70)]


def write_tokenizer(directory: Path) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["What is it? We add and then we double it. Please reason. So ки + -"] * 9, trainer)
    tokenizer.add_tokens([AddedToken("<extra_0>", special=False, normalized=False)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    wrapped.chat_template = CHAT
    wrapped.save_pretrained(directory)
    return wrapped


SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip


def write_qwen_prm(directory: Path) -> Path:
    """The layout of Qwen2.5-Math-PRM: decoder under model., head under score., code of its own in auto_map."""
    tokenizer = write_tokenizer(directory)
    torch.manual_seed(1)
    Qwen2Model(Qwen2Config(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(directory)
    weights = {f"model.{name}": w for name, w in load_file(directory / "model.safetensors").items()}
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    torch.nn.init.normal_(head[2].weight, std=0.5)
    weights |= {f"score.{name}": w.detach().clone() for name, w in head.state_dict().items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForProcessRewardModel"], "num_labels": 2}
    config["auto_map"] = {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_qwen2_rm.py").write_text("raise SystemExit('remote code was run')\n")
    return directory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_prm(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def shepherd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shepherd")
    tokenizer = write_tokenizer(directory)
    torch.manual_seed(2)
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=None, tie_word_embeddings=False, **SHAPE)
    MistralForCausalLM(config).save_pretrained(directory)
    return directory


def judge(model: Path, work: Path, **changes: Any) -> PRMJudge:
    options = {"kind": "prm", "model": str(model), "dtype": "float32", "batch_tokens": 600, **changes}
    return PRMJudge(Settings.model_validate(options), Workplace(work))


def qwen_reference(model: Path, solutions: list[Solution]) -> list[list[float]]:
    """One solution at a time, from the tensors: the decoder by hand-fed weights, the head written out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    weights = load_file(model / "model.safetensors")
    decoder = Qwen2Model(Qwen2Config(**{**json.loads((model / "config.json").read_text()), "auto_map": None})).eval()
    decoder.load_state_dict({n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")})
    scores = []
    for each in solutions:
        text = (
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            f"<|im_start|>user\n{each.problem.problem}<|im_end|>\n<|im_start|>assistant\n"
            + "".join(f"{step.strip()}<extra_0>" for step in each.step_texts)
            + "<|im_end|>\n"
        )
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.inference_mode():
            states = decoder(input_ids=ids).last_hidden_state[0]
            states = states[ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")]
            hidden = torch.relu(states @ weights["score.0.weight"].T + weights["score.0.bias"])
            logits = hidden @ weights["score.2.weight"].T + weights["score.2.bias"]
        scores.append([float(p) for p in 1 / (1 + torch.exp(logits[:, 0] - logits[:, 1]))])
    return scores


def shepherd_reference(model: Path, solutions: list[Solution]) -> list[list[float]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    plus, minus = tokenizer.encode("+ -", add_special_tokens=False)[-2:]
    tag = tokenizer.encode(" ки", add_special_tokens=False)[-1]
    scores = []
    for each in solutions:
        text = each.problem.problem + " " + "\n".join(f"{step.strip()} ки" for step in each.step_texts)
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.inference_mode():
            logits = lm(ids).logits[0][ids[0] == tag]
        scores.append(
            [float(p) for p in torch.exp(logits[:, plus]) / (torch.exp(logits[:, plus]) + torch.exp(logits[:, minus]))]
        )
    return scores


@pytest.mark.parametrize("convention", ["qwen_math_prm", "math_shepherd"])
def test_scores_are_those_of_an_independent_forward_pass(
    qwen: Path, shepherd: Path, tmp_path: Path, convention: str
) -> None:
    """70 solutions of unequal length, padded and sorted into batches, by two workers."""
    model, reference = (qwen, qwen_reference) if convention == "qwen_math_prm" else (shepherd, shepherd_reference)
    asked = judge(model, tmp_path, convention=convention, workers=2, threshold=0.5, wrong_below=0.45)
    verdicts = list(asked.judge(SOLUTIONS))
    expected = reference(model, SOLUTIONS)
    flat = [p for row in expected for p in row]
    assert max(flat) - min(flat) > 0.1  # or this shows little
    for given, scores in zip(verdicts, expected, strict=True):
        assert not isinstance(given, UserError)
        assert [v.score for v in given] == pytest.approx(scores, abs=1e-5)
        assert [v.label for v in given] == [1 if p >= 0.5 else 0 if p < 0.45 else None for p in scores]
    # finished chunks are read, not made again
    chunks = sorted((tmp_path / "cache").glob("prm-*/scores-*.json"))
    times = [chunk.stat().st_mtime_ns for chunk in chunks]
    chunks[1].unlink()
    again = list(judge(model, tmp_path, convention=convention, threshold=0.9).judge(SOLUTIONS))
    assert [[v.score for v in row] for row in again] == [[v.score for v in row] for row in verdicts]  # type: ignore[union-attr]
    assert len(chunks) == 2 and chunks[0].stat().st_mtime_ns == times[0] and chunks[1].stat().st_mtime_ns > times[1]


@pytest.mark.parametrize(
    ("visible", "workers", "expected"),
    [(None, 8, ["0", "1"]), ("4,6", 8, ["4", "6"]), (None, 1, ["0"]), ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"])],
)
def test_workers_are_placed_one_per_gpu(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    visible: str | None, workers: int, expected: list[str],
) -> None:  # fmt: skip
    """Two GPUs, 70 solutions in two chunks: what each worker is told, and that together they have all chunks."""
    told: list[Child] = []

    def run_children(children: list[Child], **_: Any) -> None:
        told.extend(children)
        raise InterruptedError  # nothing was scored

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(prm, "gpu_count", lambda: 2)
    monkeypatch.setattr(prm, "run_children", run_children)
    with pytest.raises(InterruptedError):
        list(judge(qwen, tmp_path, convention="qwen_math_prm", workers=workers).judge(SOLUTIONS))
    assert [child.env["CUDA_VISIBLE_DEVICES"] for child in told] == expected
    assert [child.command[-2:] for child in told] == [["--worker", str(n)] for n in range(len(expected))]
    job = PRMJob.model_validate_json(Path(told[0].command[-3]).read_text())
    assert sorted(start for worker in range(len(told)) for start in job.chunks(worker)) == [0, 64]


def test_a_cpu_worker_is_told_no_gpu(qwen: Path, tmp_path: Path) -> None:
    job = PRMJob.of([], "h", tmp_path, model=qwen, candidates=None, dtype="float32", batch_tokens=9, workers=3)
    assert "CUDA_VISIBLE_DEVICES" not in prm._child(job, 2, tmp_path, on_gpu=False).env


def test_what_is_refused_before_anything_is_sampled(
    qwen: Path, shepherd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not whole, a model of another kind, weights that no GPU here holds."""
    judge(qwen, tmp_path, convention="qwen_math_prm").check()
    judge(shepherd, tmp_path, convention="math_shepherd").check()
    with pytest.raises(UserError, match=r"Qwen2ForProcessRewardModel, its safetensors lack score\.0\.weight"):
        judge(shepherd, tmp_path, convention="qwen_math_prm").check()
    size = sum(weight.nbytes for weight in load_file(qwen / "model.safetensors").values())
    monkeypatch.setattr(prm, "gpu_bytes", lambda: int(size / 0.9) + 1)
    judge(qwen, tmp_path, convention="qwen_math_prm").check()
    monkeypatch.setattr(prm, "gpu_bytes", lambda: int(size / 0.9) - 9)
    with pytest.raises(
        UserError, match=r"0\.0 GB of weights, and a GPU here has 0\.0 GB: a local reward model must fit"
    ):
        judge(qwen, tmp_path, convention="qwen_math_prm").check()
    part = tmp_path / "part"
    shutil.copytree(qwen, part)
    (part / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"part: expected model\.safetensors or .*, found neither"):
        judge(part, tmp_path, convention="qwen_math_prm").check()


def test_a_solution_longer_than_the_models_positions_is_not_judged(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = solution(9, ["So we add. " * 150, "So 7."])
    asked = judge(qwen, tmp_path, convention="qwen_math_prm")
    first, second = asked.judge([long, SOLUTIONS[1]])
    assert [v.label for v in first] == [None, None] and [v.score for v in first] == [None, None]  # type: ignore[union-attr]
    assert [second] == list(judge(qwen, tmp_path / "alone", convention="qwen_math_prm").judge([SOLUTIONS[1]]))
    assert asked.counts()["judge"]["too_long"] == 1
    assert "1 of 2 solutions are too long to judge; the last: " in capsys.readouterr().err


def test_new_weights_under_the_same_path_give_new_scores(qwen: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(qwen, model)
    old = qwen_reference(model, SOLUTIONS[:3])
    list(judge(model, tmp_path, convention="qwen_math_prm").judge(SOLUTIONS[:3]))
    weights = load_file(model / "model.safetensors")
    weights["score.2.weight"] = weights["score.2.weight"].flip(0)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    new = qwen_reference(model, SOLUTIONS[:3])
    given = list(judge(model, tmp_path, convention="qwen_math_prm").judge(SOLUTIONS[:3]))
    assert [[v.score for v in row] for row in given] == [pytest.approx(row, abs=1e-5) for row in new]  # type: ignore[union-attr]
    assert abs(old[0][0] - new[0][0]) > 0.01
    assert len(list((tmp_path / "cache").glob("prm-*"))) == 2


def test_auto_is_float32_where_the_processor_lacks_bfloat16(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(qwen, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (tmp_path / "cpuinfo").write_text("flags\t: avx2\n")
    monkeypatch.setattr(dtypes, "CPUINFO", tmp_path / "cpuinfo")
    jobs: list[PRMJob] = []

    def score_job(job: PRMJob, logs: Path, title: str) -> Iterator[list[float]]:
        jobs.append(job)
        return ([0.5] * len(row.positions) for _, rows in job.rows_of(job.starts()) for row in rows)

    monkeypatch.setattr(prm, "score_job", score_job)
    asked = judge(model, tmp_path, convention="qwen_math_prm", dtype="auto")
    list(asked.judge(SOLUTIONS[:2]))
    assert jobs[0].dtype == "float32" and asked.counts() == {"judge": {"dtype": "float32"}}
    assert "judging steps: dtype auto is float32: this processor has no units for bfloat16" in capsys.readouterr().err
    (tmp_path / "cpuinfo").write_text("flags\t: avx2 avx512_bf16\n")
    list(judge(model, tmp_path, convention="qwen_math_prm", dtype="auto").judge(SOLUTIONS[:2]))
    assert jobs[1].dtype == "bfloat16"
    assert jobs[1].directory != jobs[0].directory  # scores of two dtypes never mix


def test_conventions_as_the_model_cards_have_them(qwen: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen)
    row = qwen_math_prm_row(SOLUTIONS[2], tokenizer)
    assert tokenizer.decode(row.token_ids).endswith(
        "assistant\nWe add 2.<extra_0>Then we double it.<extra_0>So 7.<extra_0><|im_end|>\n"
    )
    row = math_shepherd_row(SOLUTIONS[2], tokenizer)
    assert tokenizer.decode(row.token_ids) == "What is 2? We add 2. ки\nThen we double it. ки\nSo 7. ки"


def test_a_solution_that_holds_the_mark_is_refused_alone(qwen: Path, tmp_path: Path) -> None:
    hostile = solution(1, ["I write <extra_0> myself.\n", "Ha."])
    first, second = list(judge(qwen, tmp_path, convention="qwen_math_prm").judge([hostile, SOLUTIONS[1]]))
    assert isinstance(first, UserError) and "got 3 for 2 steps" in str(first)
    assert not isinstance(second, UserError) and len(second) == 2


def test_a_model_of_another_kind(shepherd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Qwen2ForProcessRewardModel, its safetensors lack score\.0\.weight"):
        list(judge(shepherd, tmp_path, convention="qwen_math_prm").judge(SOLUTIONS[:1]))


def test_batches_hold_no_more_than_they_may() -> None:
    from megatron_stepkto.judging.process.prm import PRMRow

    rows = [PRMRow(token_ids=[1] * length, positions=[0]) for length in (5, 50, 7, 100, 6)]
    assert list(batches(rows, 21)) == [[0, 4, 2], [1], [3]]


@pytest.mark.parametrize(
    "answer", [{}, {"data": []}, {"data": [{"data": [[0.1, 0.9]]}]}, {"data": [{"data": [[0.1, 7.0]] * 2}]}, None]
)
def test_answers_of_a_server_that_are_none(answer: Any) -> None:
    from megatron_stepkto.judging.process.client import BadAnswer

    with pytest.raises(BadAnswer):
        read_scores(answer, 2)


def test_a_pooling_server_gets_token_ids(qwen: Path, tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        steps = body["input"].count(PreTrainedTokenizerFast.from_pretrained(qwen).convert_tokens_to_ids("<extra_0>"))
        return Reply({"data": [{"data": [[0.75, 0.25]] * steps}]})

    with ScriptedServer(script) as server:
        changes = {"convention": "qwen_math_prm", "base_url": server.url, "served_name": "judge"}
        verdicts = list(judge(qwen, tmp_path, **changes).judge(SOLUTIONS[:3]))
        assert [[(v.label, v.score) for v in row] for row in verdicts] == [[(0, 0.25)] * n for n in (1, 2, 3)]  # type: ignore[union-attr]
        assert set(server.paths) == {"/pooling"} and len(server.requests) == 3
        list(judge(qwen, tmp_path, **changes).judge(SOLUTIONS[:3]))
        assert len(server.requests) == 3
        # the folder beside the server holds other weights: the server's may be others, too
        model = tmp_path / "model"
        shutil.copytree(qwen, model)
        (model / "more.safetensors").write_bytes(b"1")
        list(judge(model, tmp_path, **changes).judge(SOLUTIONS[:3]))
        assert len(server.requests) == 6


def test_a_pooling_server_is_waited_for_and_a_solution_too_long_for_it_is_not_judged(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "FIRST_PAUSE_S", 0.01)
    tag = PreTrainedTokenizerFast.from_pretrained(qwen).convert_tokens_to_ids("<extra_0>")

    def script(body: dict[str, Any], number: int) -> Reply:
        if number < 5:
            return Reply("loading", 503)
        steps = body["input"].count(tag)
        if steps == 3:
            return Reply("This model's maximum context length is 90 tokens", 400)
        return Reply({"model": "judge", "data": [{"data": [[0.25, 0.75]] * steps}]})

    with ScriptedServer(script) as server:
        changes = {"convention": "qwen_math_prm", "base_url": server.url, "served_name": "judge", "retries": 0}
        asked = judge(qwen, tmp_path, **changes)
        verdicts = list(asked.judge(SOLUTIONS[:4]))
        assert [[(v.label, v.score) for v in row] for row in verdicts] == [  # type: ignore[union-attr]
            [(1, 0.75)], [(1, 0.75)] * 2, [(None, None)] * 3, [(1, 0.75)],
        ]  # fmt: skip
    assert asked.counts() == {"judge": {"cached": 0, "status_503": 5, "too_long": 1}}
    assert len((tmp_path / "cache" / "scores.jsonl").read_text().splitlines()) == 3
