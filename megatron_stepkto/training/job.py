"""The file that the training stage hands to its ranks, and the folder that both read and write."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_stepkto.base.files import numbered, stable_hash
from megatron_stepkto.base.progress import PROGRESS
from megatron_stepkto.recipe import keys as recipe

# In the folder of a training, for those who read it without a job: rows per update; log-ratios per example; notes.
METRICS, LOG_RATIOS, NOTES = "metrics.jsonl", "log_ratios.jsonl", "notes.json"


class Gap(BaseModel):
    """Difference between the log-probs of sampler and trainer, nats per token."""

    mean: float
    max: float
    tokens: int


class Notes(BaseModel):
    """The part of ``notes.json`` that is read back."""

    warnings: list[str] = []
    gap: Gap | None = None


class State(BaseModel):
    """``state.json`` of a checkpoint: what a training resumes with, beside weights and optimizer.

    base: ``Job.base``: a checkpoint of adapters means nothing on another model.
    """

    base: str = ""
    batch_kl: dict[str, float]
    right_history: list[float]
    notes: dict[str, Any]


class Advice(BaseModel):
    """What to do where a number is not finite, in the terms of whoever runs the training."""

    without_records: str = "leave these records out"
    lower_rate: str = "lower optimizer.lr"


class Job(BaseModel):
    """Paths and settings of one training run.

    initial: torch_dist checkpoint whose weights are trained (the model that sampled). reference: the checkpoint of
    the reference model; None: the initial one. With ``settings.lora``, initial is the base, whose weights stay, and
    adapter the PEFT folder whose adapter is trained further; None: a new one, which changes nothing at first.
    base: hash of the model that initial was converted from. fingerprint: of the data and the model. identity: the same
    for every attempt at this training, and no other's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: recipe.Training
    seed: int
    initial: Path
    reference: Path | None
    adapter: Path | None = None
    base: str = ""
    train_examples: Path
    held_out_examples: Path | None
    directory: Path
    fingerprint: str
    identity: str = ""
    advice: Advice = Advice()

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.directory / METRICS

    @property
    def notes(self) -> Path:
        """Facts that the ranks leave for the manifest: gap, padding, warnings."""
        return self.directory / NOTES

    @property
    def log_ratios(self) -> Path:
        return self.directory / LOG_RATIOS

    @property
    def progress(self) -> Path:
        return self.directory / PROGRESS

    def references(self, documents: int) -> Path:
        """Reference log-probs found so far, of these ``documents`` (their digest) of the job's data and model."""
        return self.directory / f"reference-{stable_hash(self.fingerprint, documents):016x}.npy"

    @property
    def final(self) -> Path:
        return self.directory / "final"


def drop_checkpoint(directory: Path) -> None:
    """Remove it, state.json first: without that file a folder that a kill leaves half removed is not resumed from."""
    (directory / "state.json").unlink(missing_ok=True)
    shutil.rmtree(directory)


def half_checkpoints(directory: Path) -> list[Path]:
    """Folders that a kill left half written or half removed. Each may be as large as a whole checkpoint."""
    whole = {path for _, path in finished_checkpoints(directory)}
    return [*directory.glob(".update_*.partial"), *(set(directory.glob("update_*")) - whole)]


def finished_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(updates done, folder) of whole checkpoints, oldest first."""
    return sorted(
        (int(path.name.removeprefix("update_")), path)
        for path in numbered(directory, "update_")
        if (path / "state.json").is_file()
    )
