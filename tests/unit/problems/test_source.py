"""Problems from files and the generator: turns of iterations, and problems that measure never train."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Problem, read_records
from megatron_stepkto.problems.datasets import set_names
from megatron_stepkto.problems.source import check_training_problems, split_inputs, take_turns, write_problems
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
        assert write_problems(source(tmp_path, problems(8)), "train", 4, 0, t, out) == {"problems": 4}
        written += ids(list(read_records(out, Problem)))
    assert sorted(written) == [f"p{i}" for i in range(8)]


def test_evaluation_takes_the_first_problems(tmp_path: Path) -> None:
    given = source(tmp_path, problems(1), test=problems(9)[1:])
    out = tmp_path / "out.jsonl"
    assert write_problems(given, "test", 3, 0, 1, out) == {"problems": 3}
    assert ids(list(read_records(out, Problem))) == ["p1", "p2", "p3"]
    with pytest.raises(UserError, match=r"test\.jsonl: evaluate\.num_problems is 9, the file holds 8; lower it"):
        write_problems(given, "test", 9, 0, 1, tmp_path / "more.jsonl")
    assert not (tmp_path / "more.jsonl").exists()


def test_several_evaluation_sets_are_told_apart(tmp_path: Path) -> None:
    """Ids begin with the file's name, as two sets may share some; the limit counts for each; each may not train."""
    aime, amc = write(tmp_path / "aime.jsonl", problems(3)), write(tmp_path / "amc.jsonl", problems(9)[1:])
    given = source(tmp_path, problems(12)[9:]).model_copy(update={"test": [amc, aime]})
    out = tmp_path / "out.jsonl"
    assert write_problems(given, "test", 2, 0, 1, out) == {"problems": 4}
    written = list(read_records(out, Problem))
    assert ids(written) == ["amc/p1", "amc/p2", "aime/p0", "aime/p1"]
    assert [row.model_dump()["data"] for row in written] == ["amc", "amc", "aime", "aime"]
    assert write_problems(given, "test", None, 0, 1, tmp_path / "all.jsonl") == {"problems": 11}
    with pytest.raises(UserError, match=r"aime\.jsonl: evaluate\.num_problems is 4, the file holds 3; lower it"):
        write_problems(given, "test", 4, 0, 1, tmp_path / "more.jsonl")
    assert list(split_inputs(given, "test").values()) == [amc, aime]
    for number, path in enumerate((amc, aime)):
        trained = source(tmp_path, problems(2 + number)[1 + number :]).model_copy(update={"test": [path]})
        with pytest.raises(UserError, match="1 training problems are also in an evaluation set"):
            check_training_problems(trained, allow=False, skip_bad=False)


