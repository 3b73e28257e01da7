"""Recipes: what is read, and what a faulty one is told (file:line, what was expected, what to do)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.file import read_recipe, recipe_content
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.recipe.yaml_text import write_yaml
from tests.conftest import REPOSITORY

# The line numbers in the tests below count from this text: `name` is line 1.
GOOD = """\
name: tiny
initial_model: models/m0
problems:
  source: chained_arithmetic
  per_iteration: 16
sample:
  num_samples: 4
  max_tokens: 32
judge:
  split: line
  process: chained_arithmetic
train:
  optimizer: {lr: 1.0e-4}
  global_batch_size: 8
  parallel:
    ranks: 2
    tensor: 2
"""
SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_recipe(path, overrides)
    return str(caught.value)


def changed(folder: Path, old: str, new: str) -> Path:
    assert GOOD.count(old) == 1
    return write(folder, GOOD.replace(old, new))


def test_a_good_recipe_and_its_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path))
    assert (recipe.name, recipe.seed, recipe.iterations, recipe.train.method) == ("tiny", 0, 1, "step_kto")
    assert (recipe.sample.num_samples, recipe.sample.max_tokens) == (4, 32)  # type: ignore[union-attr]
    assert recipe.train.optimizer.lr == 1e-4
    assert recipe.run_dir == Path("runs/tiny")


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_recipe_parses(path: Path) -> None:
    assert read_recipe(path).name == path.stem


def test_there_are_shipped_recipes() -> None:
    assert "mini_cpu" in [path.stem for path in SHIPPED]


# --- faults of keys and values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("  num_samples: 4", "  num_sample: 4", 7, "unknown key sample.num_sample; did you mean num_samples?"),
        (
            "  num_samples: 4",
            "  num_samples: 0",
            7,
            "sample.num_samples: Input should be greater than or equal to 1, got 0",
        ),
        (
            "  num_samples: 4",
            "  num_samples: four",
            7,
            "sample.num_samples: Input should be a valid integer, got 'four'",
        ),
        (
            "  split: line",
            "  split: page",
            10,
            "judge.split: Input should be 'line', 'blank_line', 'step_number', 'step_heading', 'sentence' or 'tag'",
        ),
        ("  split: line\n", "", 9, "key judge.split is missing; add it"),
        ("  max_tokens: 32\n", "", 6, "key sample.max_tokens is missing; add it"),
        (
            "  optimizer: {lr: 1.0e-4}",
            "  optimizer: {lr: -1}",
            13,
            "train.optimizer.lr: Input should be greater than 0, got -1",
        ),
        ("name: tiny", "name: tiny/../x", 1, "name: String should match pattern"),
        ("  per_iteration: 16\n", "", 3, "source: chained_arithmetic needs the key per_iteration"),
        (
            "initial_model: models/m0\n",
            "",
            1,
            "give initial_model (a Hugging Face folder) or warm_up (which makes one)",
        ),
        (
            "  optimizer: {lr: 1.0e-4}",
            "  optimizer: {lr: 1.0e-4}\n  lora: {dropout: 0.1}",
            14,
            "train.lora: dropout must be 0, got 0.1: with dropout the log-ratios would not start at 0",
        ),
        (
            "  optimizer: {lr: 1.0e-4}",
            "  optimizer: {lr: 1.0e-4}\n  lora: {targets: []}",
            14,
            "train.lora: targets is empty: nothing would train",
        ),
        ("    tensor: 2", "    tenser: 2", 17, "unknown key train.parallel.tenser; did you mean tensor?"),
    ],
)
def test_one_fault_is_one_line_with_its_place(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    path = changed(tmp_path, old, new)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert said in message
    assert "\n" not in message


def test_a_key_like_no_other_gets_the_list_of_keys(tmp_path: Path) -> None:
    path = changed(tmp_path, "    ranks: 2", "    ranks: 2\n    zzz: 1")
    assert refusal(path) == (
        f"{path}:17: unknown key train.parallel.zzz; allowed here: context, distributed_optimizer, expert, "
        "expert_tensor, overlap, pipeline, ranks, sequence, tensor, virtual_pipeline"
    )


def test_unknown_key_inside_a_list(tmp_path: Path) -> None:
    text = """\
name: tiny
initial_model: m0
problems:
  source: imports
  imports:
    - {format: prm800k, path: a.jsonl}
    - format: processbench
      pth: b.jsonl
