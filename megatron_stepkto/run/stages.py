"""The stages of a run: what each reads, what it writes, and which settings determine its output.

Every stage can be run alone (``stepkto sample RECIPE --iteration 2``) and skips itself when it is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json, stable_hash
from megatron_stepkto.base.progress import warn
from megatron_stepkto.base.stage import Result, Stage, input_hash, run_stage
from megatron_stepkto.evaluation.table import METRICS, Row
from megatron_stepkto.methods.dataset import build_dataset
from megatron_stepkto.problems.source import check_training_problems, evaluation_sets, split_inputs, write_problems
from megatron_stepkto.recipe import keys as recipes
from megatron_stepkto.recipe.prompts import ProblemCheck, Prompts
from megatron_stepkto.run.folder import Run, examples_at, model_name
from megatron_stepkto.run.stage_keys import dataset_key, training_key

if TYPE_CHECKING:
    from megatron_stepkto.sampling.draw import Drawing
    from megatron_stepkto.training.job import Advice


# --- problems ------------------------------------------------------------------------------------------------


def _prompt_check(run: Run) -> ProblemCheck | None:
    """A check of problems against the tokenizer that will encode them: sampling would refuse one only hours later.

    None: the problems are the generator's, or M0's tokenizer is not there yet.
    """
    folder = run.tokenizer_folder
    if run.recipe.problems.source == "chained_arithmetic" or not folder.is_dir():
        return None
    return Prompts.of(run.recipe.prompt, folder).check


def problems_stage(run: Run, t: int) -> None:
    out, source = run.folder.problems(t), run.recipe.problems
    settings = {  # files are inputs: their content counts, not their path
        "source": source.source,
        "per_iteration": source.per_iteration,
        "seed": run.recipe.seed,
        "iteration": t,
    }
    inputs = {"train": source.train} if source.train else {}
    inputs |= evaluation_sets(source, settings)  # none of their problems may train

    def work() -> Result:
        shared = check_training_problems(source, allow=run.allow_overlap, skip_bad=run.quarantine is not None)
        counts = write_problems(
            source, "train", source.per_iteration, run.recipe.seed, t, out, run.quarantine, _prompt_check(run)
        )
        return Result([out], {**counts, **shared})

    run.run(Stage(f"iteration {t} problems", out.parent, settings, inputs), work)


def evaluation_problems_stage(run: Run) -> None:
    evaluation = run.recipe.evaluate
    assert evaluation is not None
    source, split, count = run.recipe.problems, evaluation.split, evaluation.num_problems
    out = run.folder.evaluation_problems
    settings = {"source": source.source, "split": split, "num_problems": count}

    def work() -> Result:
        # a fixed seed: every run of a recipe, whatever its own seed, is measured on the same problems
        return Result([out], write_problems(source, split, count, 0, 1, out, run.quarantine, _prompt_check(run)))

    run.run(Stage("evaluation problems", out.parent, settings, split_inputs(source, split)), work)


# --- sample, judge, dataset ------------------------------------------------------------------------------------


def sampling_of(run: Run, t: int) -> Stage:
    sampling = run.recipe.sample
    assert sampling is not None
    settings = {
        "sample": recipes.deciding(sampling),
        "prompt": run.recipe.prompt.model_dump(mode="json"),
        "seed": stable_hash(run.recipe.seed, "sample", t) % 2**31,
    }
    inputs = {"problems": run.folder.problems(t), "model": run.model(t - 1)}
    return run.known(Stage(run.title(t, "sample"), run.folder.stage("sample", t), settings, inputs))


def drawing_of(run: Run, t: int, model: Path) -> Drawing:
    """The sampling job of iteration t, from the model in the folder ``model``."""
    from megatron_stepkto.sampling.draw import new_drawing, read_prompts
    from megatron_stepkto.sampling.job import Pass

    stage, sampling = sampling_of(run, t), run.recipe.sample
    assert sampling is not None
    prompts = read_prompts(stage.inputs["problems"], run.recipe.prompt, model)
    pass_ = Pass(
        name="samples", num_samples=sampling.num_samples, temperature=sampling.temperature, top_p=sampling.top_p
    )
    return new_drawing(
        model, model_name(t - 1), prompts, [pass_], sampling, stage.settings["seed"], stage.directory,
        title=stage.title, trained_in=run.recipe.train.dtype,
    )  # fmt: skip


def sample_stage(run: Run, t: int) -> None:
    stage = sampling_of(run, t)
    drawing = functools.cache(lambda: _trainable_drawing(run, t))

    def work() -> Result:
        result = drawing().finish()
        return Result(list(result.paths.values()), result.counts)

    # --force drops what an earlier attempt chose, after the check: the work needs a drawing of its own
    run.run(stage, work, together=lambda: drawing().draw(), check=lambda: _trainable_drawing(run, t).check())


def _trainable_drawing(run: Run, t: int) -> Drawing:
    from megatron_stepkto.checkpoints.convert import HFSide

    model = run.model(t - 1)
    HFSide(model, one_dtype=False)  # refuse now a model that training would refuse after the sampling
    return drawing_of(run, t, model)


def begin_sampling(run: Run, t: int) -> list[Drawing]:
    """Begin the sample stage of iteration t, for another stage's engine to sample; [] if it is finished."""
    stage, begun = sampling_of(run, t), list[Any]()
    if not stage.is_finished(force=run.force):
        run_stage(
            stage, lambda: None, force=run.force, together=lambda: begun.append(_trainable_drawing(run, t)),
            check=lambda: _trainable_drawing(run, t).check(),
        )  # fmt: skip
    return begun


