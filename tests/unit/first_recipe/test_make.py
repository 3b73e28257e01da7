"""``stepkto init`` writes recipes that load, gives the numbers it measured, and never loses a file."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Problem, read_records
from megatron_stepkto.first_recipe import draft, make
from megatron_stepkto.first_recipe import judge as judges
from megatron_stepkto.first_recipe.judge import reachable_judge
from megatron_stepkto.first_recipe.machine import Sampler, sampling_keys
from megatron_stepkto.first_recipe.make import Wish, make_recipe
from megatron_stepkto.first_recipe.pilot import Pilot
from megatron_stepkto.first_recipe.yaml_lines import Key, yaml_lines
from megatron_stepkto.methods.registry import load_recipe
from megatron_stepkto.problems.chained_arithmetic.generate import generate
from megatron_stepkto.problems.source import check_training_problems
from megatron_stepkto.recipe.keys import Recipe


@pytest.fixture
def wish(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Wish:
    for name in ("JUDGE_URL", "JUDGE_KEY", "STEPKTO_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    problems = list(generate("train", 40, 1))
    rows = [{"question": each.problem, "answer": f"So\n#### {each.answer}"} for each in problems]
    Path("chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]) + "{broken\n")
    return Wish(
        model=str(repository / "recipes" / "mini_cpu_m0"), problems=[Path("chains.jsonl")], tests=(), output=None,
        gpus=0, cluster="h100", samples=0, force=False,
    )  # fmt: skip


def changed(wish: Wish, **values: object) -> Wish:
    return Wish(**{**vars(wish), **values})


def made(wish: Wish) -> tuple[Recipe, list[str]]:
    lines = make_recipe(wish)
    return load_recipe(wish.output or "mini_cpu_m0_chains.yaml"), lines


def test_without_a_gpu_or_samples(wish: Wish, tmp_path: Path) -> None:
    recipe, lines = made(wish)
    assert recipe.sample is not None
    assert recipe.evaluate is not None
    assert (recipe.train.device, recipe.train.dtype, recipe.iterations) == ("cpu", "float32", 1)
    assert (recipe.problems.per_iteration, recipe.evaluate.num_problems) == (32, 4)
    assert recipe.sample.max_tokens == 256 - 42  # the positions that the longest prompt leaves
    folder = tmp_path / "mini_cpu_m0_chains_problems"
    assert len((folder / "train.jsonl").read_text().splitlines()) == 36
    [bad] = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert (bad["file"], bad["line"], bad["row"]) == ("chains.jsonl", 42, "{broken")
    text = "\n".join(lines)
    assert "chains.jsonl:42: broken JSON" in text
    assert "repeated problems, left out: 1 (chains.jsonl:41)" in text
    assert "not decided:" in text
    assert "sample.max_tokens is a default" in Path("mini_cpu_m0_chains.yaml").read_text()


@pytest.mark.parametrize("gpus", [1, 8])
def test_gpus_that_are_planned(wish: Wish, gpus: int) -> None:
    recipe, lines = made(changed(wish, gpus=gpus, output=Path("planned.yaml")))
    assert recipe.sample is not None
    assert recipe.train.parallel.ranks == recipe.sample.workers == gpus
    assert (recipe.name, recipe.train.dtype, recipe.iterations) == ("planned", "bfloat16", 3)
    assert "  stepkto slurm submit planned.yaml --dry-run" in lines


TEXT = "Ann has 2 + 3 = 5 coins.\nBob has 5 * 2 = 10 coins.\nThe answer is 10."


def pilot(lengths: tuple[int, ...], ended: int) -> Callable[..., Pilot]:
    return lambda model, problems, prompt, settings: Pilot(
        problems=tuple(problems[: len(lengths)]), texts=(TEXT,) * len(lengths), tokens=lengths,
        finished=lengths[:ended], right=1, limit=settings.max_tokens, speed=100,
    )  # fmt: skip


def test_samples_decide_limits_steps_and_sizes(wish: Wish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "sampler_here", lambda *_: Sampler(sampling_keys("vllm", 64, "auto"), ""))
    monkeypatch.setattr(make, "sample_some", pilot((40, 30, 20, 30), 4))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    recipe, lines = made(changed(wish, samples=4))
    assert recipe.sample is not None
    assert recipe.judge is not None
    assert (recipe.sample.max_tokens, recipe.judge.split) == (128, "line")  # twice 40, in units of 64
    assert recipe.problems.per_iteration == 36  # 1,200 s at 100 tokens/s would be 500 problems: all there are
    assert any("it labelled 8 of 12 sampled steps, 0 of them wrong" in line for line in lines)
    assert "  1 of 4 sampled answers are right" in lines


@pytest.mark.parametrize(
    ("tokens", "available", "expected"),
    [
        ((250, 250), 500, (64, 13)),  # 0.4 solutions/s: 900 s are 72 problems of 5
        ((250, 250), 40, (40, 8)),
        ((2500, 2500), 500, (32, 67)),  # the fewest, whatever they take
        ((10, 10), 500, (200, 2)),
    ],
)
def test_an_evaluation_on_processors_is_sized_by_the_measured_speed(
    monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, ...], available: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    measured = Pilot(problems=(), texts=("", ""), tokens=tokens, finished=tokens, right=0, limit=4096, speed=100)
    assert draft._problems_in(900, measured, 5, (32, 200), available) == expected


def test_solutions_that_do_not_end_are_said(wish: Wish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "sampler_here", lambda *_: Sampler(sampling_keys("vllm", 64, "auto"), ""))
    monkeypatch.setattr(make, "sample_some", pilot((40, 150, 150, 150), 1))
    _, lines = made(changed(wish, samples=4))
    assert any("3 of 4 sampled solutions did not end within" in line for line in lines)


def test_problems_are_never_overwritten(wish: Wish, tmp_path: Path) -> None:
    inside = tmp_path / "math_problems" / "train.jsonl"
    inside.parent.mkdir()
    inside.write_bytes(wish.problems[0].read_bytes())
    for problems, output in ((inside, "math.yaml"), (inside.parent, "math.yaml"), (Path("x.yaml"), "x.yaml")):
        with pytest.raises(UserError, match=r"would be overwritten by .*; name another --output"):
            make_recipe(changed(wish, problems=[problems], output=Path(output), force=True))
    assert inside.read_bytes() == wish.problems[0].read_bytes()


@pytest.mark.parametrize("name", ["réseau.yaml", "two words.yaml", "recipe", "recipe.txt"])
def test_the_name_of_a_recipe_is_checked_first(wish: Wish, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"--output {name}: expected a name of letters, digits, .* that ends in \.yaml"
    ):
        make_recipe(changed(wish, model="/nowhere", output=Path(name)))


def test_files_without_a_split_in_their_name_are_named(
    wish: Wish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = wish.problems[0].read_text().splitlines(keepends=True)
    (folder / "chains_train.jsonl").write_text("".join(lines[:20]))
    (folder / "further.jsonl").write_text("".join(lines[20:40]))
    made(changed(wish, problems=[folder], output=Path("mixed.yaml")))
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out, as their names tell no split: {folder}/further.jsonl" in said


def test_an_existing_recipe_is_kept(wish: Wish) -> None:
    path = Path("mini_cpu_m0_chains.yaml")
    path.write_text("mine")
    with pytest.raises(UserError, match=r"already exists; name another recipe with --output, or pass --force"):
        make_recipe(wish)
    assert path.read_text() == "mine"
    recipe, _ = made(changed(wish, force=True))
    assert recipe.name == "mini_cpu_m0_chains"


def test_an_interrupt_leaves_nothing(wish: Wish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make, "load_recipe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_recipe(wish)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["chains.jsonl"]


def test_a_split_that_measures_does_not_train(wish: Wish, tmp_path: Path) -> None:
    """A folder with files without a split, one of tests, and a CSV; ``--test`` takes the tests of a folder alone."""
    rows = Path("chains.jsonl").read_text().splitlines()[:40]
    for folder, files in (
        ("mix", {"more.jsonl": rows[:20], "test.jsonl": rows[20:28]}),
        ("full", {"train.jsonl": rows[:20], "test.jsonl": rows[30:]}),
    ):
        Path(folder).mkdir()
        for name, lines in files.items():
            Path(folder, name).write_text("\n".join(lines) + "\n")
    table = json.loads(rows[29])
    with Path("mix/table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], [table["question"], table["answer"]]])
    for tests, expected in (((), rows[20:28]), ([Path("full")], rows[30:])):
        make_recipe(changed(wish, problems=[Path("mix")], tests=tests, force=True))
        written = {
            split: {
                problem.problem for problem in read_records(Path(f"mini_cpu_m0_mix_problems/{split}.jsonl"), Problem)
            }
            for split in ("train", "test")
        }
        asked = [{json.loads(row)["question"].strip() for row in part} for part in (rows[:20], expected)]
        assert written["test"] == asked[1]
        assert written["train"] == asked[0] | {table["question"].strip()}
    with pytest.raises(UserError, match="holds test problems alone; name those that train"):
        Path("full/train.jsonl").unlink()
        make_recipe(changed(wish, problems=[Path("full")], force=True))


def test_several_sets_to_measure_on(wish: Wish, tmp_path: Path) -> None:
    """Each has a file of its own, without which the run's tables could not tell them apart; none of them trains."""
    rows = Path("chains.jsonl").read_text().splitlines()[:40]
    sets = {"easy": rows[:6], "hard": rows[6:16]}
    for name, lines in sets.items():
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n{broken\n")
    make_recipe(wish)
    tests = [Path("easy.jsonl"), Path("hard.jsonl")]
    recipe, lines = made(changed(wish, tests=tests, force=True))
    folder = tmp_path / "mini_cpu_m0_chains_problems"
    assert not (folder / "test.jsonl").exists()  # of the recipe that was replaced
    assert [Path(file).relative_to(folder) for file in recipe.problems.test] == [
        Path("test/easy.jsonl"), Path("test/hard.jsonl"),
    ]  # fmt: skip
    for name, asked in sets.items():
        written = [problem.problem for problem in read_records(folder / "test" / f"{name}.jsonl", Problem)]
        assert written == [json.loads(row)["question"].strip() for row in asked]
    assert len(list(read_records(folder / "train.jsonl", Problem))) == 24
    for bad in ("easy.jsonl:7: broken JSON", "hard.jsonl:11: broken JSON"):
        assert bad in "\n".join(lines)
    assert recipe.evaluate is not None
    assert recipe.evaluate.num_problems == 6  # of each: the smaller set has no more
    text = Path("mini_cpu_m0_chains.yaml").read_text()
    assert "# 6 and 10 problems, from easy.jsonl and hard.jsonl" in text
    assert "of each file; pass@1 of all to within 29 points" in text  # 100 / sqrt(12)
    planned, _ = made(changed(wish, tests=tests, gpus=1, output=Path("planned.yaml")))
    assert planned.evaluate is not None
    assert planned.evaluate.num_problems is None


def test_a_held_out_problem_does_not_train_in_other_letters(wish: Wish, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own check takes both for one problem, and would refuse the recipe."""
    monkeypatch.setattr(make, "problem_check", lambda *_: lambda problem: problem)  # the tokenizer knows no capitals
    rows = [json.loads(row) for row in Path("chains.jsonl").read_text().splitlines()[:40]]
    capitals = [{**row, "question": row["question"].upper()} for row in rows]
    Path("capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *capitals]))
    recipe, _ = made(changed(wish, problems=[Path("capitals.jsonl")], output=Path("capitals.yaml")))
    train, test = (
        len(list(read_records(Path(f"capitals_problems/{name}.jsonl"), Problem))) for name in ("train", "test")
    )
    assert test == 8
    assert 64 <= train < 72, "each held-out problem's twin is left out, unless it is held out itself"
    assert check_training_problems(recipe.problems, allow=False, skip_bad=False) == {}


def test_several_files_to_train_on(wish: Wish, tmp_path: Path) -> None:
    rows = Path("chains.jsonl").read_text().splitlines(keepends=True)
    Path("more").mkdir()
    for name, part in (("first", rows[:20]), ("more/train", rows[20:30]), ("more/other", rows[30:40])):
        Path(f"{name}.jsonl").write_text("".join(part))
    make_recipe(changed(wish, problems=[Path("first.jsonl"), Path("more"), Path("more/other.jsonl")]))
    folder = tmp_path / "mini_cpu_m0_first_problems"
    read = [list(read_records(folder / f"{name}.jsonl", Problem)) for name in ("train", "test")]
    assert {problem.problem for part in read for problem in part} == {
        json.loads(row)["question"].strip() for row in rows[:40]
    }


def test_a_folder_of_tests_never_drops_a_file_without_a_word(wish: Wish, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Path("chains.jsonl").read_text().splitlines(keepends=True)
    for folder in ("sets", "mixed"):
        Path(folder).mkdir()
    for name, part in (
        ("sets/gsm8k_test", rows[:3]), ("sets/svamp", rows[3:8]), ("mixed/other", rows[:4]), ("mixed/train", rows[4:9]),
    ):  # fmt: skip
        Path(f"{name}.jsonl").write_text("".join(part))
    for folder, number, said in (
        ("sets", 3, "--test sets: took sets/gsm8k_test.jsonl; left out sets/svamp.jsonl: name each data set with"),
        ("mixed", 4, "--test mixed: took mixed/other.jsonl; left out mixed/train.jsonl: name each"),
    ):
        recipe, _ = made(changed(wish, tests=[Path(folder)], force=True))
        assert len(list(read_records(recipe.problems.test[0], Problem))) == number
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_name_that_looks_like_a_variable(wish: Wish) -> None:
    for name, part in (("a${HOME}", slice(0, 3)), ("b", slice(3, 6))):
        Path(f"{name}.jsonl").write_text("\n".join(Path("chains.jsonl").read_text().splitlines()[part]) + "\n")
    recipe, _ = made(changed(wish, tests=[Path("a${HOME}.jsonl"), Path("b.jsonl")]))
    assert [path.name for path in recipe.problems.test] == ["a${HOME}.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "nowhere"}, "nowhere: expected a Hugging Face folder .* found no such folder"),
        ({"model": "org/name"}, "to download it, write hub:org/name"),
        ({"model": "."}, "found no config.json in it"),
        ({"problems": [Path("none.jsonl")]}, "none.jsonl: expected a file or folder of problems, found none"),
        ({"problems": [Path("other.jsonl")]}, "other.jsonl:1: has words that the model's tokenizer does not know"),
        ({"tests": [Path("chains.jsonl")]}, "all its problems are test problems"),
        ({"tests": [Path("a/x.jsonl"), Path("b/x.jsonl")]}, "--test: a/x.jsonl and b/x.jsonl would both be x in"),
    ],
)  # fmt: skip
def test_refusals(wish: Wish, values: dict[str, object], message: str) -> None:
    Path("other.jsonl").write_text('{"problem": "Integrate the tangent.", "answer": "0"}\n')
    with pytest.raises(UserError, match=message):
        make_recipe(changed(wish, **values))
    assert not list(Path().glob("*.yaml"))


def test_the_judge_that_is_reachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def served(_: object) -> list[str]:
        return ["judge-70b", "other"]

    monkeypatch.delenv("JUDGE_KEY", raising=False)
    monkeypatch.setenv("STEPKTO_MODELS", str(tmp_path))
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/v1")  # the port that answers nobody
    found = reachable_judge(8)
    assert found.process == "equations"
    assert "$JUDGE_URL is set, but no server answers" in found.why
    (tmp_path / judges.PRM).mkdir()
    (tmp_path / judges.PRM / "config.json").touch()
    assert reachable_judge(0).process == "equations"
    process = reachable_judge(4).process
    assert isinstance(process, dict)
    assert (process["kind"], process["workers"]) == ("prm", 4)
    monkeypatch.setattr(judges, "served_models", served)
    process = reachable_judge(0).process
    assert process == {"kind": "llm", "base_url": "${JUDGE_URL}", "model": "judge-70b", "votes": 5}


def test_a_model_of_the_hub_is_named_by_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    from megatron_stepkto.checkpoints.hub import fetch_model

    asked: list[object] = []

    class Api:
        def model_info(self, name: str, revision: str | None) -> object:
            asked.append((name, revision))
            return type("Info", (), {"sha": "0123456789abcdef"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k["revision"])))
    folder, origin = fetch_model("hub:org/small@main", tmp_path)
    assert (folder.name, origin) == ("small@0123456789ab", "hub:org/small@0123456789abcdef")
    assert asked == [("org/small", "main"), (("org/small",), "0123456789abcdef")]
    with pytest.raises(UserError, match="expected hub:NAME or hub:NAME@REVISION"):
        fetch_model("hub:a b", tmp_path)


def test_reasons_stand_beside_keys_or_above_them() -> None:
    keys = [Key("a", 1e-6, "why"), Key("b", [Key("c", "x: y", "w" * 90)]), Key("d", {"e": True, "f": "no"})]
    assert yaml_lines(keys) == [
        f"{'a: 1.0e-6':<38}# why",
        "b:",
        f"  # {'w' * 90}",
        '  c: "x: y"',
        'd: {e: true, f: "no"}',
    ]