train: {optimizer: {lr: 0.1}, global_batch_size: 1}
"""
    path = write(tmp_path, text)
    assert sorted(refusal(path).split("\n")) == [
        f"{path}:7: key problems.imports.1.path is missing; add it",
        f"{path}:8: unknown key problems.imports.1.pth; did you mean path?",
    ]


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("num_samples: 4", "num_samples: 0").replace("split: line", "splt: line"))
    assert sorted(refusal(path).split("\n")) == [
        f"{path}:10: unknown key judge.splt; did you mean split?",
        f"{path}:7: sample.num_samples: Input should be greater than or equal to 1, got 0",
        f"{path}:9: key judge.split is missing; add it",
    ]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("ranks: 3\n    tensor: 2", "ranks (3) must be a multiple of tensor x pipeline x context (2 x 1 x 1)"),
        (
            "ranks: 4\n    tensor: 2\n    pipeline: 4",
            "ranks (4) must be a multiple of tensor x pipeline x context (2 x 4 x 1)",
        ),
        ("ranks: 2\n    tensor: 2\n    virtual_pipeline: 2", "virtual_pipeline needs pipeline >= 2"),
        ("ranks: 2\n    tensor: 1\n    sequence: true", "sequence parallelism needs tensor >= 2"),
    ],
)
def test_a_layout_that_cannot_be(tmp_path: Path, layout: str, said: str) -> None:
    path = changed(tmp_path, "ranks: 2\n    tensor: 2", layout)
    assert refusal(path) == f"{path}:15: train.parallel: {said}"


@pytest.mark.parametrize(
    ("problems", "extra", "said"),
    [
        ("{source: files}", "", "source: files needs the key train"),
        ("{source: imports}", "", "source: imports needs the key imports"),
        (
            "{source: files, train: a.jsonl, imports: [{format: trl_kto, path: b}]}",
            "",
            "imports is read with source: im",
        ),
        (
            "{source: chained_arithmetic, per_iteration: 4, test: a.jsonl}",
            "",
            "train, dev and test are read with source",
        ),
        ("{source: files, train: a.jsonl}", "evaluate: {num_problems: 5}\n", "problems.test must name a file"),
        ("{source: imports, imports: [{format: a, path: b}]}", "iterations: 2\n", "takes one iteration"),
    ],
)
def test_sections_that_do_not_go_together(tmp_path: Path, problems: str, extra: str, said: str) -> None:
    path = changed(
        tmp_path, "problems:\n  source: chained_arithmetic\n  per_iteration: 16\n", f"problems: {problems}\n{extra}"
    )
    assert said in refusal(path)


def test_sampled_problems_need_a_judge(tmp_path: Path) -> None:
    path = changed(tmp_path, "judge:\n  split: line\n  process: chained_arithmetic\n", "")
    assert "problems.source: chained_arithmetic needs the sections sample and judge" in refusal(path)


def test_a_loss_that_is_always_zero(tmp_path: Path) -> None:
    said = refusal(write(tmp_path), ["train.loss.outcome_weight=0", "train.loss.step_weight=0"])
    assert "nothing would train" in said


def test_a_micro_batch_holds_the_longest_example_that_trains(tmp_path: Path) -> None:
    """Longer ones than dataset.max_tokens are dropped, so a long response is no reason to refuse."""
    path = write(tmp_path)
    long = ["sample.max_tokens=8192", "train.micro_batch_tokens=4096"]
    said = "sample.max_tokens (8192) must be smaller than train.micro_batch_tokens (4096): a prompt and its response"
    assert said in refusal(path, long)
    assert read_recipe(path, [*long, "dataset.max_tokens=4096"]).dataset.max_tokens == 4096
    said = "dataset.max_tokens (4097) must not be larger than train.micro_batch_tokens (4096): a prompt and its"
    assert said in refusal(path, [*long, "dataset.max_tokens=4097"])
    assert read_recipe(path, ["dataset.max_tokens=8192"]), "no example is that long where responses have 32 tokens"


# --- --set ---------------------------------------------------------------------------------------------------


def test_overrides_keep_yaml_types_and_win_in_order(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path),
        [
            "seed=7",
            "sample.num_samples=2",
            "sample.num_samples=16",
            "train.optimizer.lr=2.5e-3",
            "train.method=kto",
            "problems.per_iteration=null",
            "problems.source=files",
            "problems.train=a=b.jsonl",
        ],
    )
    assert (recipe.seed, recipe.sample.num_samples, recipe.train.method) == (7, 16, "kto")  # type: ignore[union-attr]
    assert recipe.train.optimizer.lr == 2.5e-3
    assert recipe.problems.per_iteration is None
    assert recipe.problems.train == tmp_path / "a=b.jsonl"


def test_an_override_can_begin_a_section(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path), ["train.loss.beta_step=3", "evaluate.num_problems=5", "evaluate.k=2"])
    assert recipe.train.loss.beta_step == 3.0
    assert recipe.train.loss.beta_outcome == 0.1
    assert recipe.evaluate is not None
    assert (recipe.evaluate.num_problems, recipe.evaluate.k, recipe.evaluate.split) == (5, 2, "test")


def test_an_override_can_begin_a_section_that_the_file_leaves_out_with_null(tmp_path: Path) -> None:
    path = changed(tmp_path, "  optimizer: {lr: 1.0e-4}", "  optimizer: {lr: 1.0e-4}\n  lora: null\n  fp8: ~")
    recipe = read_recipe(path, ["train.lora.rank=8"])
    assert recipe.train.lora is not None
    assert (recipe.train.lora.rank, recipe.train.fp8) == (8, None)
    said = refusal(path, ["train.lora.dropout=0.1"])
    assert said.startswith("--set train.lora.dropout=0.1: train.lora: dropout must be 0")
    said = refusal(path, ["seed=null", "seed.x=1"])
    assert said == "--set seed.x=1: seed: Input should be a valid integer"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("seed", "--set seed: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("seed.x=1", "--set seed.x=1: seed is a value, not a section"),
        ("name.first.second=1", "--set name.first.second=1: name is a value, not a section"),
        ("seed=[1", "--set seed=[1: not YAML: expected ',' or ']', but got '<stream end>'; quote the value"),
        ("seed=2024-02-30", "seed: Input should be a valid integer, got '2024-02-30'"),
        ("sample.num_sampels=4", "unknown key sample.num_sampels; did you mean num_samples?"),
        ("sample.num_samples=0", "sample.num_samples: Input should be greater than or equal to 1, got 0"),
        ("trian.optimizer.lr=1", "unknown key trian; did you mean train?"),
        ("train.loss.beta_step=.inf", "train.loss.beta_step: Input should be a finite number, got inf"),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, assignment: str, said: str) -> None:
    path = write(tmp_path, GOOD.replace("name: tiny", "name: tiny\nseed: 0"))
    message = refusal(path, [assignment])
    assert said in message
    assert "\n" not in message
    # the recipe's line is right: whoever looks there finds another value
    assert message.startswith(f"--set {assignment}: ")


# --- environment and paths -----------------------------------------------------------------------------------


def test_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPKTO_TEST_WORD", "word")
    monkeypatch.delenv("STEPKTO_TEST_ABSENT", raising=False)
    text = GOOD.replace(
        "problems:\n  source: chained_arithmetic\n  per_iteration: 16\n",
        """\
