"""The judge stage on files: order, labels, counts, bad rows."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import JudgedSample, Problem, Sample, read_records, write_records
from megatron_stepkto.judging import row_tasks, stage
from megatron_stepkto.judging.section import judging_key
from megatron_stepkto.judging.stage import judge_file, load_tokenizer
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Judging
from tests.scripted_server import Reply, ScriptedServer, chat

PROBLEM = Problem(
    problem_id="p1",
    problem="Max has 27 pens. Tom has 5 more than Max. Ann has twice as many as Tom. How many does Ann have?",
    answer="64",
)
SETTINGS = Judging.model_validate({"split": "line", "process": "chained_arithmetic"})
RIGHT = "Tom has 27 + 5 = 32.\nAnn has 32 * 2 = 64.\nAnswer: \\boxed{64}"
LUCKY = "Tom has 27 + 5 = 22.\nAnn has 32 * 2 = 64.\nAnswer: \\boxed{64}"
WRONG = "Tom has 27 + 5 = 22.\nAnn has 22 * 2 = 44.\nAnswer: \\boxed{44}"
CUT = "Tom has 27 + 5 = 32.\nAnn has 32"


class Folder:
    """Problems, a tokenizer, and samples of the given texts on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems, self.samples, self.output = path / "p.jsonl", path / "s.jsonl", path / "judged.jsonl"
        write_records(self.problems, [PROBLEM])
        build_tokenizer(path / "model")
        self.tokenizer = load_tokenizer(path / "model")

    def sample(self, number: int, written: str, finish: str = "stop", **changes: Any) -> Sample:
        ids = self.tokenizer.encode(written, add_special_tokens=False)
        return Sample(
            **{
                "problem_id": "p1",
                "sample_id": f"p1/{number}",
                "prompt_token_ids": self.tokenizer.encode(PROBLEM.problem + "\n"),
                "token_ids": [*ids, self.tokenizer.eos_token_id] if finish == "stop" else ids,
                "text": written,
                "finish_reason": finish,
                **changes,
            }
        )

    def judge(self, samples: list[Sample], **options: Any) -> dict[str, Any]:
        write_records(self.samples, samples)
        return judge_file(self.problems, self.samples, self.output, self.path / "model", SETTINGS, **options)

    def judged(self) -> list[JudgedSample]:
        return list(read_records(self.output, JudgedSample))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_labels_outcomes_and_counts(folder: Folder) -> None:
    counts = folder.judge(
        [folder.sample(i, text) for i, text in enumerate((RIGHT, LUCKY, WRONG))] + [folder.sample(3, CUT, "length")]
    )
    judged = folder.judged()
    assert [row.sample_id for row in judged] == ["p1/0", "p1/1", "p1/2", "p1/3"]
    assert [[step.label for step in row.steps] for row in judged] == [
        [1, 1, None],
        [0, 1, None],
        [0, 0, None],
        [1, 0],
    ]
    assert [row.outcome for row in judged] == [1, 1, 0, 0]
    assert [row.extracted_answer for row in judged] == ["64", "64", "44", None]
    # Tom| has |2|7| + |5| = |3|2|.|\n makes 11 tokens; the answer line: Answer: |\boxed{|6|4|}|</s>
    assert [(s.token_start, s.token_end) for s in judged[0].steps] == [(0, 11), (11, 22), (22, 28)]
    assert judged[0].judge.model_dump(exclude_none=True) == {"outcome": "answer", "process": "chained_arithmetic"}
    assert counts == {
        "samples": 4, "right": 2, "wrong": 2, "undecided": 0, "unparsed": 1, "truncated": 1,
        "steps_right": 4, "steps_wrong": 4, "steps_unjudged": 3, "right_share": 0.5,
    }  # fmt: skip


def test_opinions_of_a_combined_judge_are_kept(folder: Folder) -> None:
    process = {"kind": "combine", "judges": ["chained_arithmetic", "none"], "rule": "all"}
    settings = Judging.model_validate({"split": "line", "process": process})
    write_records(folder.samples, [folder.sample(0, LUCKY)])
    judge_file(folder.problems, folder.samples, folder.output, folder.path / "model", settings)
    (row,) = folder.judged()
    assert row.judge.process == "all(chained_arithmetic, none)"
    assert [step.label for step in row.steps] == [None, None, None]
    assert [step.members and {name: each.label for name, each in step.members.items()} for step in row.steps] == [
        {"chained_arithmetic": 0, "none": None}, {"chained_arithmetic": 1, "none": None},
        {"chained_arithmetic": None, "none": None},
    ]  # fmt: skip


