"""Which judged samples train, in which role, with which KL partner; counts by hand."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples, ExampleWriter
from megatron_stepkto.base.records import JudgedSample, TrainExample, write_records
from megatron_stepkto.methods.dataset import add_chosen, build_dataset, candidate_of, store
from megatron_stepkto.methods.registry import METHODS
from megatron_stepkto.recipe.keys import Dataset


def sample(
    problem: str,
    number: int,
    outcome: int | None,
    labels: Sequence[int | None] = (1, None),
    tokens: list[int] | None = None,
) -> JudgedSample:
    """One token per step unless ``tokens`` says more for the last one."""
    ids = tokens or [100 + number] * len(labels)
    steps = [
        {"start": i, "end": i + 1, "token_start": i, "token_end": i + 1, "label": label}
        for i, label in enumerate(labels)
    ]
    steps[-1]["token_end"] = len(ids)
    return JudgedSample.model_validate(
        {
            "problem_id": problem,
            "sample_id": f"{problem}/{number}",
            "prompt_token_ids": [1, 2, 3],
            "token_ids": ids,
            "text": "x" * len(labels),
            "finish_reason": "stop",
            "steps": steps,
            "outcome": outcome,
            "judge": {"outcome": "answer", "process": "none"},
        }
    )


def group(*samples: JudgedSample) -> dict[str, list[JudgedSample]]:
    found: dict[str, list[JudgedSample]] = {}
    for one in samples:
        found.setdefault(one.problem_id, []).append(one)
    return found


def many(problems: int, samples: int = 3) -> list[JudgedSample]:
    """Right, wrong, right, ... of each problem."""
    return [sample(f"p{p}", n, (n + 1) % 2) for p in range(problems) for n in range(samples)]


def ids(examples: list[TrainExample]) -> list[str]:
    return [example.example_id for example in examples]


def select(rows: dict[str, list[JudgedSample]], settings: Dataset, method: str, seed: int) -> list[TrainExample]:
    """The examples as a rank reads them."""
    files = BytesIO(), BytesIO()
    writer = ExampleWriter(*files)
    candidates = {p: [candidate_of(one, store(writer, one)) for one in samples] for p, samples in rows.items()}
    add_chosen(writer, METHODS[method].select(candidates, settings, seed))
    writer.close()
    return list(Examples(*(pa.py_buffer(file.getvalue()) for file in files)))


# --- KL pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problems", [2, 3, 5, 8])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_kl_partner_is_a_solution_of_another_problem(problems: int, samples: int) -> None:
    rows = many(problems, samples)
    by_id = {row.sample_id: row for row in rows}
    examples = select(group(*rows), Dataset(), "step_kto", seed=0)
    assert len(examples) == problems * samples
    for example in examples:
        assert example.kl_partner is not None
        other = by_id[example.kl_partner.example_id]
        assert other.problem_id != example.problem_id
        assert example.kl_partner.token_ids == other.token_ids
        assert [(s.token_start, s.token_end, s.label) for s in example.kl_partner.steps] == [
            (s.token_start, s.token_end, s.label) for s in other.steps
        ]
    # rotated: with equal counts every solution is the partner of exactly one example
    assert sorted(e.kl_partner.example_id for e in examples if e.kl_partner) == sorted(by_id)


def test_partners_of_problems_with_unequal_numbers_of_samples() -> None:
    rows = [*many(1, 5), sample("q", 0, 1), sample("r", 0, 0), sample("r", 1, 1)]
    for example in select(group(*rows), Dataset(), "kto", seed=0):
        assert example.kl_partner is not None
        assert example.kl_partner.example_id.split("/")[0] != example.problem_id


def test_one_problem_alone_has_no_partner() -> None:
    rows = group(*many(1, 4))
    with pytest.raises(UserError, match="KL pairs need at least two problems; got one"):
        select(rows, Dataset(), "step_kto", seed=0)
    examples = select(rows, Dataset(kl_pair_share=0), "step_kto", seed=0)
    assert [example.kl_partner for example in examples] == [None] * 4


def test_problems_without_a_judged_sample_lend_no_partner() -> None:
    rows = [sample("p0", 0, 1), sample("p1", 0, None, [None, None]), sample("p2", 0, 0)]
    examples = select(group(*rows), Dataset(), "kto", 0)
    partners = {e.problem_id: e.kl_partner.example_id for e in examples if e.kl_partner}
    assert partners == {"p0": "p2/0", "p2": "p0/0"}


def test_share_of_examples_with_a_partner() -> None:
    rows = group(*many(1000, 1))

    def chosen(share: float, seed: int = 0) -> set[str]:
        return {e.example_id for e in select(rows, Dataset(kl_pair_share=share), "step_kto", seed) if e.kl_partner}

    # 1,000 draws at 0.25: 250 +- 4 standard deviations of 13.7
    assert 195 < len(chosen(0.25)) < 305
    assert chosen(0.25) < chosen(0.5)
    assert len(chosen(1.0)) == 1000
    assert chosen(0.25, seed=1) != chosen(0.25)


@pytest.mark.parametrize("method", ["rft", "dpo", "irpo", "bco", "apo_zero"])
def test_methods_without_a_kl_term_carry_no_partner(method: Any) -> None:
    assert all(e.kl_partner is None for e in select(group(*many(1, 3)), Dataset(), method, 0))


# --- what trains ---------------------------------------------------------------------------------------------


def test_samples_with_something_judged_train() -> None:
    rows = [
        sample("p", 0, 1, [1, None]),
        sample("p", 1, 0, [None, None]),
        sample("p", 2, None, [0, None]),
        sample("p", 3, None, [None, None]),
        sample("q", 0, None, [None]),
        sample("r", 0, 0, [0, 0]),
    ]
    examples = select(group(*rows), Dataset(kl_pair_share=0), "step_kto", 0)
    assert ids(examples) == ["p/0", "p/1", "p/2", "r/0"]
    assert [e.outcome for e in examples] == [1, 0, None, 0]
    assert [[s.label for s in e.steps] for e in examples] == [[1, None], [None, None], [0, None], [0, 0]]
    # KTO has no use for steps: a sample without an outcome would only dilute its mean
    assert ids(select(group(*rows), Dataset(kl_pair_share=0), "kto", 0)) == ["p/0", "p/1", "r/0"]
    assert ids(select(group(*rows), Dataset(), "bco", 0)) == ["p/0", "p/1", "r/0"]
    assert ids(select(group(*rows), Dataset(), "apo_zero", 0)) == ["p/0", "p/1", "r/0"]


def test_an_example_is_the_sample_as_it_was() -> None:
    row = sample("p", 0, 1, [1, 0], tokens=[7, 8, 9]).model_copy(update={"token_log_probs": [-1.0, -2.0, -3.0]})
    example = select(group(row), Dataset(kl_pair_share=0), "step_kto", 0)[0]
    assert example.model_dump() == {
        "example_id": "p/0",
        "problem_id": "p",
        "prompt_token_ids": [1, 2, 3],
        "token_ids": [7, 8, 9],
        "steps": [{"token_start": 0, "token_end": 1, "label": 1}, {"token_start": 1, "token_end": 3, "label": 0}],
        "outcome": 1,
        "kl_partner": None,
        "pair_id": None,
        "side": None,
        "token_log_probs": [-1.0, -2.0, -3.0],
    }


def test_rft_takes_each_right_solution_once() -> None:
    rows = [
        sample("p", 0, 1, tokens=[5, 6]),
        sample("p", 1, 0, tokens=[5, 7]),
        sample("p", 2, 1, tokens=[5, 6]),
        sample("p", 3, None, [1, 1], tokens=[5, 8]),
        sample("p", 4, 1, tokens=[5, 9]),
        sample("q", 0, 1, tokens=[5, 6]),
        sample("r", 0, 0),
    ]
    # the same tokens under another problem are another example
    assert ids(select(group(*rows), Dataset(), "rft", 0)) == ["p/0", "p/4", "q/0"]


@pytest.mark.parametrize(
    ("right", "wrong", "limit", "expected"),
    [
        (1, 1, 4, 1),
        (2, 3, 4, 3),
        (3, 1, 4, 3),
        (5, 2, 4, 4),
        (4, 4, 2, 2),
        (3, 0, 4, 0),
        (0, 3, 4, 0),
    ],
)
@pytest.mark.parametrize("method", ["dpo", "irpo"])
def test_pairs_by_hand(method: Any, right: int, wrong: int, limit: int, expected: int) -> None:
    """max(right, wrong) pairs, at most ``pairs_per_problem``; none when a side is empty."""
    rows = [sample("p", n, 1) for n in range(right)] + [sample("p", 10 + n, 0) for n in range(wrong)]
    rows += [sample("p", 90, None), sample("q", 0, 1), sample("q", 1, 0)]
    examples = select(group(*rows), Dataset(pairs_per_problem=limit), method, 0)
    of_p = [example for example in examples if example.problem_id == "p"]
    assert len(of_p) == 2 * expected
    assert len(examples) - len(of_p) == 2
    outcome_of = {row.token_ids[0]: row.outcome for row in rows if row.problem_id == "p"}
    pairs = []
    for chosen, rejected in zip(of_p[::2], of_p[1::2], strict=True):
        assert chosen.pair_id == rejected.pair_id
        assert (chosen.side, rejected.side) == ("chosen", "rejected")
        assert (outcome_of[chosen.token_ids[0]], outcome_of[rejected.token_ids[0]]) == (1, 0)
        assert (chosen.outcome, rejected.outcome) == (1, 0)
        pairs.append((chosen.token_ids[0], rejected.token_ids[0]))
    assert len(set(pairs)) == expected  # no pair twice
    assert len({example.example_id for example in examples}) == len(examples)
    assert len({example.pair_id for example in examples}) == len(examples) // 2


# p: right with clean steps, right with a wrong step, wrong.  q: right with a wrong step, wrong.  r: only right, one of
# them with a wrong step.  s: only wrong.  t: undecided.
STEP_LABELLED = [
    sample("p", 0, 1, [1, None]), sample("p", 1, 1, [1, 0]), sample("p", 2, 0, [0]),
    sample("q", 0, 1, [0, 1]), sample("q", 1, 0, [1, 0]),
    sample("r", 0, 1, [1]), sample("r", 1, 1, [0]),
    sample("s", 0, 0, [0]), sample("t", 0, None, [1]),
]  # fmt: skip


def test_right_solutions_without_a_wrong_step() -> None:
    """rft trains on them alone; pairs choose them alone, and what is left out is not rejected either."""
    rows, clean = group(*STEP_LABELLED), Dataset(right_solutions="no_wrong_step")
    assert ids(select(rows, Dataset(), "rft", 0)) == ["p/0", "p/1", "q/0", "r/0", "r/1"]
    assert ids(select(rows, clean, "rft", 0)) == ["p/0", "r/0"]
    pairs = select(rows, clean, "dpo", 0)
    assert [(e.problem_id, e.side, e.token_ids) for e in pairs] == [
        ("p", "chosen", [100, 100]),
        ("p", "rejected", [102]),
    ]
    assert {e.problem_id for e in select(rows, Dataset(), "irpo", 0)} == {"p", "q"}
    assert len(select(rows, clean, "kto", 0)) == 8, "the key is of the methods that read no step's label"


def test_problems_without_two_sides_are_counted(tmp_path: Path) -> None:
    write_records(tmp_path / "judged.jsonl", STEP_LABELLED)
    names = ("problems_with_both", "problems_right_only", "problems_wrong_only", "problems_neither",
             "right_with_wrong_step_left_out")  # fmt: skip

    def counts(**keys: Any) -> list[int]:
        found = build_dataset(tmp_path / "judged.jsonl", tmp_path / "train", None, Dataset(**keys), "dpo", 0.0, seed=0)
        return [found[name] for name in names]

    assert counts() == [2, 1, 1, 1, 0]
    assert counts(right_solutions="no_wrong_step") == [1, 1, 2, 1, 3]


def test_pairs_use_every_sample_of_the_larger_side() -> None:
    rows = [sample("p", n, 1) for n in range(2)] + [sample("p", 10 + n, 0) for n in range(4)]
    examples = select(group(*rows), Dataset(), "dpo", 0)
    assert sorted(e.token_ids[0] for e in examples if e.side == "rejected") == [110, 111, 112, 113]
    assert sorted(e.token_ids[0] for e in examples if e.side == "chosen") == [100, 100, 101, 101]


def test_examples_per_problem() -> None:
    rows = [*many(30, 6), *[sample("few", n, 1) for n in range(2)]]
    examples = select(group(*rows), Dataset(max_examples_per_problem=3), "kto", 0)
    counts = {problem: sum(e.problem_id == problem for e in examples) for problem in {e.problem_id for e in examples}}
    assert counts == {**{f"p{p}": 3 for p in range(30)}, "few": 2}
    assert len(set(ids(examples))) == len(examples)
    # sampled, not the first three: 20 possible sets of 6, so 30 problems show several
    drawn = {tuple(sorted(e.example_id.split("/")[1] for e in examples if e.problem_id == f"p{p}")) for p in range(30)}
    assert len(drawn) > 5


@pytest.mark.parametrize("method", METHODS)
def test_selection_is_the_same_in_every_run(method: Any) -> None:
    rows = group(*many(10, 6))
    settings = Dataset(max_examples_per_problem=4, kl_pair_share=0.5, pairs_per_problem=2)
    assert select(rows, settings, method, 3) == select(rows, settings, method, 3)
    if method != "rft":
        assert select(rows, settings, method, 3) != select(rows, settings, method, 4)


def test_wrong_solutions_for_each_right_one() -> None:
    """(right, wrong) of each problem, and an undecided sample, which is neither."""
    made = {"none": (0, 8), "few": (1, 7), "most": (5, 3), "all": (8, 0)}
    rows = [sample(p, n, int(n < right)) for p, (right, wrong) in made.items() for n in range(right + wrong)]
    rows.append(sample("none", 8, None))

    def counts(method: str, wrong_per_right: float | None) -> dict[str, list[int]]:
        examples = select(group(*rows), Dataset(wrong_per_right=wrong_per_right), method, 0)
        return {
            p: [sum(e.problem_id == p and e.outcome == outcome for e in examples) for outcome in (1, 0, None)]
            for p in made
        }

    assert counts("kto", None) == {"none": [0, 8, 0], "few": [1, 7, 0], "most": [5, 3, 0], "all": [8, 0, 0]}
    assert counts("step_kto", 1) == {"none": [0, 0, 1], "few": [1, 1, 0], "most": [5, 3, 0], "all": [8, 0, 0]}
    assert counts("kto", 0.5) == {"none": [0, 0, 0], "few": [1, 0, 0], "most": [5, 2, 0], "all": [8, 0, 0]}
    assert counts("bco", 2)["few"] == [1, 2, 0]
    assert counts("kto", 0)["most"] == [5, 0, 0]
    # drawn at random: of 7 wrong ones 21 pairs are possible
    drawn = {
        tuple(sorted(e.example_id for e in select(group(*rows), Dataset(wrong_per_right=2), "kto", seed)
                     if e.problem_id == "few" and e.outcome == 0))
        for seed in range(20)
    }  # fmt: skip
    assert len(drawn) > 5