problems:
  source: files
  train: ${STEPKTO_TEST_WORD}/train.jsonl
  dev: ${STEPKTO_TEST_ABSENT:-other}/${STEPKTO_TEST_WORD}.jsonl
  test: ${STEPKTO_TEST_WORD:-unused}.jsonl
""",
    )
    problems = read_recipe(write(tmp_path, text)).problems
    assert problems.train == tmp_path / "word/train.jsonl"
    assert problems.dev == [tmp_path / "other/word.jsonl"]
    assert problems.test == [tmp_path / "word.jsonl"]


def test_a_variable_is_read_like_any_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number where the key stands unquoted, a text where it is quoted."""
    monkeypatch.setenv("STEPKTO_TEST_WORD", "7")
    assert read_recipe(changed(tmp_path, "num_samples: 4", "num_samples: ${STEPKTO_TEST_WORD}")).sample.num_samples == 7  # type: ignore[union-attr]
    assert read_recipe(changed(tmp_path, "name: tiny", 'name: "${STEPKTO_TEST_WORD}"')).name == "7"
    said = refusal(changed(tmp_path, "num_samples: 4", 'num_samples: "${STEPKTO_TEST_WORD}"'))
    assert said.endswith(":7: sample.num_samples: Input should be a valid integer, got '7'")


