"""The loop: which stage reads and writes what, for one recipe and method.

Every stage can be run alone (``stepkto sample RECIPE --iteration 2``); ``run_all`` runs them in order, and
each skips itself when it is done.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_stepkto.base.files import atomic_writer, read_json, stable_hash, write_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.progress import say, warn
from megatron_stepkto.base.stage import Result, Stage, input_hash, run_stage
from megatron_stepkto.evaluation.table import Row
from megatron_stepkto.methods.dataset import build_dataset
from megatron_stepkto.problems.source import check_training_problems, write_problems
from megatron_stepkto.recipe import keys as recipes
from megatron_stepkto.recipe.prompts import ProblemCheck, Prompts
from megatron_stepkto.recipe.yaml_text import write_yaml
from megatron_stepkto.run import warm_up
from megatron_stepkto.run.folder import Run, _title, dataset_key, training_key

# --- problems ------------------------------------------------------------------------------------------------


def _source_settings(source: recipes.Problems) -> dict[str, Any]:
    """What decides the problems; files count by content, as inputs, not by where they stand."""
    return {"source": source.source}


def _apart_from(source: recipes.Problems, settings: dict[str, Any]) -> dict[str, Path]:
    """The further evaluation sets as inputs; what counts as overlap joins the settings where it is not the default."""
    if source.overlap != "exact":
        settings["overlap"] = source.overlap
    return {f"apart_from-{number}": path for number, path in enumerate(source.apart_from)}


def _prompt_check(run: Run) -> ProblemCheck | None:
    """A check of problems against the tokenizer that will ask them, or hours later sampling would refuse one.

    None: the problems are the generator's, or M0's tokenizer is not there yet.
    """
    folder = run.tokenizer_folder
    if run.recipe.problems.source == "chained_arithmetic" or not folder.is_dir():
        return None
    return Prompts.of(run.recipe.prompt, folder).check


def problems_stage(run: Run, t: int) -> None:
    directory = run.base / f"iteration_{t}" / "problems"
    source = run.recipe.problems
    out = directory / "problems.jsonl"
    settings = {
        **_source_settings(source),
        "per_iteration": source.per_iteration,
        "seed": run.recipe.seed,
        "iteration": t,
    }
    # the held-out files too: no problem of theirs may train
    inputs = {split: path for split in ("train", "dev", "test") if (path := getattr(source, split))}
    inputs |= _apart_from(source, settings)

    def work() -> Result:
        shared = check_training_problems(source, allow=run.allow_overlap, skip_bad=run.quarantine is not None)
        counts = write_problems(
            source, "train", source.per_iteration, run.recipe.seed, t, out, run.quarantine, _prompt_check(run)
        )
        return Result([out], {**counts, **shared})

    run.run(Stage(f"iteration {t} problems", directory, settings, inputs), work)


def evaluation_problems_stage(run: Run) -> None:
    evaluation = run.recipe.evaluate
    assert evaluation is not None
    directory = run.base / "evaluate" / "problems"
    source, split, count = run.recipe.problems, evaluation.split, evaluation.num_problems
    out = directory / "problems.jsonl"
    file = getattr(source, split)
    settings = {**_source_settings(source), "split": split, "num_problems": count}

    def work() -> Result:
        # a fixed seed: every run of a recipe, whatever its own seed, is measured on the same problems
        return Result([out], write_problems(source, split, count, 0, 1, out, run.quarantine, _prompt_check(run)))

    run.run(Stage("evaluation problems", directory, settings, {split: file} if file else {}), work)


# --- sample, judge, dataset ------------------------------------------------------------------------------------


def sample_stage(run: Run, t: int) -> None:
    from megatron_stepkto.sampling.draw import Drawing, sample_drawing

    sampling = run.recipe.sample
    assert sampling is not None
    directory = run.sampled_at(t) / "sample"
    problems = run.base / f"iteration_{t}" / "problems" / "problems.jsonl"
    model = run.model(t - 1)
    seed = stable_hash(run.recipe.seed, "sample", t) % 2**31
    settings = {
        "sample": sampling.model_dump(mode="json", exclude={"workers", "stall_timeout_s"}),
        "prompt": run.recipe.prompt.model_dump(mode="json"),
        "seed": seed,
    }

    @functools.cache
    def drawing() -> Drawing:
        from megatron_stepkto.checkpoints.convert import HFSide

        HFSide(model, one_dtype=False)  # it will be trained on what is drawn
        return sample_drawing(
            model,
            run.name(t - 1),
            problems,
            run.recipe.prompt,
            sampling,
            seed,
            directory,
            title=_title(run, t, "sample"),
        )

    def work() -> Result:
        result = drawing().finish()
        return Result(list(result.paths.values()), result.counts)

    stage = Stage(_title(run, t, "sample"), directory, settings, {"problems": problems, "model": model})
    run.run(stage, work, together=lambda: drawing().draw())


def judge_stage(run: Run, t: int) -> None:
    from megatron_stepkto.judging.process import judging_key
    from megatron_stepkto.judging.stage import judge_file

    if run.recipe.problems.source == "imports":
        return _import_stage(run)
    judging = run.recipe.judge
    assert judging is not None
    directory = run.sampled_at(t) / "judge"
    problems = run.base / f"iteration_{t}" / "problems" / "problems.jsonl"
    samples = run.sampled_at(t) / "sample" / "samples.jsonl"
    out = directory / "judged.jsonl"
    model = run.model(t - 1)
    settings = {"judge": judging_key(judging, model, run.hashes)}

    def work() -> Result:
        counts = judge_file(
            problems, samples, out, model, judging, quarantine=run.quarantine, seed=run.recipe.seed, hashes=run.hashes
        )
        return Result([out], counts)

    stage = Stage(_title(run, t, "judge"), directory, settings, {"problems": problems, "samples": samples})
    _show_warnings(stage, run.run(stage, work))
    return None


def _show_warnings(stage: Stage, manifest: dict[str, Any]) -> None:
    """Of a finished stage, too: a run that goes on repeats them."""
    for warning in manifest["counts"].get("warnings", []):
        warn(f"{stage.title}: {warning}")


def _import_stage(run: Run) -> None:
    """Solutions judged elsewhere stand in for sampling and judging; all of them are tokenised once, here."""
    from megatron_stepkto.judging.imported import import_all

    directory = run.sampled_at(1) / "judge"
    sources = run.recipe.problems.imports
    tokenizer = run.tokenizer_folder
    problems, judged = directory / "problems.jsonl", directory / "judged.jsonl"
    settings = {"prompt": run.recipe.prompt.model_dump(mode="json"), "formats": [s.format for s in sources]}
    inputs = {f"{i}-{s.format}": s.path for i, s in enumerate(sources)} | {"tokenizer": tokenizer}
    inputs |= _apart_from(run.recipe.problems, settings)

    def work() -> Result:
        shared = check_training_problems(
            run.recipe.problems, allow=run.allow_overlap, skip_bad=run.quarantine is not None
        )
        counts = import_all(sources, tokenizer, run.recipe.prompt, problems, judged, quarantine=run.quarantine)
        return Result([problems, judged], counts | shared)

    stage = Stage("import", directory, settings, inputs)
    _show_warnings(stage, run.run(stage, work))


def dataset_stage(run: Run, t: int) -> None:
    directory = run.iteration(t) / "dataset"
    judged = run.sampled_at(t) / "judge" / "judged.jsonl"
    train, held_out = directory / "train.jsonl", directory / "held_out.jsonl"
    share, seed = run.recipe.problems.held_out_share, run.recipe.seed
    settings = {
        "dataset": dataset_key(run.recipe.dataset, run.method),
        "method": run.method,
        "held_out_share": share,
        "seed": seed,
    }

    def work() -> Result:
        counts = build_dataset(
            judged, train, held_out, run.recipe.dataset, run.method, share, seed, quarantine=run.quarantine
        )
        return Result([path for path in (train, held_out) if path.exists()], counts)

    stage = Stage(_title(run, t, "dataset"), directory, settings, {"judged": judged})
    _show_warnings(stage, run.run(stage, work))


# --- train, convert, evaluate ----------------------------------------------------------------------------------


def train_stage(run: Run, t: int, *, weights_only: bool = False) -> None:
    """weights_only: the part that needs no GPU, and leaves the rest to a later call."""
    from megatron_stepkto.base.nodes import tell_others, this_node
    from megatron_stepkto.training.launch import help_train, prepare_weights, train

    directory = run.iteration(t) / "train"
    data = run.iteration(t) / "dataset"
    settings = run.recipe.train.model_copy(update={"method": run.method})
    reference = run.model(0) if settings.reference == "initial" and t > 1 else None
    seed = stable_hash(run.recipe.seed, "train", t) % 2**31
    inputs = {"model": run.model(t - 1), "train": data / "train.jsonl"}
    held_out = data / "held_out.jsonl"
    if held_out.exists():
        inputs["held_out"] = held_out
    if reference:
        inputs["reference"] = reference

    stage = run.known(
        Stage(_title(run, t, "train"), directory, {"train": training_key(settings), "seed": seed}, inputs)
    )  # as it is: train() asks for the key again
    if weights_only:
        run_stage(stage, lambda: prepare_weights(stage, settings), force=run.force)
        return
    nodes = this_node()
    if nodes.number > 0:
        help_train(directory, settings, nodes, stage.title)
        return
    run.run(stage, lambda: train(stage, settings, seed, nodes))
    tell_others(directory, nodes, start=False)


def convert_stage(run: Run, t: int) -> None:
    from megatron_stepkto.checkpoints.convert import megatron_to_hf

    directory = run.iteration(t) / "convert"
    source, out = run.iteration(t) / "train" / "final", directory / "model"

    def work() -> Result:
        megatron_to_hf(source, out)
        return Result([out])

    run.run(Stage(_title(run, t, "convert"), directory, {}, {"trained": source}), work)


def evaluate_stage(run: Run, t: int) -> dict[str, Any]:
    from megatron_stepkto.evaluation.stage import OUTPUTS, evaluate_model, evaluation_drawing
    from megatron_stepkto.judging.process import judging_key

    evaluation = run.recipe.evaluate
    assert evaluation is not None
    directory = run.evaluation(t)
    problems = run.base / "evaluate" / "problems" / "problems.jsonl"
    sampling, judging = run.recipe.sample, run.recipe.judge
    assert sampling is not None
    assert judging is not None
    settings = {
        "evaluate": evaluation.model_dump(mode="json"),
        # the rest of the section is how training data are drawn, or with how many workers
        "sample": sampling.model_dump(
            mode="json", include={"backend", "max_tokens", "chunk_problems", "dtype", "tensor_parallel"}
        ),
        "judge": judging_key(judging, run.model(t), run.hashes),
        "prompt": run.recipe.prompt.model_dump(mode="json"),
    }

    inputs = (run.model(t), run.name(t), problems, run.recipe, directory)

    def work() -> Result:
        row = evaluate_model(*inputs, hashes=run.hashes)
        return Result([directory / name for name in OUTPUTS], {"dtype": row.get("dtype")})

    title = f"{run.compared + ' ' if run.compared else ''}evaluate {run.name(t)}"
    stage = Stage(title, directory, settings, {"problems": problems, "model": run.model(t)})
    run.run(stage, work, together=lambda: evaluation_drawing(*inputs).draw())
    return dict(read_json(directory / "metrics.json", Row))


# --- all of it -------------------------------------------------------------------------------------------------


def check_fits(model: Path, recipe: recipes.Recipe) -> None:
    """Raises UserError, before hours of sampling, for a model that cannot be trained in this layout, or a Megatron-Core
    that this package is not tested with."""
    from megatron_stepkto.architectures.layout import check_layout
    from megatron_stepkto.checkpoints.convert import read_model_config
    from megatron_stepkto.megatron.version import check_megatron_version

    check_megatron_version()
    check_layout(read_model_config(model)[0], recipe.train.parallel, recipe.place)


# Those that take an iteration from 1; evaluate also takes 0, for M0.
STAGES: dict[str, Callable[[Run, int], object]] = {
    "problems": problems_stage,
    "sample": sample_stage,
    "judge": judge_stage,
    "dataset": dataset_stage,
    "train": train_stage,
    "convert": convert_stage,
}


def prepare(run: Run) -> None:
    """What comes before the first iteration: M0, checked against the layout, and the evaluation's problems."""
    from megatron_stepkto.checkpoints.convert import HFSide

    if run.makes_m0:
        warm_up.tokenizer_stage(run)
    if run.recipe.problems.source == "imports":
        _import_stage(run)
    if run.makes_m0:
        warm_up.make_m0(run)
    HFSide(run.model(0), one_dtype=False)  # weights that training could not read are named before hours of sampling
    check_fits(run.model(0), run.recipe)
    if run.recipe.evaluate:
        evaluation_problems_stage(run)


