"""Find what later stages of a run will refuse before the first one starts: hours of sampling must not be lost to it.

Each check is the one that the stage itself makes: nothing more is refused here. Finished stages are not checked.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import find_files
from megatron_stepkto.base.stage import MANIFEST, Stage
from megatron_stepkto.recipe.keys import Method, Recipe
from megatron_stepkto.run.folder import Run
from megatron_stepkto.run.stages import (
    check_fits,
    drawing_of,
    evaluation_drawing_of,
    evaluation_of,
    judging_of,
    sampling_of,
    training_of,
)

Environment = Literal["train", "sample"]
Kind = Literal["sample", "judge", "train", "evaluate"]
Check = Callable[[], object]
_STAGE_OF: dict[Kind, Callable[[Run, int], Stage]] = {
    "sample": sampling_of,
    "judge": judging_of,
    "train": training_of,
    "evaluate": evaluation_of,
}


@dataclass(frozen=True)
class Pending:
    """A stage that is not finished."""

    kind: Kind
    run: Run
    t: int

    @property
    def title(self) -> str:
        if self.kind != "evaluate":
            return self.run.title(self.t, self.kind)
        return f"{self.run.compared + ' ' if self.run.compared else ''}evaluate M{self.t}"


def pending(run: Run, compare: Sequence[Method] = ()) -> Iterator[Pending]:
    """The unfinished stages of all iterations that need something of the machine, in the order of ``run_all``."""
    seen: set[Path] = set()
    for each in (run, *(replace(run, compared=method) for method in compare)):
        redone = False
        for kind, t in _stages(run.recipe):
            directory = _directory(each, kind, t)
            if directory in seen:  # a compared method shares the first iteration's samples, and M0's evaluation
                continue
            seen.add(directory)
            done = (directory / MANIFEST).is_file()
            if done and run.force:  # a stage with other settings is redone, and so is every stage after it
                done = not redone and _STAGE_OF[kind](each, t).is_finished(force=True)
            if not done:
                redone = redone or kind != "evaluate"
                yield Pending(kind, each, t)


def _stages(recipe: Recipe) -> Iterator[tuple[Kind, int]]:
    measured = recipe.measured()
    if 0 in measured:
        yield "evaluate", 0
    for t in range(1, recipe.iterations + 1):
        if recipe.problems.source != "imports":
            yield "sample", t
            yield "judge", t
        yield "train", t
        if t in measured:
            yield "evaluate", t


def _directory(run: Run, kind: Kind, t: int) -> Path:
    return run.folder.evaluation(t) if kind == "evaluate" else run.folder.stage(kind, t)


def machine_refusals(
    run: Run, compare: Sequence[Method] = (), *, environment: Environment | None = None, elsewhere: bool = False
) -> list[str]:
    """What this machine lacks for the unfinished stages: imports, packages, devices, memory, servers, disk space.

    Args:
        environment: only stages of that environment of a cluster (slurm/site.example.sh); None: of both.
        elsewhere: training will run on other machines with the same packages and folders.
    """
    left = list(pending(run, compare))
    first = _first_of_each_kind(left)  # the later ones ask for the same
    checks: list[tuple[str, Check]] = [("inputs", check) for check in _files(run)]
    if environment != "sample":
        checks += [
            (item.title, check) for item in first if item.kind == "train" for check in _training(item, elsewhere)
        ]
        checks += [("M0 train", check) for check in _warm_up(run)]
        checks.append(("checkpoints", partial(check_space, run, [item for item in left if item.kind == "train"])))
    if environment != "train":
        checks += [(item.title, check) for item in first for check in _engines_and_judges(item)]
    return _collect(checks)


def _first_of_each_kind(left: Sequence[Pending]) -> list[Pending]:
    found: dict[Kind, Pending] = {}
    for item in left:
        found.setdefault(item.kind, item)
    return list(found.values())


def check_prepared(run: Run, compare: Sequence[Method] = ()) -> None:
    """Check what depends on the model and the problems, once they exist: lengths, answers, the weights, the layout.

    Raises:
        UserError: lists everything that is refused.
    """
    left = list(pending(run, compare))
    checks: list[tuple[str, Check]] = []
    for item in _first_of_each_kind(left):
        checks += [(item.title, check) for check in (_weights(item) if item.kind == "train" else ())]
    for item in left:
        checks += [(item.title, check) for check in _of_what_is_prepared(item)]
    refuse(_collect(checks))


def refuse(found: list[str]) -> None:
    """Raises UserError with all that was found, if anything was."""
    if found:
        raise UserError("\n".join(["refused before anything is sampled:", *found]) if len(found) > 1 else found[0])


def _collect(checks: Sequence[tuple[str, Check]]) -> list[str]:
    """The messages of all failing checks, each once, after the title of the first stage that would fail."""
    found: dict[str, str] = {}
    for title, check in checks:
        try:
            check()
        except UserError as error:
            found.setdefault(str(error), title)
    return [f"{title}: {message}" for message, title in found.items()]


# --- checks of the stages --------------------------------------------------------------------------------------


def _files(run: Run) -> Iterator[Check]:
    """One check for each file that a later stage reads: problems; judged solutions, until they are imported; excluded
    samples."""
    recipe = run.recipe
    problems = recipe.problems
    paths = {"train": problems.train} if problems.train else {}
    for key in ("dev", "test", "apart_from"):
        paths |= {f"{key}.{number}": path for number, path in enumerate(getattr(problems, key))}
    for key, path in paths.items():
        yield partial(_check_file, recipe, f"problems.{key}", path, "a file of problems", "correct the path")
    if recipe.problems.source == "imports" and not (run.folder.judged(1).parent / MANIFEST).is_file():
        for number, each in enumerate(recipe.problems.imports):
            key, what = f"problems.imports.{number}.path", f"a file of format {each.format}"
            advice = "download it (docs/data.md says from where), or correct the path"
            yield partial(_check_file, recipe, key, each.path, what, advice)
    for iteration, path in recipe.dataset.exclude.items():
        key = f"dataset.exclude.{iteration}"
        yield partial(_check_file, recipe, key, path, "a file of sample ids", "correct the path, or remove the key")


def _check_file(recipe: Recipe, key: str, path: Path, what: str, advice: str) -> None:
    if not path.exists():
        raise UserError(f"{recipe.place(key)}: {key}: expected {what}, found none at {path}; {advice}")


def _training(item: Pending, elsewhere: bool) -> Iterator[Check]:
    from megatron_stepkto.base.nodes import this_node
    from megatron_stepkto.training.requirements import Ranks, training_checks

    settings, model = item.run.recipe.train, item.run.blueprint
    ranks = settings.parallel.ranks if elsewhere else this_node().ranks_here(settings.parallel.ranks)
    yield from training_checks(Ranks(settings=settings, model=model, ranks=ranks), elsewhere=elsewhere)
    if (model / "config.json").is_file():
        yield from _weights(item)


def _weights(item: Pending) -> Iterator[Check]:
    from megatron_stepkto.checkpoints.convert import HFSide

    model = item.run.blueprint
    yield partial(HFSide, model, one_dtype=False)
    yield partial(check_fits, model, item.run.recipe)


def _warm_up(run: Run) -> Iterator[Check]:
    from megatron_stepkto.architectures.layout import check_layout
    from megatron_stepkto.checkpoints.convert import HFSide, read_model_config
    from megatron_stepkto.training.requirements import Ranks, training_checks

    def place(key: str) -> str:
        return run.recipe.place(f"warm_up.training.{key.removeprefix('train.')}")

    if run.makes_m0 and run.recipe.warm_up is not None and not (run.folder.m0("train") / MANIFEST).is_file():
        settings = run.recipe.warm_up.training
        model = run.pretrained or run.folder.m0("initial") / "model"
        yield from training_checks(Ranks(settings=settings, model=model, ranks=settings.parallel.ranks))
        if run.pretrained:
            yield partial(HFSide, model, one_dtype=False)
            yield lambda: check_layout(read_model_config(model)[0], settings, place)


def _engines_and_judges(item: Pending) -> Iterator[Check]:
    from megatron_stepkto.judging.stage import check_judge
    from megatron_stepkto.sampling.engines import check_engines

    sampling, judging = item.run.recipe.sample, item.run.recipe.judge
    if item.kind in ("sample", "evaluate"):
        assert sampling is not None
        yield partial(check_engines, sampling, item.run.blueprint)
    if item.kind in ("judge", "evaluate"):
        assert judging is not None
        yield partial(check_judge, judging, item.run.blueprint, _directory(item.run, item.kind, item.t))


def _of_what_is_prepared(item: Pending) -> Iterator[Check]:
    from megatron_stepkto.judging.stage import check_answers_known
    from megatron_stepkto.sampling.draw import check_prompts

    run, t, model = item.run, item.t, item.run.blueprint
    judging = run.recipe.judge
    if item.kind == "sample":
        yield lambda: check_prompts(drawing_of(run, t, model).job)
    elif item.kind == "evaluate":
        yield lambda: check_prompts(evaluation_drawing_of(run, t, model).job)
    elif item.kind == "train" and run.recipe.sample is not None:
        yield partial(_check_lengths, run, t)
    if item.kind in ("judge", "evaluate"):
        assert judging is not None
        problems = run.folder.evaluation_problems if item.kind == "evaluate" else run.folder.problems(t)
        yield partial(check_answers_known, problems, judging, model, _directory(run, item.kind, t))


def _check_lengths(run: Run, t: int) -> None:
    from megatron_stepkto.training.requirements import check_longest

    recipe, stage = run.recipe, sampling_of(run, t)
    assert recipe.sample is not None
    settings = recipe.train.model_copy(update={"method": run.method})
    lengths = [len(prompt.token_ids) for prompt in drawing_of(run, t, run.blueprint).job.prompts]
    where = str(stage.inputs["problems"])
    limit = recipe.dataset.max_tokens
    if limit is not None and limit <= min(lengths):
        raise UserError(
            f"{recipe.place('dataset.max_tokens')}: dataset.max_tokens is {limit}, and the shortest prompt of {where} "
            f"alone has {min(lengths)} tokens: every example would be dropped; raise it"
        )
    check_longest(max(lengths), recipe.sample.max_tokens, recipe.dataset.max_tokens, settings, where)


# --- disk space ------------------------------------------------------------------------------------------------


def checkpoint_bytes(recipe: Recipe, model: Path, trainings: int) -> int:
    """Peak disk space of a run's weights and optimizer state, in bytes; 0 while its model does not exist.

    Per parameter: a weight (w bytes) and AdamW's two moments, and in bfloat16 the float32 main weight. While an
    iteration trains: the input in Megatron's format (and the reference, if it is another model), keep_checkpoints
    and one being written. Left by each iteration: the trained weights in both formats.

    Args:
        model: M0's folder. trainings: number of iterations that are not trained yet.
    """
    from megatron_stepkto.architectures.sharding import model_parameters
    from megatron_stepkto.checkpoints.convert import read_model_config

    if not trainings or not (model / "config.json").is_file():
        return 0
    parameters = model_parameters(read_model_config(model)[1])
    weight, state = (2, 14) if recipe.train.dtype == "bfloat16" else (4, 12)
    if recipe.train.lora:  # checkpoints hold adapters, a percent of the model; each iteration leaves a merged model
        return parameters * (weight + trainings * weight)
    inputs = 2 if recipe.train.reference == "initial" else 1
    return parameters * (inputs * weight + (recipe.train.keep_checkpoints + 1) * state + trainings * 2 * weight)


def check_space(run: Run, trainings: Sequence[Pending]) -> None:
    """Check that the unfinished trainings have room on disk. What an earlier attempt has written counts as available.

    A pretrained model's warm-up is one of them.

    Raises:
        UserError: there is not enough; names both numbers.
    """
    warm_up = run.folder.m0("train")
    warms_up = run.pretrained is not None and not (warm_up / MANIFEST).is_file()
    folders = [warm_up] * warms_up + [_directory(item.run, "train", item.t) for item in trainings]
    needed = checkpoint_bytes(run.recipe, run.blueprint, len(folders))
    for folder in folders:
        for path in find_files(folder, "*"):
            with contextlib.suppress(FileNotFoundError):  # a running training removes old checkpoints
                needed -= path.stat().st_size
    place = next((p for p in (run.base, *run.base.parents) if p.is_dir()), None)
    if place is not None and (free := shutil.disk_usage(place).free) < needed:
        raise UserError(
            f"{place} has {free / 1e9:,.1f} GB free, the run's checkpoints need {needed / 1e9:,.1f} GB; "
            "make room, set output to another file system or lower train.keep_checkpoints"
        )
