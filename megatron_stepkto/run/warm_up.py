"""Make M0 by supervised training, with the same trainer as every iteration: the stages of the folder M0.

A new model gets a tokenizer, random weights and a corpus; initial_model gets a corpus alone, of ``warm_up.solutions``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import write_examples
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import Problem, TrainExample, TrainStep, read_rows
from megatron_stepkto.base.stage import Result, Stage
from megatron_stepkto.methods.dataset import build_dataset
from megatron_stepkto.problems.chained_arithmetic.student import corpus
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.problems.datasets import to_problem
from megatron_stepkto.problems.source import check_solutions_apart, evaluation_sets
from megatron_stepkto.recipe import keys as recipes
from megatron_stepkto.recipe.prompts import Prompts, load_tokenizer

if TYPE_CHECKING:
    from megatron_stepkto.run.folder import Run
    from megatron_stepkto.training.job import Advice


def _settings(run: Run) -> recipes.WarmUp:
    if run.recipe.warm_up is None:
        raise UserError("the section warm_up says how M0 is made, and the recipe has none; add it")
    return run.recipe.warm_up


def tokenizer_stage(run: Run) -> None:
    """M0/tokenizer: the miniature task's word tokenizer, or a byte-level BPE trained on the imported texts."""
    from megatron_stepkto.judging.imported import read_imports
    from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe

    warm_up = _settings(run)
    assert warm_up.tokenizer is not None
    directory = run.folder.m0("tokenizer")
    out = directory / "model"
    sources = run.recipe.problems.imports
    byte_level = warm_up.tokenizer == "byte_level_bpe"
    if byte_level and not sources:
        raise UserError("warm_up.tokenizer: byte_level_bpe is trained on problems.imports, which is empty")

    def work() -> Result:
        if byte_level:
            solutions = read_imports(sources, quarantine=run.quarantine).solutions
            train_byte_level_bpe((f"{s.problem}\n{s.text}" for s in solutions), warm_up.vocab_size, out)
        else:
            build_tokenizer(out)
        return Result([out])

    settings: dict[str, Any] = {"tokenizer": warm_up.tokenizer}
    if byte_level:
        settings |= {"vocab_size": warm_up.vocab_size, "formats": [source.format for source in sources]}
    inputs = {str(i): source.path for i, source in enumerate(sources)} if byte_level else {}
    run.run(Stage("M0 tokenizer", directory, settings, inputs), work)


def make_m0(run: Run) -> None:
    """M0/initial (random weights; none for a pretrained model), M0/corpus, M0/train and M0/convert."""
    from megatron_stepkto.run.folder import examples_at
    from megatron_stepkto.run.stage_keys import training_key
    from megatron_stepkto.run.stages import convert
    from megatron_stepkto.training.launch import train
    from megatron_stepkto.training.requirements import Ranks, check_training

    settings, seed = _settings(run).training, run.recipe.seed
    model = run.pretrained or _random_weights(run)
    if run.pretrained:
        _corpus_of_solutions(run, model)
    else:
        _corpus_of_new_model(run)

    training = run.folder.m0("train")
    stage = Stage(
        "M0 train",
        training,
        {"train": training_key(settings), "seed": seed},
        {"model": model, "train": examples_at(_corpus(run))},
        run.folder.hashes,
    )
    here = Ranks(settings=settings, model=model, ranks=settings.parallel.ranks)
    run.run(stage, lambda: train(stage, settings, seed, advice=_not_finite(run)), check=lambda: check_training(here))

    convert(run, "M0 convert", training / "final", run.folder.m0("convert") / "model")


def _not_finite(run: Run) -> Advice:
    """How to go on where a number is not finite in the training of M0."""
    from megatron_stepkto.training.job import Advice

    if run.pretrained:  # ids of write_solutions
        without = (
            "take these rows out of warm_up.solutions (solutions-0/3 is the first file's fourth) and add `--force`"
        )
    elif run.recipe.problems.source == "imports":
        without = (
            "leave these records out: write their ids to a file, one per line, and add `--set dataset.exclude.1=FILE "
            "--force`"
        )
    else:
        without = "choose another seed and add `--force`"
    return Advice(
        without_records=without,
        lower_rate="lower the learning rate: add `--set warm_up.training.optimizer.lr=LR --force`",
    )


def _corpus(run: Run) -> Path:
    return run.folder.m0("corpus") / "train"


def _random_weights(run: Run) -> Path:
    """M0/initial; returns the model's folder."""
    architecture, seed = _settings(run).architecture, run.recipe.seed
    assert architecture is not None
    tokenizer, initial = run.tokenizer_folder, run.folder.m0("initial")
    stage = Stage("M0 initial weights", initial, {"architecture": architecture, "seed": seed}, {"tokenizer": tokenizer})
    run.run(stage, lambda: Result([initialise(architecture, tokenizer, initial / "model", seed)]))
    return initial / "model"