def prepare_all(run: Run) -> None:
    """What needs nothing but the recipe: M0, and the problems of every iteration and of the evaluation."""
    prepare(run)
    input_hash(run.model(0), run.hashes)
    if run.recipe.problems.source != "imports":
        for t in range(1, run.recipe.iterations + 1):
            problems_stage(run, t)


def run_iterations(run: Run) -> list[dict[str, Any]]:
    """All iterations of one method; returns the evaluation's row of M0, M1, ..."""
    rows = [evaluate_stage(run, 0)] if run.recipe.evaluate else []
    for t in range(1, run.recipe.iterations + 1):
        say(f"--- {_title(run, t, f'of {run.recipe.iterations}')} ---")
        if run.recipe.problems.source != "imports":
            problems_stage(run, t)
            sample_stage(run, t)
        judge_stage(run, t)
        dataset_stage(run, t)
        train_stage(run, t)
        convert_stage(run, t)
        if run.recipe.evaluate:
            rows.append(evaluate_stage(run, t))
    return rows


def run_all(run: Run, compare: list[recipes.Method]) -> dict[str, Any]:
    """The whole recipe, then the methods it is compared with; writes and returns ``summary.json``.

    Raises:
        UserError: another process is at this run, or see the stages.
    """
    begun = time.time()
    with exclusive_lock(run.base / ".lock", str(run.base)):
        # Until all is done again there is no summary: an old one beside new stages would be untrue.
        (run.base / "summary.json").unlink(missing_ok=True)
        prepare(run)
        rows = run_iterations(run)
        for method in compare:
            run_iterations(replace(run, compared=method))
        with atomic_writer(run.base / "recipe.yaml") as file:
            write_yaml(run.recipe.model_dump(mode="json"), file)
        stages = dict(run.finished)
        summary: dict[str, Any] = {
            "recipe": run.recipe.name,
            "seed": run.recipe.seed,
            "method": run.method,
            "iterations": rows,
            "methods": compared_rows(run.base),
            "stages": [{"name": name, "seconds": m["seconds"], "counts": m["counts"]} for name, m in stages.items()],
            "seconds": round(sum(m["seconds"] for m in stages.values()), 1),
            "seconds_of_this_command": round(time.time() - begun, 1),
        }
        if not summary["methods"]:
            del summary["methods"]
        write_json(run.base / "summary.json", summary)
    return summary


def compared_rows(base: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of every compared method that this run holds, also of earlier commands; M0 is everybody's."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted((base / "methods").glob("*")):
        files = [base / "evaluate" / "M0" / "metrics.json"]
        while files[-1].is_file():
            files.append(folder / "evaluate" / f"M{len(files)}" / "metrics.json")
        if len(files) > 2:
            found[folder.name] = [dict(read_json(file, Row)) for file in files[:-1]]
    return found
