"""pass@k, bootstrap, McNemar and paired comparison against counting, formulas of the normal law, and hand-made rows."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import write_json
from megatron_stepkto.base.records import Problem, write_records
from megatron_stepkto.evaluation.compare import compare_evaluations, comparison_table
from megatron_stepkto.evaluation.metrics import ProblemResult, evaluation_row, problem_results
from megatron_stepkto.evaluation.statistics import Z_95, bootstrap_mean, mcnemar_exact, pass_at_k
from megatron_stepkto.evaluation.table import Row
from tests.builders import evaluation_row as table_row
from tests.unit.evaluation.test_measuring import judged, never


def test_pass_at_k_counts_subsets() -> None:
    """The share of the k-subsets of n samples that hold a right one, by looking at all of them."""
    for n, c, k in itertools.product((1, 4, 7), range(8), range(1, 8)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations(range(n), k))
            held = sum(any(sample < c for sample in subset) for subset in subsets)
            assert pass_at_k(n, c, k) == pytest.approx(held / len(subsets), abs=1e-12)
    assert pass_at_k(100, 3, 1) == pytest.approx(0.03)
    for wrong in [(4, 5, 1), (4, 2, 5), (4, 2, 0)]:
        with pytest.raises(ValueError, match="expected 0 <= right"):
            pass_at_k(*wrong)


def test_mcnemar_by_hand() -> None:
    """b = 1, c = 5: 2 (1 + 6) / 64; the published 8 of 10 discordant pairs: 2 (1 + 10 + 45) / 1024."""
    assert mcnemar_exact(1, 5) == pytest.approx(14 / 64)
    assert mcnemar_exact(8, 2) == pytest.approx(112 / 1024)
    assert mcnemar_exact(3, 3) == 1.0
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 12) == pytest.approx(2 / 2**12)


def test_bootstrap_interval_is_the_normal_one_for_many_problems() -> None:
    draw = random.Random(3)
    values = [draw.random() for _ in range(800)]
    share = bootstrap_mean(values)
    mean = sum(values) / 800
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 800 / 800)
    assert share.value == pytest.approx(mean)
    assert share.interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert bootstrap_mean(values).interval == share.interval
    assert bootstrap_mean([]).interval is None


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([1.0] * 6, 6 / (6 + Z_95**2), 1.0),  # Wilson's at n of n: n / (n + z^2)
        ([0.0] * 6, 0.0, Z_95**2 / (6 + Z_95**2)),
        ([1.0], 1 / (1 + Z_95**2), 1.0),
        ([0.5] * 4, 0.5 - Z_95 / (2 * math.sqrt(4 + Z_95**2)), 0.5 + Z_95 / (2 * math.sqrt(4 + Z_95**2))),
    ],
)
def test_equal_values_do_not_make_a_certain_mean(values: list[float], low: float, high: float) -> None:
    """All of six problems solved is no proof that every problem is."""
    share = bootstrap_mean(values)
    assert share.value == values[0]
    assert share.interval == pytest.approx((low, high), abs=1e-12)
    assert bootstrap_mean([*values, 0.75]).interval != share.interval


def asked(count: int) -> list[Problem]:
    return [
        Problem.model_validate(
            {"problem_id": f"p{n}", "problem": f"{n}?", "answer": "8", "subject": "Algebra" if n < 2 else "Geometry"}
        )
        for n in range(count)
    ]


def test_row_counts_pass_at_k_and_groups_by_hand() -> None:
    """Right of 4: 4, 1, 0. pass@2 = (1 + (1 - C(3,2)/C(4,2)) + 0) / 3 = (1 + 1/2) / 3; pass@4 = 2/3."""
    greedy = [judged("p0", "8", 1, (1, 0)), judged("p1", "7", 0), judged("p2", None, 0)]
    sampled = [
        judged(f"p{n}", "8" if k < right else "7", 1 if k < right else 0, number=k)
        for n, right in enumerate((4, 1, 0))
        for k in range(4)
    ]
    row = evaluation_row("M", "test", asked(3), greedy, sampled)
    assert Row.checked(row) == row, "what is written is what a reader knows"
    assert list(row["pass_at_k"]) == ["1", "2", "4"]
    assert [row["pass_at_k"][k]["value"] for k in ("1", "2", "4")] == pytest.approx([5 / 12, 0.5, 2 / 3])
    low, high = row["pass_at_k"]["2"]["value_interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert list(row["by"]) == ["subject"]
    algebra, geometry = row["by"]["subject"]["Algebra"], row["by"]["subject"]["Geometry"]
    assert (algebra["num_problems"], geometry["num_problems"]) == (2, 1)
    assert (algebra["pass_at_1"], algebra["maj_at_k"], geometry["pass_at_1"]) == (0.5, 0.5, 0)
    assert algebra["wrong_step_share_of_correct"] == 1.0
    results = problem_results(asked(3), greedy, sampled, never)
    assert [(r.greedy, r.right, r.samples, r.majority, r.flawed, r.judged_steps) for r in results] == [
        (1, 4, 4, True, 1, 2),
        (0, 1, 4, False, 0, 0),
        (0, 0, 4, False, 0, 0),
    ]


def result(number: int, greedy: int, right: int = 0, **changes: Any) -> ProblemResult:
    base: dict[str, Any] = {
        "problem_id": f"p{number}", "problem_sha256": "x", "greedy": greedy, "samples": 4, "right": right,
        "majority": right > 2, "flawed": 0, "right_and_judged": greedy, "wrong_steps": 0, "judged_steps": 2 * greedy,
    }  # fmt: skip
    return ProblemResult.model_validate({**base, **changes})


def folder(path: Path, name: str, results: list[ProblemResult]) -> Path:
    write_records(path / "problems.jsonl", results)
    write_json(path / "metrics.json", table_row(name, k=4))
    return path


def test_comparison_by_hand(tmp_path: Path) -> None:
    """10 problems: both solve 4, only A 1, only B 5. Samples: A 10 of 40, B 30 of 40. B's right ones: 3 of 9 flawed."""
    one = [result(n, int(n < 5), 1) for n in range(10)]
    other = [result(n, int(n != 4), 3, flawed=int(n < 3)) for n in range(10)]
    a, b = folder(tmp_path / "a", "M0", one), folder(tmp_path / "b", "M1", list(reversed(other)))
    found = compare_evaluations(a, b)
    rows = {row["metric"]: row for row in found["differences"]}
    first = rows["pass@1"]
    assert (first["first"], first["second"], first["only_first"], first["only_second"]) == (0.5, 0.9, 1, 5)
    assert first["difference"] == pytest.approx(0.4)
    assert first["p_value"] == pytest.approx(14 / 64)
    low, high = first["interval"]
    # a difference per problem of -1, 0, 1 with mean 0.4 and variance 0.44: +-1.96 * sqrt(0.044) = 0.41
    assert low == pytest.approx(0.4 - 0.41, abs=0.1)
    assert high == pytest.approx(0.4 + 0.41, abs=0.1)
    assert rows["maj@4"]["difference"] == 1.0
    assert rows["accuracy of samples"]["difference"] == pytest.approx(0.5)
    assert rows["right with a wrong step"]["difference"] == pytest.approx(3 / 9)
    assert rows["right with a wrong step"]["p_value"] is None
    text = comparison_table(found)
    assert "+40.0" in text
    assert "1 | 5" in text
    assert "0.219" in text
    assert max(map(len, text.splitlines())) <= 120