def test_a_key_of_a_users_that_is_named_data(tmp_path: Path) -> None:
    """It is not the name of a data set: it would cut the results, or fail at their end where it is no text."""
    rows = [{"problem_id": f"p{n}", "problem": f"{n} + {n}?", "answer": str(2 * n), "data": {"x": n}} for n in range(3)]
    given = source(tmp_path, problems(1), test=problems(1))
    given.test[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    write_problems(given, "test", None, 0, 1, out)
    assert ["data" in row.model_dump() for row in read_records(out, Problem)] == 3 * [False]


def test_names_of_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("aime.2024", "aime.2025"):
        Path(folder).mkdir()
    given = ["aime.2024", "aime.2025", "math.500.jsonl", "hub:amc23", "aime.2024/..", "hub:org/hmmt:main:test"]
    assert set_names(given, "--data") == ["aime.2024", "aime.2025", "math.500", "amc23", tmp_path.name, "hmmt"]
    with pytest.raises(UserError, match=r"--data: a/x\.jsonl and b/x\.jsonl would both be x in tables and ids; rename"):
        set_names(["y.jsonl", "a/x.jsonl", "b/x.jsonl"], "--data")
    with pytest.raises(UserError, match=r"--data: x\.jsonl is given twice; name it once"):
        set_names(["x.jsonl", "x.jsonl"], "--data")


def test_benchmarks_as_they_are_published(data_dir: Path, tmp_path: Path) -> None:
    sets = {"math500": 500, "amc23": 40, "aime24": 30}
    files = [data_dir / "eval" / f"{name}.jsonl" for name in sets]
    given = source(tmp_path, problems(1)).model_copy(update={"test": files})
    out = tmp_path / "out.jsonl"
    assert write_problems(given, "test", None, 0, 1, out) == {"problems": 570}
    written = list(read_records(out, Problem))
    assert Counter(row.model_dump()["data"] for row in written) == sets
    assert written[0].problem_id == "math500/test/precalculus/807.json"


def test_a_row_that_repeats_the_text_of_another(tmp_path: Path) -> None:
    given = source(tmp_path, problems(1), test=problems(1))
    given.test[0].write_text((json.dumps({"question": "2 + 2?", "answer": "#### 4"}) + "\n") * 2)
    with pytest.raises(UserError, match=r"is duplicated; ids must be unique \(a row without an id has the hash"):
        write_problems(given, "test", None, 0, 1, tmp_path / "out.jsonl")


def test_two_sets_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = [write(tmp_path / "amc.jsonl", problems(3)), write(tmp_path / "other" / "amc.jsonl", problems(3))]
    given = source(tmp_path, problems(1)).model_copy(update={"dev": files})
    with pytest.raises(UserError, match=r"problems\.dev: .*/amc\.jsonl and .*/other/amc\.jsonl would both be amc"):
        write_problems(given, "dev", None, 0, 1, tmp_path / "out.jsonl")


def test_problems_as_their_publishers_ship_them(tmp_path: Path) -> None:
    """MATH-500's rows to measure on, GSM8K's to train on; a Problem record keeps what only it has."""
    math, gsm8k = tmp_path / "math500.jsonl", tmp_path / "gsm8k.jsonl"
    math.write_text(json.dumps({"problem": "1 + 1?", "answer": "2", "unique_id": "test/1.json", "level": 3}) + "\n")
    gsm8k.write_text(json.dumps({"question": "2 + 2?", "answer": "<<2+2=4>>4\n#### 4"}) + "\n")
    given = Problems.model_validate({"source": "files", "train": gsm8k, "test": math})
    out = tmp_path / "out.jsonl"
    assert write_problems(given, "test", None, 0, 1, out) == {"problems": 1}
    [row] = read_records(out, Problem)
    assert (row.problem_id, row.answer, row.model_dump()["level"]) == ("test/1.json", "2", 3)
    assert write_problems(given, "train", None, 0, 1, out) == {"problems": 1}
    [row] = read_records(out, Problem)
    assert (row.problem, row.answer, len(row.problem_id)) == ("2 + 2?", "4", 16)
    assert check_training_problems(given, allow=False, skip_bad=False) == {}
    record = {"problem_id": "a", "problem": "3?", "answer": None, "source": "mine"}
    math.write_text(json.dumps(record) + "\n")
    write_problems(given, "test", None, 0, 1, out)
    assert json.loads(out.read_text()) == {**record, "solution": None, "split": None}
    # only a reward model judges it: no reason to refuse the training problems
    assert check_training_problems(given, allow=False, skip_bad=False) == {}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_problem_that_measures_may_not_train(tmp_path: Path, split: str) -> None:
    """Found by text, whatever its id and its spaces; with leave the manifest gets to know."""
    again = Problem(problem_id="other", problem="  3 +\n3? ", answer="6")
    given = source(tmp_path, problems(5), **{split: [*problems(8)[5:], again]})
    with pytest.raises(UserError) as caught:
        check_training_problems(given, allow=False, skip_bad=False)
    said = str(caught.value)
    assert said.startswith("1 training problems are also in an evaluation set")
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
    with pytest.raises(UserError, match="training problems are also in an evaluation set") as caught:
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
    with pytest.raises(UserError, match=r"train\.jsonl: problem_id p1 is duplicated"):
        write_problems(source(tmp_path, [*rows, doubled]), "train", None, 0, 1, tmp_path / "out.jsonl")


def test_bad_rows_go_to_quarantine(tmp_path: Path) -> None:
    given = source(tmp_path, problems(3))
    assert given.train is not None
    with given.train.open("a") as file:
        file.write('{"problem_id": "bad"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:4: "):
        write_problems(given, "train", None, 0, 1, tmp_path / "out.jsonl")
    aside = tmp_path / "aside.jsonl"
    assert write_problems(given, "train", None, 0, 1, tmp_path / "out.jsonl", aside) == {"problems": 3}
    assert json.loads(aside.read_text())["line"] == 4


BAD_ROWS = [
    ({"problem_id": ""}, "problem_id: must not be blank, got ''"),
    ({"problem_id": " "}, "problem_id: must not be blank, got ' '"),
    ({"problem_id": "a\nb"}, "problem_id: must be one line without tabs"),
    ({"problem_id": "a\0"}, "problem_id: holds the control character U+0000 (character 1, counted from 0); remove it"),
    ({"problem": " \n\t"}, "problem: must not be blank"),
    ({"problem": "1\0 + 1?"}, "problem: holds the control character U+0000 (character 1, counted from 0); remove it"),
    ({"problem": "What is \x0crac12?"}, r'or write its command with two backslashes, such as "\\frac"'),
    ({"answer": "\boxed{2}"}, "answer: holds the control character U+0008 (character 0, counted from 0)"),
    ({"answer": " "}, "answer: must not be blank, got ' '"),
    ({"answer": ""}, "answer: must not be blank, got ''"),
    ({"answer": 2}, "answer: Input should be a valid string, got 2"),
    ({"level": "\ud83d"}, "holds half a surrogate pair, which is not a character"),
]


@pytest.mark.parametrize(("keys", "said"), BAD_ROWS)
def test_a_bad_problem_is_named_by_its_first_reader(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    """Alone, and when the training problems are first compared with those that measure."""
    train = write(tmp_path / "train.jsonl", problems(1))
    train.write_text(train.read_text() + json.dumps({"problem_id": "q", "problem": "x?", "answer": "2", **keys}) + "\n")
    given = Problems(source="files", train=train, test=write(tmp_path / "test.jsonl", problems(3)[2:]))
    expected = re.compile(
        re.escape(f"{train}:2: ") + ".*" + re.escape(said) + ".*; correct the row, or pass --quarantine FILE", re.S
    )
    with pytest.raises(UserError, match=expected):
        write_problems(given, "train", None, 0, 1, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=expected):
        check_training_problems(given, allow=False, skip_bad=False)
    assert write_problems(given, "train", None, 0, 1, tmp_path / "out.jsonl", tmp_path / "aside") == {"problems": 1}


def test_text_of_any_script_is_no_bad_row(tmp_path: Path) -> None:
    rows = [
        Problem(problem_id=f"{n} é", problem=text, answer="2")
        for n, text in enumerate(["1\t+\r\n1?", "\x85mojibake\x95", "\u2028 \ufeff \U0001f642", "∑ 一 ١"])
    ]
    assert write_problems(source(tmp_path, rows), "train", None, 0, 1, tmp_path / "out.jsonl") == {"problems": 4}
    escaped = tmp_path / "escaped.jsonl"
    escaped.write_text(json.dumps({"problem_id": "a", "problem": "\U0001f642?", "answer": "2"}) + "\n")
    assert next(read_records(escaped, Problem)).problem == "\U0001f642?"


def test_problems_that_share_a_text_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Published sets hold some (MAWPS with ASDiv: 177 of 3,055): they are kept, and the manifest counts them."""
    same = [Problem(problem_id=f"s{n}", problem=" 1 +  1?" if n else "1 + 1?", answer="2") for n in range(12)]
    given = source(tmp_path, [*problems(1), *same], test=[*problems(4)[3:], *same[:2]])
    out = tmp_path / "out.jsonl"
    assert write_problems(given, "train", 5, 0, 1, out) == {"problems": 5, "repeated_texts": 11}
    said = " ".join(capsys.readouterr().err.split())
    assert "11 problems repeat the text of an earlier one, and each counts: s0, s1, s2, s3, s4" in said
    assert write_problems(given, "test", 3, 0, 1, out) == {"problems": 3, "repeated_texts": 1}
    assert write_problems(source(tmp_path, problems(3)), "train", 2, 0, 1, out) == {"problems": 2}


def test_one_text_with_two_answers_does_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Problem(problem_id=name, problem="1 + 1?", answer=answer) for name, answer in (("a", "2"), ("b", "3"))]
    given = source(tmp_path, rows, test=rows)
    with pytest.raises(UserError, match=r"1 texts with several answers: a \(answer 2\), b \(answer 3\); remove"):
        write_problems(given, "train", None, 0, 1, tmp_path / "out.jsonl")
    assert write_problems(given, "test", 2, 0, 1, tmp_path / "out.jsonl") == {"problems": 2, "repeated_texts": 1}
    assert "a (answer 2), b (answer 3)" in " ".join(capsys.readouterr().err.split())
    alike = [rows[0], rows[1].model_copy(update={"answer": "2.0"})]
    assert write_problems(source(tmp_path, alike), "train", None, 0, 1, tmp_path / "out.jsonl")["problems"] == 2


def test_a_check_makes_bad_rows(tmp_path: Path) -> None:
    def check(problem: Problem) -> Problem:
        if "2" in problem.problem:
            raise ValueError("the problem holds a 2")
        return problem

    given, out, aside = source(tmp_path, problems(4)), tmp_path / "out.jsonl", tmp_path / "aside.jsonl"
    with pytest.raises(UserError, match=r"train\.jsonl:3: the problem holds a 2; correct the row"):
        write_problems(given, "train", None, 0, 1, out, check=check)
    assert write_problems(given, "train", None, 0, 1, out, aside, check) == {"problems": 3}


# --- from the generator --------------------------------------------------------------------------------------


def test_generated_problems_are_new_in_each_iteration(tmp_path: Path) -> None:
    generator = Problems(source="chained_arithmetic", per_iteration=20)
    texts: dict[tuple[str, int], set[str]] = {}
    for split, t in (("train", 1), ("train", 2), ("test", 1)):
        out = tmp_path / f"{split}{t}.jsonl"
        assert write_problems(generator, split, 20, 0, t, out) == {"problems": 20}  # type: ignore[arg-type]
        rows = list(read_records(out, Problem))
        assert len(set(ids(rows))) == 20
        texts[split, t] = {row.problem for row in rows}
    assert not texts["train", 1] & texts["test", 1]
    assert texts["train", 1] != texts["train", 2]
    again = tmp_path / "again.jsonl"
    write_problems(generator, "train", 20, 0, 1, again)
    assert again.read_bytes() == (tmp_path / "train1.jsonl").read_bytes()