def judging_of(run: Run, t: int) -> Stage:
    from megatron_stepkto.judging.section import judging_key

    assert run.recipe.judge is not None
    inputs = {"problems": run.folder.problems(t), "samples": run.folder.samples(t)}
    settings = {"judge": judging_key(run.recipe.judge, run.model(t - 1), run.folder.hashes)}
    return run.known(Stage(run.title(t, "judge"), run.folder.stage("judge", t), settings, inputs))


def judge_stage(run: Run, t: int) -> None:
    from megatron_stepkto.judging.stage import check_judge, judge_file

    if run.recipe.problems.source == "imports":
        return import_stage(run)
    stage, judging = judging_of(run, t), run.recipe.judge
    assert judging is not None
    out, model, problems = run.folder.judged(t), run.model(t - 1), stage.inputs["problems"]

    def work() -> Result:
        counts = judge_file(
            problems, stage.inputs["samples"], out, model, judging, quarantine=run.quarantine, seed=run.recipe.seed,
            hashes=run.folder.hashes,
        )  # fmt: skip
        return Result([out], counts)

    manifest = run.run(stage, work, check=lambda: check_judge(judging, model, stage.directory, problems))
    _show_warnings(stage, manifest)
    return None


def _show_warnings(stage: Stage, manifest: dict[str, Any]) -> None:
    """Show the warnings of a stage, also of one that was finished before: a resumed run repeats them."""
    for warning in manifest["counts"].get("warnings", []):
        warn(f"{stage.title}: {warning}")


def import_stage(run: Run) -> None:
    """Import solutions that were judged elsewhere, in place of sampling and judging, and tokenize them all."""
    from megatron_stepkto.judging.imported import import_all

    sources = run.recipe.problems.imports
    tokenizer = run.tokenizer_folder
    problems, judged = run.folder.imported_problems, run.folder.judged(1)
    settings = {"prompt": run.recipe.prompt.model_dump(mode="json"), "formats": [s.format for s in sources]}
    inputs = {f"{i}-{s.format}": s.path for i, s in enumerate(sources)} | {"tokenizer": tokenizer}
    inputs |= evaluation_sets(run.recipe.problems, settings)

    def work() -> Result:
        shared = check_training_problems(
            run.recipe.problems, allow=run.allow_overlap, skip_bad=run.quarantine is not None
        )
        counts = import_all(sources, tokenizer, run.recipe.prompt, problems, judged, quarantine=run.quarantine)
        return Result([problems, judged], counts | shared)

    stage = Stage("import", judged.parent, settings, inputs)
    _show_warnings(stage, run.run(stage, work))


def dataset_stage(run: Run, t: int) -> None:
    directory, judged = run.folder.stage("dataset", t), run.folder.judged(t)
    train, held_out = directory / "train", directory / "held_out"
    share, seed = run.recipe.problems.held_out_share, run.recipe.seed
    settings = {
        "dataset": dataset_key(run.recipe.dataset, run.method),
        "method": run.method,
        "held_out_share": share,
        "seed": seed,
    }

    def work() -> Result:
        counts = build_dataset(
            judged, train, held_out, run.recipe.dataset, run.method, share, seed, quarantine=run.quarantine,
            excluded=stage.inputs.get("exclude"),
        )  # fmt: skip
        return Result([path for path in (train, held_out) if path.exists()], counts)

    stage = Stage(run.title(t, "dataset"), directory, settings, {"judged": judged} | run.excluded(t))
    _show_warnings(stage, run.run(stage, work))


# --- train, convert, evaluate ----------------------------------------------------------------------------------


