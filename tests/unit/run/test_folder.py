"""Every path of a run, spelled once more: a change of one would lose the finished stages of users' runs."""

from __future__ import annotations

from pathlib import Path

from megatron_stepkto.run.folder import RunFolder

BASE = Path("runs/r")


def test_paths_of_a_run() -> None:
    run = RunFolder(BASE)
    found = [
        run.problems(2), run.samples(2), run.judged(2), run.imported_problems, run.stage("dataset", 2),
        run.stage("train", 2), run.model(2), run.model(0), run.m0("tokenizer"), run.evaluation(0), run.evaluation(3),
        run.evaluation_problems, run.summary, run.recipe, run.report, run.hashes, run.lock,
    ]  # fmt: skip
    assert [str(path.relative_to(BASE)) for path in found] == [
        "iteration_2/problems/problems.jsonl", "iteration_2/sample/samples.jsonl", "iteration_2/judge/judged.jsonl",
        "iteration_1/judge/problems.jsonl", "iteration_2/dataset", "iteration_2/train", "iteration_2/convert/model",
        "M0/convert/model", "M0/tokenizer", "evaluate/M0", "evaluate/M3", "evaluate/problems/problems.jsonl",
        "summary.json", "recipe.yaml", "report.html", ".hashes.json", ".lock",
    ]  # fmt: skip


def test_a_compared_method_shares_what_comes_from_m0() -> None:
    run, kto = RunFolder(BASE), RunFolder(BASE, "kto")
    assert kto.problems(1) == run.problems(1)
    assert kto.samples(1) == run.samples(1)
    assert kto.judged(1) == run.judged(1)
    assert kto.evaluation(0) == run.evaluation(0)
    own = [kto.stage("dataset", 1), kto.samples(2), kto.judged(2), kto.model(1), kto.evaluation(1)]
    assert [str(path.relative_to(BASE / "methods" / "kto")) for path in own] == [
        "iteration_1/dataset", "iteration_2/sample/samples.jsonl", "iteration_2/judge/judged.jsonl",
        "iteration_1/convert/model", "evaluate/M1",
    ]  # fmt: skip
    assert kto.problems(2) == run.problems(2)


def test_what_has_begun(tmp_path: Path) -> None:
    for name in ("iteration_10/train", "iteration_9", "evaluate/M0", "evaluate/problems", "methods/kto/evaluate/M2"):
        (tmp_path / name).mkdir(parents=True)
    run = RunFolder(tmp_path)
    assert (run.iterations(), run.evaluated()) == ([9, 10], [0])
    [kto] = run.others()
    assert (kto, kto.iterations(), kto.evaluated()) == (RunFolder(tmp_path, "kto"), [], [2])
