"""What the dataset stage writes and counts, and what it refuses; counts by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import EXAMPLES, SAMPLES, Examples
from megatron_stepkto.base.records import JudgedSample, TrainExample, write_records
from megatron_stepkto.methods.dataset import build_dataset
from megatron_stepkto.methods.registry import METHODS
from megatron_stepkto.recipe.keys import Dataset
from tests.unit.methods.test_select import ids, many, sample


def build(
    folder: Path, rows: list[JudgedSample], method: Any = "step_kto", share: float = 0.0,
    excluded: Path | None = None, **keys: Any,
) -> dict[str, Any]:  # fmt: skip
    judged = folder / "judged.jsonl"
    write_records(judged, rows)
    out = folder / method
    settings = Dataset(**keys)
    return build_dataset(judged, out / "train", out / "held_out", settings, method, share, seed=0, excluded=excluded)


def read(path: Path) -> list[TrainExample]:
    return list(Examples.open(path))


def test_counts_by_hand(tmp_path: Path) -> None:
    rows = [
        sample("p", 0, 1, [1, 1, None], [5] * 4),
        sample("p", 1, 0, [1, 0, 0]),
        sample("p", 2, None, [None]),
        sample("q", 0, None, [1, None], [5] * 6),
        sample("q", 1, 1, [1], [5] * 8),
    ]
    assert build(tmp_path, rows, max_tokens=9) == {
        "samples": 5,
        "too_long": 1,
        "problems": 2,
        "examples": 3,
        "right": 1,
        "wrong": 1,
        "steps_right": 4,
        "steps_wrong": 2,
        "kl_pairs": 3,
        "tokens": (3 + 4) + (3 + 3) + (3 + 6),
    }
    assert ids(read(tmp_path / "step_kto" / "train")) == ["p/0", "p/1", "q/0"]
    assert not (tmp_path / "step_kto" / "held_out").exists()


EXCLUDED = ["p/M0/samples/1", "q/M0/samples/0", "r/M0/samples/0"]


def four_each() -> list[JudgedSample]:
    """Four solutions of each of eight problems, every second one right."""
    return [
        sample(p, n, n % 2, [n % 2, 1], [5 + n] * 3).model_copy(update={"sample_id": f"{p}/M0/samples/{n}"})
        for p in "pqrstuvw"
        for n in range(4)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_excluded_samples_take_no_part(tmp_path: Path, method: str) -> None:
    """Neither as an example nor as a side of a pair, a KL partner or a held-out example."""
    file = tmp_path / "bad.txt"
    file.write_text("\n".join(EXCLUDED[:2]) + f"\n\n  {EXCLUDED[2]}\r\n", encoding="utf-8")
    before = build(tmp_path, four_each(), method, share=0.3)
    counts = build(tmp_path, four_each(), method, share=0.3, excluded=file)
    assert "excluded" not in before
    assert counts["excluded"] == 3
    for name in ("train", "held_out"):
        examples = Examples.open(tmp_path / method / name)
        rows = {*examples.sample.tolist(), *(row for row in examples.partner.tolist() if row >= 0)}
        assert len(rows) > 3
        assert not {examples.solution(row).sample_id for row in rows} & set(EXCLUDED)


def test_an_excluded_sample_must_be_there(tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_text(f"{EXCLUDED[0]}\np/M0/samples/9\n")
    with pytest.raises(UserError) as caught:
        build(tmp_path, four_each(), excluded=file)
    assert str(caught.value) == (
        f"{file}: expected sample ids of {tmp_path / 'judged.jsonl'}, one per line, got 1 that it does not have: "
        "p/M0/samples/9; remove these lines"
    )
    assert not (tmp_path / "step_kto" / "train").exists()


def test_max_tokens_counts_prompt_and_response(tmp_path: Path) -> None:
    rows = [sample("p", 0, 1, [1], [5] * 4), sample("q", 0, 0, [1], [5] * 5), sample("r", 0, 1, [1], [5] * 6)]
    counts = build(tmp_path, rows, max_tokens=8)
    assert (counts["samples"], counts["too_long"], counts["examples"]) == (3, 1, 2)


def test_held_out_by_problem_and_the_same_for_every_method(tmp_path: Path) -> None:
    rows = many(200, 3)
    splits = {}
    for method in METHODS:
        counts = build(tmp_path, rows, method, share=0.2)
        train = {e.problem_id for e in read(tmp_path / method / "train")}
        held = read(tmp_path / method / "held_out")
        assert not train & {e.problem_id for e in held}
        assert counts["held_out_problems"] == len({e.problem_id for e in held}) == 200 - counts["problems"]
        assert counts["held_out_examples"] == len(held) == 3 * counts["held_out_problems"]
        assert all(e.kl_partner is None for e in held)
        splits[method] = (frozenset(train), frozenset(e.problem_id for e in held))
    assert len(set(splits.values())) == 1
    train_problems, held_problems = splits["step_kto"]
    assert len(train_problems | held_problems) == 200
    # 200 draws at 0.2: 40 +- 4 standard deviations of 5.7
    assert 17 < len(held_problems) < 63


def test_the_split_does_not_change_when_problems_are_added(tmp_path: Path) -> None:
    build(tmp_path, many(50), share=0.3)
    before = {e.problem_id for e in read(tmp_path / "step_kto" / "held_out")}
    build(tmp_path, [*many(60)[::-1]], share=0.3)
    after = {e.problem_id for e in read(tmp_path / "step_kto" / "held_out")}
    assert before == after & {f"p{n}" for n in range(50)}


def test_held_out_problems_without_a_label_leave_no_empty_file(tmp_path: Path) -> None:
    """An empty file is an error to whoever reads it: the trainer would refuse a good dataset."""
    build(tmp_path, many(50), share=0.3)
    held = {e.problem_id for e in read(tmp_path / "step_kto" / "held_out")}
    rows = [sample(r.problem_id, int(r.sample_id[-1]), None, [None]) if r.problem_id in held else r for r in many(50)]
    shutil.rmtree(tmp_path / "step_kto" / "held_out")
    build(tmp_path, rows, share=0.3)
    assert not (tmp_path / "step_kto" / "held_out").exists()


def test_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build(tmp_path / name, many(20), share=0.2, kl_pair_share=0.5)
    for name in (f"{folder}/{file}" for folder in ("train", "held_out") for file in (SAMPLES, EXAMPLES)):
        assert (tmp_path / "one/step_kto" / name).read_bytes() == (tmp_path / "two/step_kto" / name).read_bytes()


def test_a_duplicated_sample(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judged\.jsonl: sample_id p0/1 is duplicated"):
        build(tmp_path, [*many(2), many(1)[1]])
    assert not list((tmp_path / "step_kto").iterdir())


@pytest.mark.parametrize(
    ("method", "needs", "rows", "had"),
    [
        (
            "rft",
            "a right sample",
            [sample("p", 0, 0), sample("q", 0, None)],
            "2 problems with 0 right, 1 wrong and 1 undecided",
        ),
        (
            "dpo",
            "a right and a wrong sample of one problem",
            [sample("p", 0, 1), sample("q", 0, 0)],
            "2 problems with 1 right, 1 wrong and 0 undecided",
        ),
        (
            "irpo",
            "a right and a wrong sample of one problem",
            [sample("p", 0, 1)],
            "1 problems with 1 right, 0 wrong and 0 undecided",
        ),
        (
            "step_kto",
            "a sample with a judged outcome or step",
            [sample("p", 0, None, [None])],
            "1 problems with 0 right, 0 wrong and 1 undecided",
        ),
    ],
)
def test_nothing_to_train_on_says_what_was_there(
    tmp_path: Path, method: Any, needs: str, rows: list[JudgedSample], had: str
) -> None:
    with pytest.raises(UserError) as caught:
        build(tmp_path, rows, method)
    assert str(caught.value) == (
        f"{tmp_path / 'judged.jsonl'}: no example that {method} can train on: it needs {needs}; got {had} samples; "
        "sample more solutions of each problem (sample.num_samples), or problems nearer to what the model can do"
    )
    assert not list((tmp_path / method).iterdir())


# --- one class -----------------------------------------------------------------------------------------------

WRONG_EQUATION = [sample(f"p{n}", 0, 0, [0, None]) for n in range(6)]


@pytest.mark.parametrize(
    ("method", "rows", "lacks", "had"),
    [
        ("step_kto", WRONG_EQUATION, "right", "0 right and 6 wrong answers, 0 right and 6 wrong steps"),
        # as solutions without judged steps are imported
        (
            "step_kto",
            [sample(f"p{n}", 0, 0, [None]) for n in range(6)],
            "right",
            "0 right and 6 wrong answers, 0 right and 0 wrong steps",
        ),
        (
            "step_kto",
            [sample("p", 0, None, [1, 1]), sample("q", 0, 1, [None])],
            "wrong",
            "1 right and 0 wrong answers, 2 right and 0 wrong steps",
        ),
        # kto reads no step: a right one does not help
        (
            "kto",
            [sample("p", 0, 0, [1, 0]), sample("q", 0, 0, [1]), sample("r", 0, None, [1])],
            "right",
            "0 right and 2 wrong answers, 2 right and 1 wrong steps",
        ),
        ("kto", [sample("p", 0, 1), sample("q", 0, 1)], "wrong", "2 right and 0 wrong answers, 2 right and 0 wrong"),
        # the only right solution is too long to train
        (
            "kto",
            [*WRONG_EQUATION, sample("r", 0, 1, [1], [5] * 30)],
            "right",
            "0 right and 6 wrong answers, 0 right and 6 wrong steps",
        ),
    ],
)
def test_one_class_alone_is_refused(
    tmp_path: Path, method: Any, rows: list[JudgedSample], lacks: str, had: str
) -> None:
    with pytest.raises(UserError) as caught:
        build(tmp_path, rows, method, max_tokens=30)
    assert str(caught.value).startswith(
        f"{tmp_path / 'judged.jsonl'}: {method} learns from right against wrong, and nothing is {lacks}: {had}"
    )
    assert not list((tmp_path / method).iterdir())


@pytest.mark.parametrize(
    ("method", "rows", "warnings"),
    [
        ("step_kto", [sample("p", 0, 1, [1, 0]), sample("q", 0, 0)], []),
        # 1 of 100 is a share of 0.01: enough; 1 of 101 is not
        ("kto", [sample(f"p{n}", 0, int(n > 0)) for n in range(100)], []),
        ("kto", [sample(f"p{n}", 0, int(n > 0)) for n in range(101)], ["only 1 of 101 judged answers are wrong"]),
        (
            "step_kto",
            [sample("p", 0, 0, [1, 0]), sample("q", 0, 0, [1])],
            ["all 2 judged answers are wrong"],
        ),
        (
            "step_kto",
            [sample("p", 0, 1, [1, 1]), sample("q", 0, 0, [1])],
            ["all 3 judged steps are right"],
        ),
        (
            "step_kto",
            [sample("p", 0, 1, [None]), sample("q", 0, 0, [None])],
            ["no step is judged: step_kto trains on answers alone"],
        ),
        (
            "step_kto",
            [sample("p", 0, None, [1]), sample("q", 0, None, [0])],
            ["no answer is judged"],
        ),
        (
            "dpo",
            [sample("p", 0, 1), sample("p", 1, 0), *(sample(f"q{n}", 0, 1) for n in range(100))],
            ["only 1 of 101 problems have a right and a wrong sample of one problem"],
        ),
        (
            "rft",
            [sample("p", 0, 1), *(sample(f"q{n}", 0, 0) for n in range(100))],
            ["only 1 of 101 problems have a right sample"],
        ),
        ("rft", [sample("p", 0, 1), sample("q", 0, 1)], []),
    ],
)
def test_data_that_teach_little_bring_a_warning(
    tmp_path: Path, method: Any, rows: list[JudgedSample], warnings: list[str]
) -> None:
    assert build(tmp_path, rows, method).get("warnings", []) == warnings


def test_flipped_labels(tmp_path: Path) -> None:
    """Judged labels of training samples alone, a share of them that grows with the key; held-out ones stay true."""
    rows = [sample(f"p{n}", 0, n % 2, [1, 0, None, 1]) for n in range(500)]
    found = {}
    for share in (0.0, 0.1, 0.3, 1.0):
        folder = tmp_path / str(share)
        folder.mkdir()
        build(folder, rows, share=0.2, flip_step_labels=share)
        train, held = (read(folder / "step_kto" / name) for name in ("train", "held_out"))
        found[share] = [[step.label for step in e.steps] for e in train]
        assert {tuple(step.label for step in e.steps) for e in held} == {(1, 0, None, 1)}
        assert {(e.outcome, int(e.example_id[1:].split("/")[0]) % 2) for e in train} == {(0, 0), (1, 1)}
    assert found[0.0] == [[1, 0, None, 1]] * len(found[0.0]) and found[1.0] == [[0, 1, None, 0]] * len(found[0.0])
    turned = {
        share: {
            (i, j)
            for i, labels in enumerate(rows)
            for j, label in enumerate(labels)
            if label not in (None, (1, 0, None, 1)[j])
        }
        for share, rows in found.items()
    }
    judged = 3 * len(found[0.0])
    assert turned[0.1] < turned[0.3]
    # within 4 standard errors
    assert all(abs(len(turned[s]) / judged - s) < 4 * (s * (1 - s) / judged) ** 0.5 for s in (0.1, 0.3))


def test_flipped_labels_reach_only_methods_that_read_them(tmp_path: Path) -> None:
    rows = [sample(f"p{n}", 0, n % 2, [1]) for n in range(4)]
    for method, label in (("kto", 1), ("step_kto", 0)):
        build(tmp_path, rows, method, flip_step_labels=1.0)
        assert [[s.label for s in e.steps] for e in read(tmp_path / method / "train")] == [[label]] * 4
