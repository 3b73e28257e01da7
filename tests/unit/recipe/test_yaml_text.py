"""The text of a recipe: YAML that is broken, strict types, anchors, and what is written reads the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.yaml_text import read_yaml, write_yaml
from tests.unit.recipe.test_file import GOOD, changed, refusal, write


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = changed(tmp_path, "  max_tokens: 32", "  max_tokens: 32\n  num_samples: 8")
    message = refusal(path)
    assert message == f"{path}:9: key sample.num_samples is given twice; keep one"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\ntrain: {lr: 1\nseed: 2\n", 3),
        ("name: a\n  seed: 1\n", 2),
        ('name: a\nseed: "1\n', 3),
        ("name: a\n\tseed: 1\n", 2),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: not YAML: ")
    assert "\n" not in message


@pytest.mark.parametrize("text", ["name: a\x00b\n", "name: a\x07b\n"], ids=["null", "bell"])
def test_control_characters_are_one_line(tmp_path: Path, text: str) -> None:
    message = refusal(write(tmp_path, text))
    assert "not YAML" in message
    assert "\n" not in message


def test_a_recipe_that_holds_itself_is_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "evaluate: &again\n  split: *again\n")
    assert refusal(path).startswith(f"{path}:")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("- name: a\n", "list"),
        ("tiny\n", "str"),
        ("", "NoneType"),
        ("# nothing but a comment\n", "NoneType"),
    ],
)
def test_not_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    path = write(tmp_path, text)
    assert refusal(path) == f"{path}:1: expected a mapping of recipe keys, got {kind}"


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        assert refusal(path) == f"{path}: expected a recipe (a YAML file), found none; see recipes/"


@pytest.mark.parametrize(
    ("content", "line", "got"),
    [
        ("seed: 1\nname: é\n".encode("latin-1"), 2, "byte 0xe9"),
        (GOOD.encode("utf-16"), 1, "UTF-16"),
        (b"\xfe\xff" + GOOD.encode("utf-16-be"), 1, "UTF-16"),
    ],
)
def test_not_utf_8(tmp_path: Path, content: bytes, line: int, got: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert refusal(path) == f"{path}:{line}: expected text in UTF-8, got {got}; save the file as UTF-8"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("iterations", "true", "Input should be a valid integer, got True"),
        ("iterations", "'3'", "Input should be a valid integer, got '3'"),
        ("iterations", "1.0", "Input should be a valid integer, got 1.0"),
        ("iterations", "1.5", "Input should be a valid integer, got 1.5"),
        ("sample.temperature", "true", "Input should be a valid number, got True"),
        ("sample.temperature", "'1'", "Input should be a valid number, got '1'"),
        ("prompt.chat", "1", "Input should be a valid boolean, got 1"),
        ("prompt.chat", "yes", "Input should be a valid boolean, got 'yes'"),
        ("prompt.template", "[a]", "Input should be a valid string, got ['a']"),
        ("name", "12", "Input should be a valid string, got 12"),
        ("initial_model", "7", "initial_model: expected a path, got 7"),
        ("initial_model", "''", "initial_model: expected a path, got ''"),
        ("output", "[runs]", "output: expected a path, got ['runs']"),
        ("problems.apart_from", "a.jsonl", "Input should be a valid list, got 'a.jsonl'"),
        ("train.parallel.ranks", "true", "Input should be a valid integer, got True"),
        ("judge.workers", "true", "Input should be a valid integer, got True"),
        ("train", "[]", "Input should be"),
        ("prompt.system", "You are.", "prompt: system goes with chat: true"),
    ],
)
def test_types_are_strict(tmp_path: Path, key: str, value: str, said: str) -> None:
    message = refusal(write(tmp_path), [f"{key}={value}"])
    assert said in message
    assert "\n" not in message


def test_plain_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """YAML 1.1, PyYAML's, reads 1e-6 as a text, off as false, 010 as eight and a date as a date."""
    text = GOOD.replace("lr: 1.0e-4", "lr: 1e-6, schedule: cosine").replace("name: tiny", "name: 2024-02-30")
    recipe = read_recipe(write(tmp_path, text), ["train.transformer_engine=off", "seed=010", "sample.temperature=1"])
    assert (recipe.train.optimizer.lr, recipe.name, recipe.train.transformer_engine) == (1e-6, "2024-02-30", "off")
    assert (recipe.seed, recipe.sample.temperature) == (10, 1.0)  # type: ignore[union-attr]


