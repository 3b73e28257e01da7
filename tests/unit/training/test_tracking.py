"""Metrics of an update by hand; where they are written, and that a resumed run writes each once."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.megatron.expert_load import load_metrics
from megatron_stepkto.methods.metrics import held_out_metrics_of, metrics_of
from megatron_stepkto.methods.registry import METHODS
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.rows import HeldOut, UpdateRow
from megatron_stepkto.training.tracking import Tracker, check_trackers

SUMS = {
    "loss": 6.0, "units": 4.0, "loss_outcome": 2.0, "loss_step": 4.0, "loss_dpo": 0.0, "loss_nll": 0.0,
    "log_ratio_right": 3.0, "num_right": 2.0, "log_ratio_wrong": -4.0, "num_wrong": 1.0,
    "log_ratio_right_steps": 5.0, "num_right_steps": 4.0, "log_ratio_wrong_steps": 0.0, "num_wrong_steps": 0.0,
    "signs_right": 2.0, "signs_right_steps": 3.0, "pairs_right": 0.0, "tokens": 300.0, "padding": 100.0,
    "entropy": 90.0, "num_entropies": 120.0,
}  # fmt: skip
KL = {"kl_outcome": -2.0, "kl_outcome_count": 4.0, "kl_step": 0.0, "kl_step_count": 0.0}


def test_metrics_by_hand() -> None:
    row = metrics_of(SUMS, KL, METHODS["step_kto"], (0.5, 2.0))
    assert (row["loss"], row["loss_outcome"], row["loss_step"]) == (1.5, 0.5, 1.0)
    assert (row["kl_outcome"], row["kl_step"], row["num_kl_pairs"]) == (-0.5, None, 4)
    assert (row["log_ratio_right"], row["log_ratio_wrong"], row["log_ratio_right_steps"]) == (1.5, -4.0, 1.25)
    assert (row["reward_right"], row["reward_wrong"], row["margin"]) == (0.75, -2.0, 2.75)
    assert (row["reward_right_steps"], row["reward_wrong_steps"], row["step_margin"]) == (2.5, None, None)
    assert (row["sign_accuracy"], row["sign_accuracy_steps"]) == (2 / 3, 0.75)
    assert not {"loss_dpo", "loss_nll", "pair_accuracy"} & set(row), "metrics of other methods"
    assert (row["num_units"], row["tokens"], row["padding_share"]) == (4, 300, 0.25)
    assert row["entropy"] == 0.75
    without = metrics_of(SUMS | {"entropy": 0.0, "num_entropies": 0.0}, KL, METHODS["step_kto"], (0.5, 2.0))
    assert without["entropy"] is None


def test_metrics_of_pairs() -> None:
    sums = {**SUMS, "loss_dpo": 5.0, "loss_nll": 1.0, "pairs_right": 3.0}
    row = metrics_of(sums, dict.fromkeys(KL, 0.0), METHODS["irpo"], (0.1, 0.1))
    assert (row["loss_dpo"], row["loss_nll"], row["pair_accuracy"]) == (1.25, 0.25, 0.75)
    assert row["kl_outcome"] is None
    assert not {"loss_outcome", "loss_step"} & set(row)


def test_what_is_read_again_is_written() -> None:
    """A metric that is renamed where it is made must be renamed where the report reads it."""
    made = metrics_of(SUMS, KL, METHODS["step_kto"], (0.5, 2.0))
    of_the_loop = {"update", "z_outcome", "z_step", "grad_norm"}
    of_experts = set(load_metrics(torch.ones(1, 2, dtype=torch.int64)))
    assert set(UpdateRow.model_fields) - of_the_loop <= set(made) | of_experts
    assert UpdateRow.model_validate({"update": 1, **made}).model_dump(exclude_unset=True) == {"update": 1, **made}
    held_out = held_out_metrics_of(SUMS)
    assert set(HeldOut.model_fields) <= set(held_out)
    assert HeldOut.model_validate(held_out).model_dump(exclude_unset=True) == held_out


def rows_on(board: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_resumed_run_has_each_row_once(tmp_path: Path) -> None:
    """Updates 1 to 3, of which a checkpoint holds 2; the second attempt computes update 3 again, with another loss."""

    def attempt(done: int, losses: dict[int, float], *, torn: bool = False) -> None:
        tracker = Tracker(tmp_path, recipe.Log(), done, "x", {})
        for update, loss in losses.items():
            tracker.log({"update": update, "num_updates": 3, "loss": loss, "kl_step": None})
        tracker.log({"update": max(losses), "held_out": {"margin": loss / 2}})
        tracker.close()
        if torn:
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"update": 3, "lo')

    attempt(0, {1: 7.0, 2: 8.0})  # killed before its first checkpoint
    attempt(0, {1: 0.5, 2: 0.25, 3: 9.0}, torn=True)
    attempt(2, {3: 0.125})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["update"], row.get("loss")) for row in rows] == [(1, 0.5), (2, 0.25), (3, 0.125), (3, None)]
    board = rows_on(tmp_path / "tensorboard")
    assert board == {"train/loss": [(1, 0.5), (2, 0.25), (3, 0.125)], "held_out/margin": [(3, 0.0625)]}


def test_a_first_attempt_forgets_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "loss": 4}\n')
    Tracker(tmp_path, recipe.Log(tensorboard=False), 0, "x", {}).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "tensorboard").exists()


def test_an_absent_tracker_is_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else present(name, *a))
    check_trackers(recipe.Log())
    with pytest.raises(
        UserError, match=r"train\.log\.wandb is set, but the package wandb is not installed; `pip install"
    ):
        check_trackers(recipe.Log(wandb="mine"))


def test_wandb_without_a_key_is_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ask for one at a terminal, and ranks have none."""
    import sys
    import types

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.api = types.SimpleNamespace(api_key=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match=r"Weights & Biases has no key here; run `wandb login`"):
        check_trackers(recipe.Log(wandb="mine"))
    fake.api.api_key = "x"  # type: ignore[attr-defined]
    check_trackers(recipe.Log(wandb="mine"))
    fake.api.api_key = None  # type: ignore[attr-defined]
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(recipe.Log(wandb="mine"))


def test_wandb_gets_the_run_and_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a module with the three calls that are made of it; wandb itself is no dependency."""
    import sys
    import types

    calls: list[Any] = []
    run = types.SimpleNamespace(log=lambda values: calls.append(values), finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(init=lambda **keys: calls.append(keys) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    tracker = Tracker(tmp_path, recipe.Log(wandb="mine", tensorboard=False), 0, "id", {"lr": 1})
    tracker.log({"update": 4, "loss": 0.5, "held_out": {"margin": 2}})
    tracker.close()
    assert (calls[0]["project"], calls[0]["id"], calls[0]["resume"]) == ("mine", "id", "allow")
    assert calls[1:] == [{"train/loss": 0.5, "held_out/margin": 2.0, "update": 4}, "finish"]
