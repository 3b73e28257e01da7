"""What the training stage hands to its ranks: a file that both sides read."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from megatron_stepkto import recipe


class Job(BaseModel):
    """Paths and settings of one training run.

    initial: torch_dist checkpoint whose weights are trained (the model that sampled). reference: the one that
    the log-ratios are taken to; None: the initial one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: recipe.Training
    seed: int
    initial: Path
    reference: Path | None
    train_examples: Path
    held_out_examples: Path | None
    directory: Path
    fingerprint: str

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def notes(self) -> Path:
        """Facts that the ranks leave for the manifest: gap, padding, warnings."""
        return self.directory / "notes.json"

    @property
    def log_ratios(self) -> Path:
        return self.directory / "log_ratios.jsonl"

    @property
    def progress(self) -> Path:
        return self.directory / "progress.json"

    @property
    def references(self) -> Path:
        """Reference log-probs found so far."""
        return self.directory / "reference.safetensors"

    @property
    def final(self) -> Path:
        return self.directory / "final"


def finished_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(updates done, folder) of whole checkpoints, oldest first."""
    return sorted(
        (int(path.name.removeprefix("update_")), path)
        for path in directory.glob("update_*")
        if (path / "state.json").is_file()
    )