def test_comparison_of_each_data_set(tmp_path: Path) -> None:
    """amc: only B solves 3 of 4; math: only A solves 2 of 6."""
    one = [result(n, int(n >= 8), data="amc" if n < 4 else "math") for n in range(10)]
    other = [result(n, int(n < 3), data="amc" if n < 4 else "math") for n in range(10)]
    a, b = folder(tmp_path / "a", "M0", one), folder(tmp_path / "b", "M1", other)
    found = compare_evaluations(a, b)
    assert found["differences"][0]["difference"] == pytest.approx(0.1)
    sets = found["by"]["data"]
    assert {name: part["num_problems"] for name, part in sets.items()} == {"amc": 4, "math": 6}
    assert [part["differences"][0]["difference"] for part in sets.values()] == pytest.approx([3 / 4, -2 / 6])
    text = comparison_table(found)
    places = [
        text.index(words) for words in ("10 problems", "+10.0 [", "amc: 4 problems", "+75.0 [", "math: 6 problems")
    ]
    assert places == sorted(places)
    assert max(map(len, text.splitlines())) <= 120
    alike = [result(n, 1, data="amc") for n in range(4)]
    a, b = folder(tmp_path / "c", "M0", alike), folder(tmp_path / "d", "M1", alike)
    assert compare_evaluations(a, b)["by"] == {}


def test_the_same_problems_under_other_ids(tmp_path: Path) -> None:
    """A run keeps the ids of a single file; `measure`, and a run of several, put the file's name before them."""
    rows = [result(n, n % 2, problem_sha256=str(n)) for n in range(8)]
    renamed = [
        row.model_copy(update={"problem_id": f"amc/{row.problem_id}", "data": "amc", "greedy": 1})
        for row in reversed(rows)
    ]
    found = compare_evaluations(folder(tmp_path / "a", "M0", rows), folder(tmp_path / "b", "M1", renamed))
    [solved, *_] = found["differences"]
    assert (solved["difference"], solved["only_first"], solved["only_second"]) == (0.5, 0, 4)
    twice = [row.model_copy(update={"problem_sha256": "a"}) for row in rows]  # then the ids must agree
    with pytest.raises(UserError, match="are of different problems: 16 are in one only"):
        compare_evaluations(
            folder(tmp_path / "c", "M0", twice),
            folder(tmp_path / "d", "M1", [row.model_copy(update={"problem_sha256": "a"}) for row in renamed]),
        )