def test_a_variable_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPKTO_TEST_ABSENT", raising=False)
    path = changed(tmp_path, "models/m0", "${STEPKTO_TEST_ABSENT}/m0")
    assert refusal(path).startswith(f"{path}:2: environment variable STEPKTO_TEST_ABSENT is not set")
    monkeypatch.setenv("STEPKTO_TEST_ABSENT", "")  # for a shell, an empty variable is one that is not there
    assert refusal(path).startswith(f"{path}:2: environment variable STEPKTO_TEST_ABSENT is empty")
    path = changed(tmp_path, "models/m0", "${STEPKTO_TEST_ABSENT:-models/m0}")
    assert read_recipe(path).initial_model == tmp_path / "models/m0"
    assert read_recipe(changed(tmp_path, "models/m0", "${STEPKTO_TEST_ABSENT:-}m0")).initial_model == tmp_path / "m0"


def test_a_recipe_that_is_written_out_is_read_back_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A formula may look like a variable: $${ is the text ${ in a file, and so it is written."""
    monkeypatch.setenv("x", "expanded")
    template = 'prompt.template="{problem} ${x}$ and $${x}$"'  # --set is not expanded
    recipe = read_recipe(write(tmp_path), [template])
    assert recipe.prompt.template == "{problem} ${x}$ and $${x}$"
    copy = tmp_path / "copy.yaml"
    with copy.open("w") as file:
        write_yaml(recipe_content(recipe), file)
    assert read_recipe(copy).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("recompute={module: [mlp]}", "unknown key train.recompute.module; did you mean modules?"),
        ("recompute={modules: [foo]}", "train.recompute.modules.0: Input should be 'core_attn', 'layernorm', 'mlp' or"),
        ("recompute=3", "train.recompute: Input should be a valid boolean, got 3"),
        ("recompute={}", "train.recompute: expected one of modules, layers and every, got none"),
        ("lora={targets: 3}", "train.lora.targets: Input should be 'all', got 3"),
        ("lora={targets: [3]}", "train.lora.targets.0: Input should be a valid string, got 3"),
    ],
)
def test_a_value_of_several_forms_has_one_fault_and_no_name_of_a_form(tmp_path: Path, value: str, said: str) -> None:
    message = refusal(write(tmp_path), [f"train.{value}"])
    assert message.startswith(f"--set train.{value}: {said}")
    assert "\n" not in message


def test_paths_are_taken_from_the_recipe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any working directory, and made absolute: the resolved recipe in a run's folder names the same files."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "recipes"
    elsewhere.mkdir()
    folder.mkdir()
    monkeypatch.chdir(elsewhere)
    assert read_recipe(write(folder)).initial_model == folder / "models/m0"
    up = folder / "up.yaml"
    up.write_text(GOOD.replace("models/m0", "../models/./m0"))
    assert read_recipe(up).initial_model == tmp_path / "models/m0"
    up.write_text(GOOD.replace("models/m0", "/somewhere/m0"))
    assert read_recipe(up).initial_model == Path("/somewhere/m0")
    assert read_recipe(Path("../recipes/recipe.yaml")).initial_model == folder / "models/m0"


def test_a_recipe_cannot_be_changed_after_it_was_read(tmp_path: Path) -> None:
    recipe: Recipe = read_recipe(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ("equation", "judge.process: Input tag 'equation' found using 'kind' does not match any of the expected tags"),
        ("{kind: llm, model: m}", "key judge.process.base_url is missing; add it"),
        (
            "{kind: llm, model: m, base_url: 'http://x', treshold: 1}",
            "unknown key judge.process.treshold; did you mean threshold?",
        ),
        ("{kind: llm, model: m, base_url: 'http://x', votes: 3, temperature: 0}", "votes: 3 needs temperature > 0"),
        (
            "{kind: prm, model: m, convention: math_shepherd, base_url: 'http://x'}",
            "convention: math_shepherd reads logits of a language model: remove base_url",
        ),
        (
            "{kind: prm, model: m, convention: qwen_math_prm, threshold: 0.4, wrong_below: 0.5}",
            "wrong_below (0.5) must not be above threshold (0.4)",
        ),
        (
            "{kind: monte_carlo, sample: {max_tokens: 8, worker: 2}}",
            "unknown key judge.process.sample.worker; did you mean workers?",
        ),
    ],
)
def test_faults_of_a_process_judge(tmp_path: Path, process: str, said: str) -> None:
    message = refusal(changed(tmp_path, "process: chained_arithmetic", f"process: {process}"))
    assert said in message and "recipe.yaml:11" in message


def test_a_process_judge_in_short_and_in_full(tmp_path: Path) -> None:
    short = read_recipe(changed(tmp_path, "process: chained_arithmetic", "process: equations"))
    full = read_recipe(changed(tmp_path, "process: chained_arithmetic", "process: {kind: equations}"))
    assert short.judge == full.judge