def test_what_the_sampler_wrote_is_kept(folder: Folder) -> None:
    sample = folder.sample(0, RIGHT)
    sample = sample.model_copy(update={"token_log_probs": [-0.5] * len(sample.token_ids)})
    folder.judge([sample])
    (row,) = folder.judged()
    assert {name: getattr(row, name) for name in Sample.model_fields} == dict(sample)


def test_one_sided_labels_are_named(folder: Folder) -> None:
    assert folder.judge([folder.sample(0, WRONG), folder.sample(1, WRONG)])["warnings"] == [
        "all 2 judged answers are wrong",
        "all 4 judged steps are wrong",
    ]
    assert "warnings" not in folder.judge([folder.sample(0, RIGHT), folder.sample(1, WRONG)])


def test_an_answer_that_cannot_be_compared_is_null(folder: Folder) -> None:
    write_records(folder.problems, [PROBLEM.model_copy(update={"answer": r"\frac{"})])
    counts = folder.judge([folder.sample(0, RIGHT)])
    assert counts["undecided"] == 1 and counts["right"] == counts["wrong"] == 0
    assert folder.judged()[0].outcome is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"problem_id": "p9"}, "problem_id p9 is not in"),
        ({"text": RIGHT.replace("64", "65")}, "the tokens decode to a different text"),
    ],
)
def test_a_bad_sample_is_named_or_set_aside(folder: Folder, changes: dict[str, Any], reason: str) -> None:
    samples = [folder.sample(0, RIGHT), folder.sample(1, RIGHT, **changes), folder.sample(2, WRONG)]
    with pytest.raises(UserError, match=f"sample_id p1/1: .*{reason}"):
        folder.judge(samples)
    assert not folder.output.exists()
    quarantine = folder.path / "bad.jsonl"
    counts = folder.judge(samples, quarantine=quarantine)
    assert (counts["samples"], counts["quarantined"]) == (2, 1)
    assert [row.sample_id for row in folder.judged()] == ["p1/0", "p1/2"]
    (bad,) = [json.loads(line) for line in quarantine.open()]
    assert bad["sample_id"] == "p1/1" and reason in bad["error"]
    assert Sample.model_validate_json(bad["row"]) == samples[1]


def test_only_bad_samples_is_an_error(folder: Folder) -> None:
    with pytest.raises(UserError, match="all 1 were bad"):
        folder.judge([folder.sample(0, RIGHT, problem_id="p9")], quarantine=folder.path / "bad.jsonl")


def test_problems_that_the_rule_cannot_judge(folder: Folder) -> None:
    write_records(folder.problems, [PROBLEM.model_copy(update={"problem": "What is 2 + 2?"})])
    with pytest.raises(UserError, match="sample_id p1/0: not a chained-arithmetic problem"):
        folder.judge([folder.sample(0, RIGHT)])


def test_a_problem_id_is_unique(folder: Folder) -> None:
    write_records(folder.problems, [PROBLEM, PROBLEM])
    with pytest.raises(UserError, match="problem_id p1 is duplicated"):
        folder.judge([folder.sample(0, RIGHT)])


