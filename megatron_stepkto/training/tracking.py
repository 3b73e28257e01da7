"""Where a training's numbers go: JSON lines always, TensorBoard and Weights & Biases as the recipe says."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer
from megatron_stepkto.base.storage import writing
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import METRICS

AXES = ("update", "num_updates")


def check_trackers(log: recipe.Log) -> None:
    """Raises UserError when the recipe asks for a tracker that is not installed, or has no login."""
    for key, wanted, package in (
        ("tensorboard", log.tensorboard, "tensorboard"),
        ("wandb", log.wandb is not None, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.log.{key} is set, but the package {package} is not installed; `pip install {package}`, "
                f"or remove the key{' (set it to false)' if key == 'tensorboard' else ''}"
            )

    if log.wandb is not None and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        # the identity token of a cluster takes the place of a key; a release without this attribute says nothing
        key = getattr(getattr(wandb, "api", None), "api_key", "")
        if key is None and "WANDB_IDENTITY_TOKEN_FILE" not in os.environ:
            raise UserError(
                "train.log.wandb is set, but Weights & Biases has no key here; run `wandb login`, set WANDB_API_KEY, "
                "or set WANDB_MODE=offline"
            )


class Tracker:
    """Writes the rows, on rank 0 alone. ``metrics.jsonl`` holds each row once, however often a run was interrupted.

    Args:
        done: updates in the checkpoint that the run resumes from; rows of later updates are dropped.
        identity: the same for every attempt at one training.

    measured: the last update after which held-out examples were measured; -1: none.
    """

    def __init__(self, directory: Path, log: recipe.Log, done: int, identity: str, settings: Mapping[str, Any]) -> None:
        self._file = directory / METRICS
        lines = self._file.read_text(encoding="utf-8").splitlines() if done and self._file.exists() else []
        kept = [line for line in lines if _update_of(line) <= done]
        self.measured = max((_update_of(line) for line in kept if "held_out" in json.loads(line)), default=-1)
        with atomic_writer(self._file) as file:
            file.writelines(line + "\n" for line in kept)
        self._board: Any = None
        self._run: Any = None
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # what an attempt wrote after its last checkpoint is hidden
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1 if done else 0)
        if log.wandb:
            import wandb

            name = "/".join(directory.parts[-3:])
            self._run = wandb.init(
                project=log.wandb, name=name, id=identity, resume="allow", dir=directory, config=dict(settings)
            )

    def log(self, row: Mapping[str, Any]) -> None:
        """A row with its ``update``; a group of values (``held_out``) becomes names with its own prefix."""
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # as durable as the checkpoint that follows: a resumed run writes no row again
        values = dict(_flat(row))
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, row["update"])
            self._board.flush()
        if self._run:
            self._run.log({**values, "update": row["update"]})

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._run:
            self._run.finish()


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a row by name; those that are null in it (nothing of that kind in the batch) are left out."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        elif value is not None and name not in AXES:
            yield (prefix or "train/") + name, float(value)


def _update_of(line: str) -> int:
    """Update of a metrics row; a row cut short by a crash counts as never written."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError):
        return 1 << 62
