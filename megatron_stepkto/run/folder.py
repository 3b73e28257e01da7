"""The folder of a run: every path in it, and what decides each stage's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_stepkto.base.stage import Result, Stage, run_stage
from megatron_stepkto.recipe import keys as recipes


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
        self, stage: Stage, work: Callable[[], Result], together: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        manifest = run_stage(self.known(stage), work, force=self.force, together=together)
        self.finished.append((str(stage.directory.relative_to(self.base)), manifest))
        return manifest


def _title(run: Run, t: int, stage: str) -> str:
    return f"{run.compared + ' ' if run.compared else ''}iteration {t} {stage}"


# Keys that only some methods read: changing another method's does not make a finished stage stale.
_LOSS_KEYS: dict[str, set[str]] = {"rft": set(), "dpo": {"dpo_beta"}, "irpo": {"dpo_beta", "nll_weight"}}


_DATASET_KEYS: dict[str, set[str]] = {
    "rft": {"max_tokens", "max_examples_per_problem", "right_solutions"},
    "dpo": {"max_tokens", "pairs_per_problem", "right_solutions"},
    "irpo": {"max_tokens", "pairs_per_problem", "right_solutions"},
}


_NOT_DECIDING = {"parallel", "device", "micro_batch_tokens", "pad_documents_to", "recompute", "timeout_s", "max_gap",
                 "checkpoint_every", "keep_checkpoints", "async_checkpoints", "log"}  # fmt: skip


def training_key(settings: recipes.Training) -> dict[str, Any]:
    """What of a training's settings decides its weights, but for rounding: a run may go on at another layout."""
    key = settings.model_dump(mode="json", exclude=_NOT_DECIDING)
    # its checkpoints hold the optimizer's state in another form: neither kind goes on from the other's
    key["distributed_optimizer"] = settings.parallel.distributed_optimizer
    unread = {"dpo_beta", "nll_weight"}
    used = _LOSS_KEYS.get(settings.method, set(key["loss"]) - unread)
    key["loss"] = {name: value for name, value in key["loss"].items() if name in used}
    return key


def dataset_key(settings: recipes.Dataset, method: recipes.Method) -> dict[str, Any]:
    """What of the dataset section decides the examples of a method."""
    key = settings.model_dump(mode="json")
    used = _DATASET_KEYS.get(method, set(key) - {"pairs_per_problem", "right_solutions"})
    return {name: value for name, value in key.items() if name in used}
