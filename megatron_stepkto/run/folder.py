"""The folder of a run: every path in it, and what decides each stage's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_stepkto.base.stage import Result, Stage, run_stage
from megatron_stepkto.recipe import keys as recipes

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Run:
    """A recipe being run with one method.

    ``base`` is the run's folder. A compared method lives in ``base/methods/<method>`` and shares the problems,
    M0, its evaluation and the first iteration's samples with the recipe's own method.
    """

    recipe: recipes.Recipe
    from_scratch: bool = False
    force: bool = False
    quarantine: Path | None = None
    compared: recipes.Method | None = None
    allow_overlap: bool = False
    finished: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def method(self) -> recipes.Method:
        return self.compared or self.recipe.train.method

    @property
    def base(self) -> Path:
        return self.recipe.run_dir

    @property
    def root(self) -> Path:
        return self.base / "methods" / self.compared if self.compared else self.base

    def iteration(self, t: int) -> Path:
        return self.root / f"iteration_{t}"

    def sampled_at(self, t: int) -> Path:
        """Where iteration t's problems, samples and judgements stand: all methods draw the first from M0."""
        return (self.base if t == 1 else self.root) / f"iteration_{t}"

    @property
    def makes_m0(self) -> bool:
        return self.from_scratch or self.recipe.initial_model is None

    def model(self, t: int) -> Path:
        """Hugging Face folder of M_t."""
        if t > 0:
            return self.iteration(t) / "convert" / "model"
        given = None if self.from_scratch else self.recipe.given_model()
        return given or self.base / "M0" / "convert" / "model"

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer of M0, and so of every M_t: a warm-up makes it before M0."""
        return self.base / "M0" / "tokenizer" / "model" if self.makes_m0 else self.model(0)

    def name(self, t: int) -> str:
        return f"M{t}"

    def evaluation(self, t: int) -> Path:
        return (self.base if t == 0 else self.root) / "evaluate" / self.name(t)

    @property
    def hashes(self) -> Path:
        """What ``stages.input_hash`` knows of large folders."""
        return self.base / ".hashes.json"

    def known(self, stage: Stage) -> Stage:
        return replace(stage, hashes=self.hashes)

    def run(
        self,
        stage: Stage,
        work: Callable[[], Result],
        together: Callable[[], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        manifest = run_stage(self.known(stage), work, force=self.force, together=together, check=check)
        self.finished.append((str(stage.directory.relative_to(self.base)), manifest))
        return manifest


def _title(run: Run, t: int, stage: str) -> str:
    return f"{run.compared + ' ' if run.compared else ''}iteration {t} {stage}"