def test_a_folder_without_a_tokenizer(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    (folder.path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="does not load"):
        load_tokenizer(folder.path / "model")


def test_an_llm_judge_in_the_stage(folder: Folder) -> None:
    """Votes and scores reach the records; dropped labels keep them; the answers stand in the stage's cache."""

    def script(body: dict[str, Any], number: int) -> Reply:
        prompt = body["messages"][0]["content"]
        words = ["wrong" if "= 22" in step else "right" for step in re.findall(r"\[step \d\]\n(.*)", prompt)]
        return chat({f"step_{n}": {"verdict": word} for n, word in enumerate(words, 1)})

    with ScriptedServer(script) as server:
        process = {"kind": "llm", "base_url": server.url, "model": "judge", "votes": 3}
        settings = Judging.model_validate({"split": "line", "process": process, "after_first_error": "drop"})
        write_records(folder.samples, [folder.sample(0, RIGHT), folder.sample(1, LUCKY)])
        files = (folder.problems, folder.samples, folder.output, folder.path / "model", settings)
        counts = judge_file(*files)
        assert judge_file(*files)["judge"] == {"cached": 6}  # a second run asks nothing
    right, lucky = folder.judged()
    assert [s.label for s in right.steps] == [1, 1, 1] and [s.label for s in lucky.steps] == [0, None, None]
    assert lucky.steps[0].votes == [0, 0, 0] and lucky.steps[0].score == 0.0 and lucky.steps[1].votes == [1, 1, 1]
    assert right.judge.process == "llm:judge" and (right.outcome, lucky.outcome) == (1, 1)
    assert len(server.requests) == 6 and counts["judge"]["answered"] == 6
    assert (counts["steps_right"], counts["steps_wrong"], counts["steps_unjudged"]) == (3, 1, 2)


def test_the_key_names_what_decides_the_labels(tmp_path: Path) -> None:
    """Another server or more patience leaves finished labels valid; another prompt or threshold does not."""

    def key(**changes: Any) -> dict[str, Any]:
        process = {"kind": "llm", "base_url": "http://a/v1", "model": "judge", **changes}
        return judging_key(Judging.model_validate({"split": "line", "process": process}))

    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{{ problem }}")
    assert key() == key(base_url="http://b/v1", concurrency=1, retries=0, timeout_s=1.0, api_key_env="K")
    assert key() != key(threshold=0.7) and key() != key(votes=3) and key() != key(prompt=str(prompt))
    before = key(prompt=str(prompt))
    prompt.write_text("{{ problem }}!")
    assert key(prompt=str(prompt)) != before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_changes_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Windows and chunks of a few rows, in this process or by two workers: the same rows, counts and quarantine."""
    texts = (RIGHT, LUCKY, WRONG) * 7
    samples = [folder.sample(i, text) for i, text in enumerate(texts)]
    samples[3] = folder.sample(3, RIGHT, problem_id="absent")
    samples[-1] = folder.sample(20, RIGHT, problem_id="absent")
    samples[5] = folder.sample(5, RIGHT, text="another text")
    bad = folder.path / "bad.jsonl"
    whole = folder.judge(samples, quarantine=bad)
    expected = folder.output.read_bytes(), bad.read_bytes()
    assert whole["samples"] == 18 and whole["quarantined"] == 3
    for module, name, value in ((row_tasks, "FEW", 4), (row_tasks, "CHUNK", 2), (stage, "OUTCOME_CHUNK", 5)):
        monkeypatch.setattr(module, name, value)
    settings = SETTINGS.model_copy(update={"workers": workers})
    for kept in (False, True):  # the second time everything is in the cache
        if not kept:
            shutil.rmtree(folder.path / "cache")
        folder.output.unlink()
        counts = judge_file(
            folder.problems, folder.samples, folder.output, folder.path / "model", settings, quarantine=bad
        )
        assert counts == whole
        assert (folder.output.read_bytes(), bad.read_bytes()) == expected


def test_samples_in_memory_do_not_grow_with_the_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 and of 400 samples the same number is held at once: a window of the splitter's and of the rule's rows for
    each pass that is under way, and one chunk of answers."""
    for module, name, value in ((row_tasks, "FEW", 8), (row_tasks, "CHUNK", 2), (stage, "OUTCOME_CHUNK", 8)):
        monkeypatch.setattr(module, name, value)
    settings = SETTINGS.model_copy(update={"workers": 1})
    live = most = 0

    def ended() -> None:
        nonlocal live
        live -= 1

    def counted(row: Any) -> Any:
        nonlocal live, most
        live += 1
        most = max(most, live)
        weakref.finalize(row, ended)
        return row

    solution_of = stage._solution
    monkeypatch.setattr(stage, "read_records", lambda *given, **named: map(counted, read_records(*given, **named)))
    monkeypatch.setattr(stage, "_solution", lambda *given: counted(solution_of(*given)))
    held = []
    for count in (100, 400):
        most = 0
        write_records(folder.samples, (folder.sample(i, WRONG) for i in range(count)))
        judge_file(folder.problems, folder.samples, folder.output, folder.path / "model", settings)
        assert live <= 1  # the last row of a loop
        held.append(most)
    assert held[0] == held[1] < 100, held


def test_a_task_reads_rows_as_it_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tasks, "FEW", 16)
    monkeypatch.setattr(row_tasks, "CHUNK", 4)
    read = 0

    def rows() -> Any:
        nonlocal read
        for number in range(200):
            read += 1
            yield [f"{PROBLEM.problem} {number}", RIGHT, [[0, len(RIGHT)]]]

    ahead = []
    for done, _ in enumerate(row_tasks.run_task("labels", {"rule": "equations"}, rows(), tmp_path, 1), 1):
        ahead.append(read - done)
    assert len(ahead) == 200 and max(ahead) <= row_tasks.rows_ahead(1) + 4 == 20
