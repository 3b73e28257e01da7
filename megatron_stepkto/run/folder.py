"""The folder of a run: every path in it is defined here; and a recipe that is being run in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_stepkto.base.files import numbered
from megatron_stepkto.base.stage import Result, Stage, run_stage
from megatron_stepkto.recipe import keys as recipes

StageName = Literal["problems", "sample", "judge", "dataset", "train", "convert"]


@dataclass(frozen=True)
class RunFolder:
    """The paths of one method in a run's folder ``base``, whether they exist or not.

    A compared method has the folder ``base/methods/<method>``. It shares the problems, M0, its evaluation and the first
    iteration's samples and judgements with the recipe's own method (compared: None).
    """

    base: Path
    compared: str | None = None

    @property
    def root(self) -> Path:
        return self.base / "methods" / self.compared if self.compared else self.base

    def stage(self, name: StageName, t: int) -> Path:
        """The folder of a stage of iteration t, from 1."""
        shared = name == "problems" or (t == 1 and name in ("sample", "judge"))  # all methods sample first from M0
        return (self.base if shared else self.root) / f"iteration_{t}" / name

    def problems(self, t: int) -> Path:
        """The problems of iteration t; imported ones are beside their solutions (``imported_problems``)."""
        return self.stage("problems", t) / "problems.jsonl"

    def samples(self, t: int) -> Path:
        return self.stage("sample", t) / "samples.jsonl"

    def judged(self, t: int) -> Path:
        return self.stage("judge", t) / "judged.jsonl"

    @property
    def imported_problems(self) -> Path:
        return self.stage("judge", 1) / "problems.jsonl"

    def model(self, t: int) -> Path:
        """Hugging Face folder of M_t as the run makes it; M0 by a warm-up."""
        return (self.stage("convert", t) if t > 0 else self.m0("convert")) / "model"

    def adapter(self, t: int) -> Path:
        """PEFT folder of M_t's adapter, of a run that trains one; M0 is its base."""
        return self.stage("convert", t) / "adapter"

    def m0(self, stage: Literal["tokenizer", "initial", "corpus", "train", "convert", "merge"]) -> Path:
        """The folder of a stage of the warm-up; merge: of initial_model and the adapter that it starts with."""
        return self.base / "M0" / stage

    def evaluation(self, t: int) -> Path:
        return (self.base if t == 0 else self.root) / "evaluate" / model_name(t)

    @property
    def evaluation_problems(self) -> Path:
        return self.base / "evaluate" / "problems" / "problems.jsonl"

    @property
    def summary(self) -> Path:
        return self.base / "summary.json"

    @property
    def recipe(self) -> Path:
        return self.base / "recipe.yaml"

    @property
    def report(self) -> Path:
        return self.base / "report.html"

    @property
    def hashes(self) -> Path:
        """What ``base.stage.input_hash`` knows of large folders."""
        return self.base / ".hashes.json"

    @property
    def lock(self) -> Path:
        return self.base / ".lock"

    def iterations(self) -> list[int]:
        """Iterations of this method that have begun."""
        return _numbers(self.root, "iteration_")

    def evaluated(self) -> list[int]:
        """t of each M_t whose evaluation by this method has begun."""
        return _numbers(self.root / "evaluate", "M")

    def others(self) -> list[RunFolder]:
        """The compared methods that have begun, by name."""
        folders = sorted(path for path in (self.base / "methods").glob("*") if path.is_dir())
        return [RunFolder(self.base, path.name) for path in folders]


def examples_at(folder: Path) -> Path:
    """The folder of a data set, or the file of JSON lines where an earlier version made it."""
    lines = folder.with_name(f"{folder.name}.jsonl")
    return lines if lines.exists() else folder


def model_name(t: int) -> str:
    return f"M{t}"


def _numbers(folder: Path, prefix: str) -> list[int]:
    return [int(path.name.removeprefix(prefix)) for path in numbered(folder, prefix)]


@dataclass(frozen=True)
class Run:
    """A recipe being run with one method: the recipe's own, or the one it is compared with."""

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
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.run_dir, self.compared)

    @property
    def base(self) -> Path:
        return self.folder.base

    @property
    def makes_m0(self) -> bool:
        return self.from_scratch or self.recipe.initial_model is None or self.pretrained is not None

    @property
    def pretrained(self) -> Path | None:
        """See ``Recipe.pretrained``."""
        return self.recipe.pretrained()

    @property
    def base_model(self) -> Path:
        """Hugging Face folder of initial_model, or of what the warm-up makes: adapters are trained of it."""
        given = self.recipe.given_model() if not self.makes_m0 else None
        return given or self.folder.model(0)

    def model(self, t: int) -> Path:
        """Hugging Face folder of M_t; M0's is ``base_model``, or with a starting adapter the two merged."""
        if t > 0:
            return self.folder.model(t)
        lora = self.recipe.train.lora
        return self.folder.m0("merge") / "model" if lora and lora.start else self.base_model

    def excluded(self, t: int) -> dict[str, Path]:
        """The file of samples that take no part in iteration t, as an input of the stage that makes its data set."""
        files = self.recipe.dataset.exclude
        return {"exclude": files[str(t)]} if str(t) in files else {}

    @property
    def blueprint(self) -> Path:
        """A folder with the architecture and the tokenizer of every M_t: M0, or the model that becomes it."""
        return self.pretrained or self.base_model

    @property
    def makes_new_model(self) -> bool:
        """Whether M0 is trained from random weights, with a tokenizer that is made before it."""
        return self.makes_m0 and self.pretrained is None

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer of M0, and so of every M_t."""
        return self.folder.m0("tokenizer") / "model" if self.makes_new_model else self.blueprint

    def title(self, t: int, stage: str) -> str:
        return f"{self.compared + ' ' if self.compared else ''}iteration {t} {stage}"

    def known(self, stage: Stage) -> Stage:
        return replace(stage, hashes=self.folder.hashes)

    def run(
        self,
        stage: Stage,
        work: Callable[[], Result],
        together: Callable[[], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """``run_stage`` for a stage of this run. Where it works, an old summary would contradict it, and is removed."""
        manifest = run_stage(
            self.known(stage), work, force=self.force, together=together, check=check,
            begin=lambda: self.folder.summary.unlink(missing_ok=True),
        )  # fmt: skip
        self.finished.append((str(stage.directory.relative_to(self.base)), manifest))
        return manifest