def _corpus_of_new_model(run: Run) -> None:
    """M0/corpus: of the imported right solutions, or of what the simulated student writes."""
    from megatron_stepkto.run.stage_keys import dataset_key

    recipe, out = run.recipe, _corpus(run)
    seed, share, size = recipe.seed, recipe.problems.held_out_share, _settings(run).corpus_size
    tokenizer, judged = run.tokenizer_folder, run.folder.judged(1)
    imported = recipe.problems.source == "imports"

    def work() -> Result:
        if imported:
            counts = build_dataset(
                judged, out, None, recipe.dataset, "rft", share, seed, excluded=inputs.get("exclude")
            )
            return Result([out], counts)
        assert size is not None
        return Result([out], {"examples": write_corpus(size, seed, tokenizer, recipe.prompt, out)})

    inputs = {"tokenizer": tokenizer}
    if imported:
        inputs |= {"judged": judged} | run.excluded(1)
        settings = {"dataset": dataset_key(recipe.dataset, "rft"), "held_out_share": share, "seed": seed}
    else:
        settings = {"corpus_size": size, "prompt": recipe.prompt.model_dump(mode="json"), "seed": seed}
    run.run(Stage("M0 corpus", out.parent, settings, inputs), work)


def _corpus_of_solutions(run: Run, model: Path) -> None:
    """M0/corpus: of the files warm_up.solutions, none of whose problems may be in an evaluation set."""
    recipe, out, files = run.recipe, _corpus(run), _settings(run).solutions
    limit = recipe.dataset.max_tokens
    settings: dict[str, Any] = {"prompt": recipe.prompt.model_dump(mode="json"), "max_tokens": limit}
    inputs = {"tokenizer": model} | {f"solutions-{number}": path for number, path in enumerate(files)}
    inputs |= evaluation_sets(recipe.problems, settings)

    def work() -> Result:
        skip = run.quarantine is not None
        shared = check_solutions_apart(recipe.problems, files, allow=run.allow_overlap, skip_bad=skip)
        prompts = Prompts.of(recipe.prompt, model)
        return Result([out], {**write_solutions(files, prompts, limit, out, run.quarantine), **shared})

    run.run(Stage("M0 corpus", out.parent, settings, inputs), work)


def initialise(architecture: dict[str, Any], tokenizer: Path, output: Path, seed: int) -> Path:
    """Random weights of a Hugging Face architecture, with the tokenizer's vocabulary and special tokens.

    Raises:
        UserError: transformers does not accept the architecture's keys.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    tokens = load_tokenizer(tokenizer)
    keys = {
        **architecture,
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    try:
        config = AutoConfig.for_model(**keys)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"warm_up.architecture: transformers refuses it: {error}; give model_type and that model's config.json keys"
        ) from None
    logging.disable_progress_bar()  # one line of noise for one small file
    torch.manual_seed(stable_hash(seed, "initial weights") % 2**31)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(output)
    tokens.save_pretrained(output)
    return output


def write_corpus(size: int, seed: int, tokenizer: Path, prompt: recipes.Prompt, output: Path) -> int:
    """The simulated student's solutions as examples."""
    prompts = Prompts.of(prompt, tokenizer)
    written = enumerate(corpus(size, stable_hash(seed, "corpus") % 2**31))
    return write_examples(
        output, (_example(f"corpus/{number}", problem, solution, prompts) for number, (problem, solution) in written)
    )


def write_solutions(
    files: Sequence[Path], prompts: Prompts, max_tokens: int | None, output: Path, quarantine: Path | None = None
) -> dict[str, int]:
    """The solutions in files of problems as examples, each with its end token.

    Args:
        max_tokens: prompt + response; longer examples are left out and counted. None: no limit.

    Raises:
        UserError: a row has no solution or holds special tokens (file:line), or no example is short enough.
    """
    counts = {"examples": 0, "too_long": 0, "tokens": 0}

    def examples() -> Iterator[TrainExample]:
        for number, path in enumerate(files):
            rows = read_rows(path, lambda row: _with_solution(row, prompts), quarantine=quarantine)
            for line, problem in enumerate(rows):
                assert problem.solution is not None
                example = _example(f"solutions-{number}/{line}", problem, problem.solution, prompts)
                length = len(example.prompt_token_ids) + len(example.token_ids)
                if max_tokens is not None and length > max_tokens:
                    counts["too_long"] += 1
                    continue
                counts["tokens"] += length
                yield example

    counts["examples"] = write_examples(output, examples())
    if not counts["examples"]:
        raise UserError(
            f"{', '.join(map(str, files))}: all {counts['too_long']} solutions are longer than dataset.max_tokens "
            f"({max_tokens}) with their prompts; raise it"
        )
    return counts


def _with_solution(row: dict[str, Any], prompts: Prompts) -> Problem:
    problem = prompts.check(to_problem(row))
    if problem.solution is None or not problem.solution.strip():
        raise ValueError("expected a solution under the key solution, or before #### under answer, found none")
    prompts.check_response(problem.solution)
    return problem


def _example(example_id: str, problem: Problem, solution: str, prompts: Prompts) -> TrainExample:
    """One step, as the supervised loss does not read steps."""
    response = [*prompts.tokenizer.encode(solution, add_special_tokens=False), prompts.end_token]
    return TrainExample(
        example_id=example_id,
        problem_id=problem.problem_id,
        prompt_token_ids=prompts.token_ids(problem.problem),
        token_ids=response,
        steps=[TrainStep(token_start=0, token_end=len(response), label=None)],
        outcome=1,
    )
