"""What a training tells while it runs: progress, rows of metrics, and notes with warnings for the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_stepkto.base.progress import ProgressFile
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.rows import HeldOutRow, UpdateRow
from megatron_stepkto.training.tracking import Tracker
from megatron_stepkto.training.watch import WINDOW, falling_below_zero


class Journal:
    """Every rank keeps the notes and what the watch reads, which checkpoints hold; one rank writes.

    Args:
        writes: whether this rank is the one.
        against_collapse: the method's keys that help when right solutions lose probability.
    """

    def __init__(self, job: Job, *, writes: bool, against_collapse: str) -> None:
        self._job, self._writes, self._against_collapse = job, writes, against_collapse
        self.notes: dict[str, Any] = {}
        self.right_history: list[float] = []  # log-ratios of right solutions in the latest updates, nats
        self._progress = ProgressFile(job.progress)
        self._tracker: Tracker | None = None

    def open(self, done: int) -> None:
        """Begin to write rows, after those of the ``done`` updates in the checkpoint that training resumes from."""
        if self._writes:
            settings = self._job.settings
            self._tracker = Tracker(
                self._job.directory, settings.log, done, self._job.identity, settings.model_dump(mode="json")
            )

    def close(self) -> None:
        if self._tracker:
            self._tracker.close()

    def report(self, done: int, total: int, note: str = "", unit: str = "", *, at_once: bool = False) -> None:
        if self._writes:
            self._progress.report(done, total, note, unit=unit, at_once=at_once)

    def append(self, row: UpdateRow | HeldOutRow) -> None:
        if self._tracker:
            self._tracker.log(row.model_dump(exclude_unset=True))

    def has_held_out(self, update: int) -> bool:
        """Whether an earlier attempt measured the held-out examples after this update; the writing rank alone knows."""
        return self._tracker is not None and self._tracker.measured == update

    def warn(self, message: str) -> None:
        self.notes.setdefault("warnings", []).append(message)

    def watch_collapse(self, update: int, right: float | None) -> None:
        """Warn once when right solutions are less likely than under the reference and still losing probability.

        Args:
            right: their mean log-ratio in this update, nats; None: the batch had none.
        """
        if right is None or "collapse" in self.notes:
            return
        self.right_history = [*self.right_history, right][-3 * WINDOW :]
        if (fell := falling_below_zero(self.right_history)) is not None:
            before, now = fell
            self.notes["collapse"] = {"update": update, "log_ratio_right": now}
            self.warn(
                f"update {update}: the log-ratio of right solutions is {now:.2f} nats and falling "
                f"(it was {before:.2f}): right answers lose probability too. Lower optimizer.lr or "
                f"{self._against_collapse}"
            )

    def restore(self, done: int, right_history: list[float], notes: Mapping[str, Any]) -> None:
        """Take over what a checkpoint of ``done`` updates holds. The notes of this attempt replace those of earlier
        ones, but for the warnings, which are kept."""
        self.right_history = right_history
        before, now = (each.get("acceleration") for each in (notes, self.notes))
        if before != now:
            self.warn(
                f"resumed after update {done} with other packages or on another kind of machine, which rounds "
                f"differently: {now}; before: {before}"
            )
        warnings = dict.fromkeys([*notes.get("warnings", []), *self.notes.get("warnings", [])])
        self.notes = {**notes, **self.notes}
        if warnings:
            self.notes["warnings"] = list(warnings)