def merge_stage(run: Run) -> None:
    """Make M0 of initial_model and the adapter that train.lora.start names."""
    import torch

    from megatron_stepkto.checkpoints.adapter import merge_adapter

    lora = run.recipe.train.lora
    assert lora is not None
    assert lora.start is not None
    base, adapter, out = run.base_model, lora.start, run.model(0)
    dtype = run.recipe.train.dtype

    def work() -> Result:
        check_fits(base, run.recipe)
        merge_adapter(base, adapter, out, getattr(torch, dtype))
        return Result([out])

    run.run(Stage("M0 merge", out.parent, {"dtype": dtype}, {"base": base, "adapter": adapter}), work)


def training_of(run: Run, t: int) -> Stage:
    data = run.folder.stage("dataset", t)
    settings = run.recipe.train.model_copy(update={"method": run.method})
    inputs = {"model": run.model(t - 1), "train": examples_at(data / "train")}
    if settings.lora:  # one adapter for all iterations
        inputs["model"] = run.base_model
        if adapter := run.folder.adapter(t - 1) if t > 1 else settings.lora.start:
            inputs["adapter"] = adapter
    held_out = examples_at(data / "held_out")
    if held_out.exists():
        inputs["held_out"] = held_out
    if settings.reference == "initial" and t > 1 and not settings.lora:
        inputs["reference"] = run.model(0)
    seed = stable_hash(run.recipe.seed, "train", t) % 2**31
    key = {"train": training_key(settings), "seed": seed}
    return run.known(Stage(run.title(t, "train"), run.folder.stage("train", t), key, inputs))


def train_stage(run: Run, t: int, *, weights_only: bool = False) -> None:
    """Train. weights_only: do the part that needs no GPU, and leave the rest to a later call."""
    from megatron_stepkto.base.nodes import tell_others, this_node
    from megatron_stepkto.training.launch import help_train, prepare_weights, train
    from megatron_stepkto.training.requirements import Ranks, check_training

    stage = training_of(run, t)
    directory, seed = stage.directory, stage.settings["seed"]
    settings = run.recipe.train.model_copy(update={"method": run.method})
    if weights_only:
        run_stage(stage, lambda: prepare_weights(stage, settings), force=run.force)
        return
    nodes = this_node()
    if nodes.number > 0:
        help_train(directory, settings, nodes, stage.title)
        return
    here = Ranks(settings=settings, model=run.model(t - 1), ranks=nodes.ranks_here(settings.parallel.ranks))
    run.run(stage, lambda: train(stage, settings, seed, nodes, not_finite(run, t)), check=lambda: check_training(here))
    tell_others(directory, nodes, start=False)


def not_finite(run: Run, t: int) -> Advice:
    """The commands that go on where a number is not finite in the training of iteration t."""
    from megatron_stepkto.training.job import Advice

    stage = f"RECIPE --iteration {t}{f' --method {run.compared}' if run.compared else ''}"
    exclude = f"--set dataset.exclude.{t}=FILE --force`"
    return Advice(
        without_records="leave these records out: write their ids to a file, one per line (of a KL pair both), and "
        f"repeat `stepkto run RECIPE` with `{exclude}, or of its stages alone `stepkto dataset {stage} {exclude}, then "
        f"`stepkto train {stage} --force`",
        lower_rate="lower the learning rate, of all iterations: repeat `stepkto run RECIPE` with "
        "`--set train.optimizer.lr=LR --force`",
    )


def convert_stage(run: Run, t: int) -> None:
    trained, out = run.folder.stage("train", t) / "final", run.folder.model(t)
    if run.recipe.train.lora:
        _convert_adapter(run, t, trained, out)
    else:
        convert(run, run.title(t, "convert"), trained, out)


def _convert_adapter(run: Run, t: int, trained: Path, out: Path) -> None:
    """Write the adapter that a training left for PEFT, and its base with it as a Hugging Face folder."""
    import torch

    from megatron_stepkto.checkpoints.adapter import Trained, export_adapter, merge_adapter
    from megatron_stepkto.checkpoints.convert import LORA_SETTINGS

    base, adapter = run.base_model, run.folder.adapter(t)

    def work() -> Result:
        if read_json(trained / LORA_SETTINGS, Trained)["base"] != input_hash(base, run.folder.hashes):
            raise UserError(f"{trained}: its adapters belong to another base model than {base}; restore that model")
        export_adapter(trained, adapter, base)
        merge_adapter(base, adapter, out, getattr(torch, run.recipe.train.dtype))
        return Result([adapter, out])

    run.run(Stage(run.title(t, "convert"), out.parent, {}, {"trained": trained, "base": base}), work)


