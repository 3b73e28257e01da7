"""Make M0: a tokenizer, random weights, a corpus of solutions, and supervised training with the same trainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import write_examples
from megatron_stepkto.base.files import stable_hash
from megatron_stepkto.base.records import TrainExample, TrainStep
from megatron_stepkto.base.stage import Result, Stage
from megatron_stepkto.methods.dataset import build_dataset
from megatron_stepkto.problems.chained_arithmetic.student import corpus
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import Prompts, load_tokenizer

if TYPE_CHECKING:
    from megatron_stepkto.run.folder import Run


def _settings(run: Run) -> recipe.WarmUp:
    if run.recipe.warm_up is None:
        raise UserError("--from-scratch makes M0 as the section warm_up says, and the recipe has none; add it")
    return run.recipe.warm_up


def tokenizer_stage(run: Run) -> None:
    """M0/tokenizer: the miniature task's word tokenizer, or a byte-level BPE trained on the imported texts."""
    from megatron_stepkto.judging.imported import read_imports
    from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe

    warm_up = _settings(run)
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
    """M0/initial (random weights), M0/corpus, M0/train and M0/convert."""
    from megatron_stepkto.run.stage_keys import dataset_key, training_key
    from megatron_stepkto.run.stages import convert
    from megatron_stepkto.training.launch import train
    from megatron_stepkto.training.requirements import Ranks, check_training

    warm_up = _settings(run)
    tokenizer = run.folder.m0("tokenizer") / "model"
    seed = run.recipe.seed

    initial = run.folder.m0("initial")
    run.run(
        Stage(
            "M0 initial weights",
            initial,
            {"architecture": warm_up.architecture, "seed": seed},
            {"tokenizer": tokenizer},
        ),
        lambda: Result([initialise(warm_up.architecture, tokenizer, initial / "model", seed)]),
    )

    data = run.folder.m0("corpus")
    examples = data / "train"
    judged = run.folder.judged(1)
    imported = run.recipe.problems.source == "imports"
    share = run.recipe.problems.held_out_share

    def make_corpus() -> Result:
        if imported:
            counts = build_dataset(judged, examples, None, run.recipe.dataset, "rft", share, seed)
            return Result([examples], counts)
        assert warm_up.corpus_size is not None
        return Result(
            [examples], {"examples": write_corpus(warm_up.corpus_size, seed, tokenizer, run.recipe.prompt, examples)}
        )

    inputs = {"tokenizer": tokenizer}
    if imported:
        inputs["judged"] = judged
        settings = {"dataset": dataset_key(run.recipe.dataset, "rft"), "held_out_share": share, "seed": seed}
    else:
        prompt = run.recipe.prompt.model_dump(mode="json")
        settings = {"corpus_size": warm_up.corpus_size, "prompt": prompt, "seed": seed}
    run.run(Stage("M0 corpus", data, settings, inputs), make_corpus)

    training = run.folder.m0("train")
    stage = Stage(
        "M0 train",
        training,
        {"train": training_key(warm_up.training), "seed": seed},
        {"model": initial / "model", "train": examples},
    )
    here = Ranks(settings=warm_up.training, model=initial / "model", ranks=warm_up.training.parallel.ranks)
    run.run(stage, lambda: train(stage, warm_up.training, seed), check=lambda: check_training(here))

    convert(run, "M0 convert", training / "final", run.folder.m0("convert") / "model")


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


def write_corpus(size: int, seed: int, tokenizer: Path, prompt: recipe.Prompt, output: Path) -> int:
    """The simulated student's solutions as examples: one step each, as the supervised loss does not read steps."""
    prompts = Prompts.of(prompt, tokenizer)

    def examples() -> Iterable[TrainExample]:
        for number, (problem, solution) in enumerate(corpus(size, stable_hash(seed, "corpus") % 2**31)):
            response = [*prompts.tokenizer.encode(solution, add_special_tokens=False), prompts.end_token]
            yield TrainExample(
                example_id=f"corpus/{number}",
                problem_id=problem.problem_id,
                prompt_token_ids=prompts.token_ids(problem.problem),
                token_ids=response,
                steps=[TrainStep(token_start=0, token_end=len(response), label=None)],
                outcome=1,
            )

    return write_examples(output, examples())