def manifest(path: Path, model: str, **changes: Any) -> None:
    """As of an evaluation whose judge completes solutions with the measured model itself."""
    settings = {
        "evaluate": {"k": 4, "temperature": 0.7, "num_problems": None},
        "sample": {"max_tokens": 64},
        "judge": {"process": {"kind": "monte_carlo", "model": {"sha256": model}}},
        "prompt": {"template": "{problem}\n"},
    }
    inputs = {"model": {"path": f"/models/{model}", "sha256": model}}
    write_json(path / "manifest.json", {"key": {"settings": {**settings, **changes}, "inputs": inputs}})


def test_other_settings_are_named(tmp_path: Path) -> None:
    rows = [result(n, n % 2) for n in range(20)]
    one, other = folder(tmp_path / "ms2" / "results", "m0", rows), folder(tmp_path / "ms3" / "results", "m0", rows)
    found = compare_evaluations(tmp_path / "ms2", tmp_path / "ms3")
    assert found["settings"] is None
    assert "one has no manifest.json" in comparison_table(found)
    manifest(one, "a")
    measured = {"num_samples": 8, "temperature": 1.0, "top_p": 1.0, "gap_problems": 0, "stall_timeout_s": 600.0}
    manifest(other, "b", name="b", seed=0, evaluate={"k": 4, "temperature": 0.7, "num_problems": 20},
             sample={"max_tokens": 64, **measured})  # fmt: skip
    found = compare_evaluations(tmp_path / "ms2", tmp_path / "ms3")
    assert found["settings"] == [], "another model, judge of itself, and the same problems"
    assert "settings" not in comparison_table(found)
    manifest(other, "b", sample={"max_tokens": 20}, evaluate={"k": 4, "temperature": 1.0})
    found = compare_evaluations(one, tmp_path / "ms3")
    assert found["settings"] == [
        {"setting": "evaluate.temperature", "first": 0.7, "second": 1.0},
        {"setting": "sample.max_tokens", "first": 64, "second": 20},
    ]
    assert "  evaluate.temperature: 0.7 | 1.0\n  sample.max_tokens: 64 | 20" in comparison_table(found)
    manifest(other, "a", judge={"process": {"kind": "monte_carlo", "model": {"sha256": "c"}}})
    [row] = compare_evaluations(one, other)["settings"]
    assert row == {"setting": "judge.process.model.sha256", "first": "the measured model", "second": "c"}
    for path, dtype in ((one, "bfloat16"), (other, "float32")):  # what auto stood for
        manifest(path, "a", sample={"max_tokens": 64, "dtype": "auto"})
        write_json(path / "metrics.json", {**json.loads((path / "metrics.json").read_text()), "dtype": dtype})
    [row] = compare_evaluations(one, other)["settings"]
    assert row == {"setting": "sample.dtype", "first": "bfloat16", "second": "float32"}


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    def headings(first: Path, second: Path) -> list[str]:
        text = comparison_table(compare_evaluations(first, second))
        return text.splitlines()[1].split("problems")[1].split("difference")[0].split()

    rows = [result(n, n % 2) for n in range(20)]
    base, kto = (folder(tmp_path / run / "evaluate" / "M3", "M3", rows) for run in ("base-0", "kto-0"))
    assert headings(base, kto) == ["base-0/evaluate/M3", "kto-0/evaluate/M3"]
    for name in ("ms2", "ms3"):
        folder(tmp_path / name / "results", "m0", rows)
    assert headings(tmp_path / "ms2", tmp_path / "ms3" / "results") == ["ms2", "ms3"]
    assert headings(tmp_path / "ms2", base) == ["m0", "M3"]
    assert headings(base, base) == ["M3", "M3"]


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    rows = [result(n, n % 2, n % 4) for n in range(20)]
    found = compare_evaluations(folder(tmp_path / "a", "A", rows), folder(tmp_path / "b", "B", rows))
    assert [row["difference"] for row in found["differences"]] == [0.0] * 5
    assert found["differences"][0]["interval"] == (0.0, 0.0)
    assert found["differences"][0]["p_value"] == 1.0


def test_other_problems_are_refused(tmp_path: Path) -> None:
    rows = [result(n, 1) for n in range(4)]
    a = folder(tmp_path / "a", "A", rows)
    with pytest.raises(UserError, match="1 are in one only, such as p3"):
        compare_evaluations(a, folder(tmp_path / "b", "B", rows[:3]))
    with pytest.raises(UserError, match=r"problem p1 .* differs in text or answer"):
        compare_evaluations(a, folder(tmp_path / "c", "C", [rows[0], result(1, 1, problem_sha256="y"), *rows[2:]]))
    with pytest.raises(UserError, match=r"metrics\.json is missing"):
        compare_evaluations(a, tmp_path)