def convert(run: Run, title: str, trained: Path, out: Path) -> None:
    """Convert the weights that a training left to a Hugging Face folder."""
    from megatron_stepkto.checkpoints.convert import megatron_to_hf

    def work() -> Result:
        megatron_to_hf(trained, out)
        return Result([out])

    run.run(Stage(title, out.parent, {}, {"trained": trained}), work)


def evaluation_of(run: Run, t: int) -> Stage:
    from megatron_stepkto.judging.section import judging_key

    evaluation, sampling, judging = run.recipe.evaluate, run.recipe.sample, run.recipe.judge
    assert evaluation is not None
    assert sampling is not None
    assert judging is not None
    settings = {
        "evaluate": recipes.deciding(evaluation),
        "sample": recipes.deciding(sampling, evaluation=True),
        "judge": judging_key(judging, run.model(t), run.folder.hashes),
        "prompt": run.recipe.prompt.model_dump(mode="json"),
    }

    title = f"{run.compared + ' ' if run.compared else ''}evaluate {model_name(t)}"
    inputs = {"problems": run.folder.evaluation_problems, "model": run.model(t)}
    return run.known(Stage(title, run.folder.evaluation(t), settings, inputs))


def evaluation_drawing_of(run: Run, t: int, model: Path) -> Drawing:
    """The sampling job of the evaluation of M_t, from the model in the folder ``model``; M_t need not be there yet."""
    from megatron_stepkto.evaluation.stage import evaluation_drawing

    folder = run.folder
    return evaluation_drawing(model, model_name(t), folder.evaluation_problems, run.recipe, folder.evaluation(t))


def sample_for_evaluation(run: Run, t: int) -> None:
    """The part of ``evaluate_stage`` that needs the sampler's GPUs; ``evaluate_stage`` then judges the samples."""

    def drawing() -> Drawing:
        return evaluation_drawing_of(run, t, run.model(t))

    run_stage(
        evaluation_of(run, t), lambda: None, force=run.force, together=lambda: drawing().draw(),
        check=lambda: drawing().check(),
    )  # fmt: skip


def evaluate_stage(run: Run, t: int, *, sample_next: bool = False) -> dict[str, Any]:
    """Evaluate M_t. sample_next: the same engines then sample for iteration t + 1; its stage finds them done."""
    from megatron_stepkto.evaluation.stage import OUTPUTS, evaluate_model
    from megatron_stepkto.judging.stage import check_judge
    from megatron_stepkto.sampling.draw import draw_all

    stage, model = evaluation_of(run, t), run.model(t)
    problems = stage.inputs["problems"]
    shared = dict[str, Any]()

    def drawing() -> Drawing:
        return evaluation_drawing_of(run, t, model)

    def check() -> None:
        assert run.recipe.judge is not None
        drawing().check()
        check_judge(run.recipe.judge, model, stage.directory, problems)

    def work() -> Result:
        row = evaluate_model(model, model_name(t), problems, run.recipe, stage.directory, hashes=run.folder.hashes)
        return Result([stage.directory / name for name in OUTPUTS], {"dtype": row.get("dtype"), **shared})

    def together() -> None:
        others = begin_sampling(run, t + 1) if sample_next else []
        drawn = draw_all([drawing(), *others])
        for other in others:
            if other.title in drawn:
                shared["time_includes"] = other.title

    run.run(stage, work, together=together, check=check)
    return dict(read_json(stage.directory / METRICS, Row))


# --- what all of them need ------------------------------------------------------------------------------------------


def check_fits(model: Path, recipe: recipes.Recipe) -> None:
    """Raises UserError for a model that cannot be trained in this layout on any machine."""
    from megatron_stepkto.architectures.adapters import adapted_linears
    from megatron_stepkto.architectures.layout import check_layout
    from megatron_stepkto.checkpoints.adapter import check_adapter, read_adapter
    from megatron_stepkto.checkpoints.convert import read_model_config

    config, entries = read_model_config(model)
    check_layout(config, recipe.train, recipe.place)
    if lora := recipe.train.lora:
        key = "train.lora.targets"
        linears = adapted_linears(entries, lora.targets, f"{recipe.place(key)}: {key}")
        if lora.start:
            check_adapter(read_adapter(lora.start), linears, lora)


# Those that take an iteration from 1; evaluate also takes 0, for M0.
STAGES: dict[str, Callable[[Run, int], object]] = {
    "problems": problems_stage,
    "sample": sample_stage,
    "judge": judge_stage,
    "dataset": dataset_stage,
    "train": train_stage,
    "convert": convert_stage,
}
