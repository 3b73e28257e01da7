"""Every method by name: what a recipe may ask for, what a loss must return, and the table of docs/methods.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.methods.metrics import UPDATE_SUMS, add_up, check_parts, metrics_of, own_sums
from megatron_stepkto.methods.registry import METHODS, check_suits, load_recipe, method_of
from megatron_stepkto.recipe.keys import Dataset, Loss


def load(repository: Path, *overrides: str) -> Any:
    return load_recipe(repository / "recipes" / "mini_cpu.yaml", list(overrides))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_accepted(method: str, repository: Path) -> None:
    assert load(repository, f"train.method={method}").train.method == method


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.method=step_kt"], "--set train.method=step_kt: train.method: unknown method 'step_kt'; did you mean "
         "step_kto?"),
        (["train.method=ppo"], "unknown method 'ppo'; did you mean dpo?"),
        (["train.method=zzz"], "unknown method 'zzz'; known: step_kto, kto, dpo, irpo, rft, bco, apo_zero"),
        (["warm_up.training.method=rfd"], "--set warm_up.training.method=rfd: warm_up.training.method: unknown method "
         "'rfd'; did you mean rft?"),
        (["train.method=kto", "train.loss.outcome_weight=0"], "--set train.method=kto: train.method: kto with "
         "loss.outcome_weight = 0 has no term left, so nothing would train"),
        (["dataset.kl_pair_share=0"], "--set dataset.kl_pair_share=0: dataset.kl_pair_share is 0, but step_kto with "
         "train.loss.reference_point: mismatched needs KL pairs; raise it"),
        (["train.method=dpo", "sample.num_samples=1"], "--set sample.num_samples=1: sample.num_samples is 1, but dpo "
         "compares two solutions of a problem; raise it"),
        (["judge.process=none", "train.loss.outcome_weight=0"], "--set judge.process=none: judge.process labels no "
         "step and train.loss.outcome_weight is 0: nothing would be learned; choose a judge, or raise outcome_weight"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_method_that_does_not_suit_is_refused_at_load(overrides: list[str], said: str, repository: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load(repository, *overrides)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "rft"])
def test_a_warm_up_takes_no_method_that_learns_from_wrong_solutions(method: str, repository: Path) -> None:
    key = "warm_up.training.method"
    with pytest.raises(UserError) as caught:
        load(repository, f"{key}={method}")
    assert str(caught.value) == (
        f"--set {key}={method}: {key}: {method} learns from right against wrong solutions, and a warm-up has right "
        "ones alone; set it to rft, or leave it out"
    )


def test_a_warm_up_is_supervised_unless_told_otherwise(repository: Path, tmp_path: Path) -> None:
    text = (repository / "recipes" / "mini_cpu.yaml").read_text()
    assert text.count("    method: rft\n") == 1
    path = tmp_path / "r.yaml"
    path.write_text(text.replace("    method: rft\n", ""))
    recipe = load_recipe(path)
    assert recipe.warm_up is not None
    assert (recipe.warm_up.training.method, recipe.train.method) == ("rft", "step_kto")


def test_a_compared_method_must_suit_the_recipe_as_well(repository: Path) -> None:
    only_steps = load(repository, "train.loss.outcome_weight=0")
    with pytest.raises(UserError, match=r"^--compare kto: kto with loss\.outcome_weight = 0 has no term left"):
        check_suits(only_steps, "kto", "--compare kto")
    check_suits(only_steps, "bco", "--compare bco")
    without_pairs = load(repository, "train.method=rft", "dataset.kl_pair_share=0")
    with pytest.raises(UserError, match=r"dataset\.kl_pair_share is 0, but kto with .* needs KL pairs; raise it"):
        check_suits(without_pairs, "kto", "--method kto")


def test_an_unknown_method_names_its_line(tmp_path: Path, repository: Path) -> None:
    text = (repository / "recipes" / "mini_cpu.yaml").read_text().replace("  method: step_kto", "  method: bko")
    path = tmp_path / "r.yaml"
    path.write_text(text)
    line = text.splitlines().index("  method: bko") + 1
    with pytest.raises(UserError, match=re.escape(f"{path}:{line}: train.method: unknown method 'bko'; did you mean")):
        load_recipe(path)


@pytest.mark.parametrize("method", ["bco", "apo_zero", "dpo", "irpo", "rft"])
def test_methods_without_a_kl_term_need_no_kl_pairs(method: str, repository: Path) -> None:
    load(repository, f"train.method={method}", "dataset.kl_pair_share=0")


def test_commands_read_recipes_by_the_check_of_their_method(repository: Path) -> None:
    """The reader below the methods does not know them: no room but theirs calls it."""
    package = repository / "megatron_stepkto"
    callers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bread_recipe\(", path.read_text())
    }
    assert callers == {"recipe/file.py", "methods/registry.py"}


def row_of(method: Any) -> dict[str, Any]:
    sums = dict.fromkeys([*UPDATE_SUMS, *own_sums(method)], 1.0)
    return metrics_of(sums, sums, method, (1.0, 1.0))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_declarations(method: Any) -> None:
    assert method.loss_keys <= set(Loss.model_fields)
    assert method.dataset_keys <= set(Dataset.model_fields)
    common = set(row_of(METHODS["rft"]))  # which has no metric of its own
    assert common.isdisjoint(method.metrics)
    assert set(row_of(method)) == common | set(method.metrics)
    assert method_of(method.name) is method


def test_the_methods_are_listed_without_torch() -> None:
    code = (
        "import sys, megatron_stepkto.methods.registry; sys.exit(bool({'torch', 'megatron.core'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- parts of a loss -----------------------------------------------------------------------------------------


def test_parts_are_pooled_by_name() -> None:
    asides = [
        {"loss_dpo": torch.tensor(1.5), "pairs_right": torch.tensor(n), "units": torch.tensor(2.0)} for n in (1, 2)
    ]
    sums = add_up(METHODS["dpo"], asides)
    assert (sums["loss_dpo"], sums["pairs_right"], sums["units"], sums["entropy"]) == (3.0, 3.0, 4.0, 0.0)
    assert set(add_up(METHODS["dpo"], [])) == set(sums), "a rank without a micro-batch pools the same names"
    with pytest.raises(KeyError, match="loss_nll"):
        add_up(METHODS["dpo"], [{"loss_nll": torch.tensor(1.0)}])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["loss_dpo", "pairs_right", "loss_nll"], "method dpo: no metric reads the loss's part loss_nll;"),
        (["loss_dpo", "pairs_right", "tokens"], "method dpo: no metric reads the loss's part tokens;"),
        (["loss_dpo"], "method dpo: its metrics read pairs_right, which its loss does not return as a part"),
    ],
    ids=["pooled by no metric", "the name of a common sum", "missing"],
)
def test_parts_that_the_metrics_do_not_read_are_an_error(parts: list[str], said: str) -> None:
    check_parts(METHODS["dpo"], ["pairs_right", "loss_dpo"])
    with pytest.raises(ValueError, match=said):
        check_parts(METHODS["dpo"], parts)


# --- the table -----------------------------------------------------------------------------------------------


def test_the_table_of_methods_is_the_registry(repository: Path) -> None:
    lines = (repository / "docs" / "methods.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [name.strip("`") for name, *_ in cells] == list(METHODS)
    for name, paper, _, _, loss_keys, dataset_keys, metrics in cells:
        method = METHODS[name.strip("`")]
        assert paper == f"{method.title}, {method.source}"
        assert keys_of(loss_keys, Loss) == method.loss_keys
        assert keys_of(dataset_keys, Dataset) == method.dataset_keys
        assert quoted(metrics) == {*method.metrics, *(f"z_{level}" for level in method.reference_levels)}


def quoted(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def keys_of(cell: str, section: Any) -> set[str]:
    return set(section.model_fields) - quoted(cell) if cell.startswith("all but") else quoted(cell)