DEEP = "[" * 3000 + "]" * 3000
TWICE_30_TIMES = "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}]\n" for n in range(1, 31))
MERGED_30_TIMES = "".join(f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}\n" for n in range(1, 31))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"seed: {DEEP}\n", "expected at most 50 levels, found more or an alias that holds itself"),
        ("seed: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n", "expected at most 50 levels"),
        ("".join("  " * n + "a:\n" for n in range(3000)), "expected at most 50 levels"),
        ("seed: &a {x: *a}\n", "expected at most 50 levels, found more or an alias that holds itself"),
        ("k0: &k0 [1]\n" + TWICE_30_TIMES, "expected at most 20000 keys and values, got more, aliases written out"),
        ("k0: &k0 {a: 1}\n" + MERGED_30_TIMES, "expected at most 20000 keys and values"),
        ("seed: !!int ''\n", "'' is not of type int"),
        ("seed: !!bool x\n", "'x' is not of type bool"),
        ("seed: !!timestamp x\n", "could not determine a constructor for the tag"),
        ("seed: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        (f"seed: {'9' * 6000}\n", "is not of type int"),
        ("? [a]\n: 1\n", "expected a text as key, got a list; quote it"),
        ("1: a\n", "expected a text as key, got '1'; quote it"),
        ("true: a\n", "expected a text as key, got 'true'; quote it"),
        ("seed: {<<: 3}\n", "expected a mapping or list of mappings for merging"),
        ("a: 1\n--- \nb: 2\n", "expected a single document"),
        ("seed: *nowhere\n", "undefined alias"),
    ],
)
def test_yaml_that_cannot_be_a_recipe_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}:")
    assert said in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_deep_values_of_overrides_are_one_line(tmp_path: Path) -> None:
    message = refusal(write(tmp_path), [f"seed={DEEP}"])
    assert "expected at most 50 levels" in message
    assert len(message) < 400
    assert "unknown key a" in refusal(write(tmp_path), [".".join(["a"] * 3000) + "=1"])


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = GOOD.replace("  optimizer: {lr: 1.0e-4}", "  optimizer: &o {lr: 1.0e-4, eps: 1e-9}") + (
        "warm_up:\n  architecture: {model_type: llama}\n  tokenizer: byte_level_bpe\n"
        "  training:\n    optimizer:\n      <<: *o\n      lr: 0.5\n    global_batch_size: 4\n"
    )
    recipe = read_recipe(write(tmp_path, text))
    assert recipe.warm_up is not None
    assert (recipe.warm_up.training.optimizer.lr, recipe.warm_up.training.optimizer.eps) == (0.5, 1e-9)
    assert recipe.train.optimizer.lr == 1e-4
    assert recipe.place("warm_up.training.optimizer.lr").endswith(":24")
    assert recipe.place("warm_up.training.optimizer.eps").endswith(":13")


def test_a_written_recipe_reads_the_same(tmp_path: Path) -> None:
    content = {"texts": ["1e5", "off", "yes", "010", "2024-01-01", "0o7", "1:30", "null", "", "a: b", "é\n\x85"],
               "others": [1e-7, 10**20, None, True, {"a": []}]}  # fmt: skip
    path = tmp_path / "written.yaml"
    with path.open("w", encoding="utf-8") as file:
        write_yaml(content, file)
    assert read_yaml(path.read_text(encoding="utf-8"))[0] == content
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == content


@pytest.mark.parametrize("other", ["*t", "{<<: *t}"], ids=["alias", "merge"])
def test_an_override_changes_one_use_of_a_shared_section(tmp_path: Path, other: str) -> None:
    shared = "&t\n  optimizer: {lr: 1.0e-4}\n  loss: {beta_step: 0.3}\n  global_batch_size: 8\n"
    start = GOOD.index("train:\n")
    text = f"{GOOD[:start]}train: {shared}warm_up: {{solutions: [a.jsonl], training: {other}}}\n"
    recipe = read_recipe(write(tmp_path, text), ["train.optimizer.lr=0.5", "train.loss.beta_step=2"])
    assert recipe.warm_up is not None
    one, two = recipe.train, recipe.warm_up.training
    assert (one.optimizer.lr, one.loss.beta_step) == (0.5, 2.0)
    assert (two.optimizer.lr, two.loss.beta_step) == (1e-4, 0.3)
