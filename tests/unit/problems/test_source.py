"""Problems from files and the generator: turns of iterations, and problems that measure never train."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Problem, read_records
from megatron_stepkto.problems.source import check_training_problems, take_turns, write_problems
from megatron_stepkto.recipe.keys import Problems


def problems(count: int) -> list[Problem]:
    return [Problem(problem_id=f"p{i}", problem=f"{i} + {i}?", answer=str(2 * i)) for i in range(count)]


def write(path: Path, rows: list[Problem]) -> Path:
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return path


def ids(rows: list[Problem]) -> list[str]:
    return [row.problem_id for row in rows]


def test_iterations_work_on_disjoint_slices_until_all_had_their_turn() -> None:
    rows = problems(10)
    turns = [ids(take_turns(rows, 3, 0, t)) for t in range(1, 7)]
    assert [len(turn) for turn in turns] == [3] * 6
    for cycle in (turns[:3], turns[3:]):  # 10 // 3 = 3 turns, the tenth problem waits for the next shuffle
        assert len({name for turn in cycle for name in turn}) == 9
    assert turns[:3] != turns[3:]
    assert turns[0] != ["p0", "p1", "p2"]


def test_turns_are_the_same_in_every_run_and_differ_by_seed() -> None:
    rows = problems(40)
    assert take_turns(rows, 20, 7, 2) == take_turns(rows, 20, 7, 2)
    assert ids(take_turns(rows, 20, 7, 1)) != ids(take_turns(rows, 20, 8, 1))
    assert ids(rows) == [f"p{i}" for i in range(40)]


@pytest.mark.parametrize("count", [None, 5])
def test_all_problems_every_time(count: int | None) -> None:
    rows = problems(5)
    turns = [ids(take_turns(rows, count, 0, t)) for t in (1, 2, 3, 4)]
    assert all(sorted(turn) == ids(rows) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_more_problems_than_there_are() -> None:
    with pytest.raises(UserError, match="per_iteration is 50, the train file holds 5"):
        take_turns(problems(5), 50, 0, 1)


# --- from files ----------------------------------------------------------------------------------------------


def source(folder: Path, train: list[Problem], **splits: list[Problem]) -> Problems:
    files: dict[str, Any] = {name: write(folder / f"{name}.jsonl", rows) for name, rows in splits.items()}
    return Problems(source="files", train=write(folder / "train.jsonl", train), **files)


def test_train_problems_from_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    written = []
    for t in (1, 2):
        assert write_problems(source(tmp_path, problems(8)), "train", 4, 0, t, out) == 4
        written += ids(list(read_records(out, Problem)))
    assert sorted(written) == [f"p{i}" for i in range(8)]


def test_evaluation_takes_the_first_problems(tmp_path: Path) -> None:
    given = source(tmp_path, problems(1), test=problems(9)[1:])
    out = tmp_path / "out.jsonl"
    assert write_problems(given, "test", 3, 0, 1, out) == 3
    assert ids(list(read_records(out, Problem))) == ["p1", "p2", "p3"]
    with pytest.raises(UserError, match=r"test\.jsonl: evaluate\.num_problems is 9, the file holds 8; lower it"):
        write_problems(given, "test", 9, 0, 1, tmp_path / "more.jsonl")
    assert not (tmp_path / "more.jsonl").exists()


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_problem_that_measures_may_not_train(tmp_path: Path, split: str) -> None:
    """Found by text, whatever its id and its spaces; with leave the manifest gets to know."""
    again = Problem(problem_id="other", problem="  3 +\n3? ", answer="6")
    given = source(tmp_path, problems(5), **{split: [*problems(8)[5:], again]})
    with pytest.raises(UserError) as caught:
        check_training_problems(given, allow=False, skip_bad=False)
    said = str(caught.value)
    assert said.startswith("1 training problems also stand in an evaluation set")
    assert f"{tmp_path / 'train.jsonl'}:4 (p3) = {tmp_path / f'{split}.jsonl'}:4 (other), same: 3 + 3?" in said
    allowed = check_training_problems(given, allow=True, skip_bad=False)
    assert allowed == {"overlaps": 1, "overlapping_ids": ["p3"]}


def test_problems_with_other_signs_are_others(tmp_path: Path) -> None:
    given = source(tmp_path, problems(5), test=[Problem(problem_id="x", problem="3 - 3?", answer="0")])
    assert check_training_problems(given, allow=False, skip_bad=False) == {}


def test_processbench_shares_108_problems_with_math500(data_dir: Path) -> None:
    def imports(**keys: Any) -> Problems:
        path = data_dir / "steps/processbench_math.jsonl"
        return Problems.model_validate(
            {"source": "imports", "imports": [{"format": "processbench", "path": path}], **keys}
        )

    assert check_training_problems(imports(), allow=False, skip_bad=False) == {}
    guarded = imports(apart_from=[data_dir / "eval/math500.jsonl"])
    with pytest.raises(UserError, match="training problems also stand in an evaluation set") as caught:
        check_training_problems(guarded, allow=False, skip_bad=False)
    assert str(caught.value).startswith("108 training problems")
    first = str(caught.value).splitlines()[1]
    assert re.search(r"processbench_math\.jsonl:\d+ \(\w+\) = .*math500\.jsonl:\d+ \(\S+\), same: ", first)
    # ProcessBench has several solutions of a problem: the problems are counted, not the rows
    assert check_training_problems(guarded, allow=True, skip_bad=False)["overlaps"] == 108
    near = check_training_problems(
        imports(apart_from=[data_dir / "eval/math500.jsonl"], overlap="13gram"), allow=True, skip_bad=False
    )
    assert near["overlaps"] == 125


def test_an_id_that_stands_twice(tmp_path: Path) -> None:
    rows = problems(3)
    doubled = rows[1].model_copy(update={"problem": "5 + 5?"})
    with pytest.raises(UserError, match=r"train\.jsonl: problem_id p1 stands twice"):
        write_problems(source(tmp_path, [*rows, doubled]), "train", None, 0, 1, tmp_path / "out.jsonl")


def test_bad_rows_go_to_quarantine(tmp_path: Path) -> None:
    given = source(tmp_path, problems(3))
    assert given.train is not None
    with given.train.open("a") as file:
        file.write('{"problem_id": "bad"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:4: "):
        write_problems(given, "train", None, 0, 1, tmp_path / "out.jsonl")
    aside = tmp_path / "aside.jsonl"
    assert write_problems(given, "train", None, 0, 1, tmp_path / "out.jsonl", aside) == 3
    assert json.loads(aside.read_text())["line"] == 4


# --- from the generator --------------------------------------------------------------------------------------


def test_generated_problems_are_new_in_each_iteration(tmp_path: Path) -> None:
    generator = Problems(source="chained_arithmetic", per_iteration=20)
    texts: dict[tuple[str, int], set[str]] = {}
    for split, t in (("train", 1), ("train", 2), ("test", 1)):
        out = tmp_path / f"{split}{t}.jsonl"
        assert write_problems(generator, split, 20, 0, t, out) == 20  # type: ignore[arg-type]
        rows = list(read_records(out, Problem))
        assert len(set(ids(rows))) == 20
        texts[split, t] = {row.problem for row in rows}
    assert not texts["train", 1] & texts["test", 1]
    assert texts["train", 1] != texts["train", 2]
    again = tmp_path / "again.jsonl"
    write_problems(generator, "train", 20, 0, 1, again)
    assert again.read_bytes() == (tmp_path / "train1.jsonl").read_bytes()
