"""A recipe's keys: the sections that are small, and the whole recipe. ``file.py`` reads them from YAML.

Paths of inputs are relative to the recipe's folder (``output`` to the working directory). docs/recipe.md lists all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.judge_keys import (
    CombinedJudge,
    Judging,
    LLMJudge,
    MonteCarloJudge,
    PRMJudge,
    ProcessJudge,
    RewardModel,
    RuleJudge,
)
from megatron_stepkto.recipe.sample_keys import Sampling
from megatron_stepkto.recipe.section import (
    Added,
    Dtype,
    RecipePath,
    RecipePaths,
    Section,
    TextPath,
    Unkeyed,
    deciding,
    unkeyed,
)
from megatron_stepkto.recipe.templates import TEMPLATES
from megatron_stepkto.recipe.train_keys import FP8, Log, LoRA, Loss, Method, Optimizer, Parallel, Recompute, Training

__all__ = [
    "FP8", "RUN_NAME", "CombinedJudge", "Dataset", "Dtype", "Evaluation", "Import", "Judging", "LLMJudge", "LoRA",
    "Log", "Loss", "Measure", "Method", "MonteCarloJudge", "Optimizer", "PRMJudge", "Parallel", "Problems",
    "ProcessJudge", "Prompt", "Recipe", "Recompute", "RewardModel", "RuleJudge", "Sampling", "Section", "Training",
    "WarmUp", "deciding", "nearest_place", "unkeyed",
]  # fmt: skip


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Import(Section):
    """Solutions judged elsewhere: they replace the sample and judge stages."""

    format: str = Field(description="format of the file")
    path: RecipePath = Field(description="the file or folder to import")


class Problems(Section):
    """Where problems come from: the built-in generator, or JSON lines of Problem records per split."""

    source: Literal["chained_arithmetic", "files", "imports"] = Field(
        description="built-in generator, JSON lines of problems, or solutions that were judged elsewhere"
    )
    train: RecipePath | None = Field(None, description="source: files: problems to train on")
    dev: RecipePaths = Field([], description="source: files: problems to choose settings on; one file or several")
    test: RecipePaths = Field([], description="source: files: problems to report results on; one file or several")
    imports: list[Import] = Field([], description="source: imports: files of judged solutions")
    per_iteration: int | None = Field(None, ge=1, description="train problems per iteration; null: all of them")
    apart_from: list[RecipePath] = Field([], description="further evaluation sets that must be kept out of training")
    overlap: Literal["exact", "13gram"] = Field("exact", description="what counts as the same problem in apart_from")
    held_out_share: float = Field(
        0.0, ge=0, lt=1, description="share of problems kept out of training, for measuring only"
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source == "files" and self.train is None:
            raise ValueError("source: files needs the key train (JSON lines of problems)")
        if self.source == "imports" and not self.imports:
            raise ValueError("source: imports needs the key imports (a list of {format, path})")
        if self.source == "chained_arithmetic" and self.per_iteration is None:
            raise ValueError("source: chained_arithmetic needs the key per_iteration: the generator never ends")
        if self.imports and self.source != "imports":
            raise ValueError(f"imports is read with source: imports alone, and source is {self.source}")
        if self.source == "chained_arithmetic" and (self.train or self.dev or self.test):
            raise ValueError("train, dev and test are read with source: files; the generator makes its own problems")
        return self


class Prompt(Section):
    """Text of a prompt; ``{problem}`` is replaced. With ``chat`` it is the user turn of the chat template.

    ``template`` is a text, or the name of one (templates.py): plain, boxed, qwen_math, llama_math, minerva, gsm8k.
    """

    template: Annotated[str, AfterValidator(lambda value: TEMPLATES.get(value, value))] = Field(
        TEMPLATES["plain"], description="text with {problem}, or the name of a template"
    )
    chat: bool = Field(False, description="make it the user turn of the model's chat template")
    system: str | None = Field(None, description="chat: true: system turn; null: the chat template's own")

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if "{problem}" not in self.template:
            raise ValueError(f"template must contain {{problem}} or be one of {', '.join(TEMPLATES)}")
        if self.system is not None and not self.chat:
            raise ValueError("system goes with chat: true; write it into template, or set chat: true")
        return self


def _iteration(number: str) -> str:
    if not re.fullmatch("[1-9][0-9]*", number):
        raise ValueError("expected the number of an iteration, from 1")
    return number


class Dataset(Section):
    exclude: dict[Annotated[str, AfterValidator(_iteration)], RecipePath] = Field(
        {}, description="by iteration, files of sample ids, one per line, that take no part"
    )
    wrong_per_right: Added[float | None] = Field(
        None, ge=0, description="wrong solutions kept of one problem, for each right one of it; null: all"
    )
    max_examples_per_problem: int | None = Field(None, ge=1, description="examples kept of one problem; null: all")
    max_tokens: int | None = Field(
        None, ge=2, description="prompt + response; longer examples are dropped and counted; null: none"
    )
    kl_pair_share: float = Field(1.0, ge=0, le=1, description="share of examples that carry a KL pair")
    right_solutions: Literal["any", "no_wrong_step"] = Field(
        "any", description="right solutions that rft trains on and pairs choose: any, or those without a wrong step"
    )
    pairs_per_problem: int = Field(4, ge=1, description="preference pairs per problem (DPO, IRPO)")
    flip_step_labels: Added[float] = Field(
        0.0, ge=0, le=1, description="share of step labels flipped for training: a simulated judge's error"
    )


class Measure(Section):
    split: Literal["dev", "test"] = Field("test", description="the problems that are measured on")
    k: int = Field(8, ge=1, description="samples per problem for maj@k and pass@k")
    temperature: float = Field(0.7, gt=0, description="sampling temperature of the k samples; pass@1 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling of the k samples; 1: off")
    num_problems: int | None = Field(
        None, ge=1, description="of each file of the split, the first ones that are measured on; null: all"
    )


class Evaluation(Measure):
    models: Unkeyed[Literal["all", "first_and_last"]] = Field(
        "all", description="which of M0, M1, ... a run measures; stepkto evaluate measures any"
    )


def _supervised(training: Any) -> Any:
    """The section with a warm-up's method where it names none; methods/registry.py checks one that it names."""
    return {"method": "rft", **training} if isinstance(training, dict) else training


class WarmUp(Section):
    """Makes M0 by training on solutions with plain next-token loss: from random weights, or from initial_model.

    With ``architecture`` and ``tokenizer`` a new model trains on the student's or imported solutions. With
    ``solutions`` the model of the key initial_model trains on those (supervised fine-tuning).
    """

    architecture: dict[str, Any] | None = Field(
        None, description="of a new model: keys of the Hugging Face config.json; vocab_size is filled in"
    )
    tokenizer: Literal["chained_arithmetic", "byte_level_bpe"] | None = Field(
        None, description="of a new model: the miniature task's words, or byte-level BPE trained on problems.imports"
    )
    solutions: list[RecipePath] = Field(
        [], description="JSON lines of problems with their solution: initial_model is trained on these"
    )
    vocab_size: int = Field(512, ge=300, description="tokens of a byte_level_bpe tokenizer")
    corpus_size: int | None = Field(None, ge=1, description="solutions of the simulated student (chained_arithmetic)")
    training: Annotated[Training, BeforeValidator(_supervised)] = Field(
        description="how M0 is trained: the keys of the section train; its method is rft"
    )

    @model_validator(mode="after")
    def _check_corpus(self) -> Self:
        if self.training.lora is not None:
            raise ValueError("training.lora: a warm-up trains all weights; remove it, and set train.lora")
        new = {"architecture": self.architecture, "tokenizer": self.tokenizer, "corpus_size": self.corpus_size}
        given = [name for name, value in new.items() if value is not None]
        if self.solutions and given:
            raise ValueError(
                f"solutions train initial_model, and {', '.join(given)} are of a new model: remove one or the other"
            )
        if self.solutions:
            return self
        if self.architecture is None or self.tokenizer is None:
            raise ValueError(
                "give solutions, to train initial_model on them, or architecture and tokenizer, to make a new model"
            )
        if (self.tokenizer == "chained_arithmetic") != (self.corpus_size is not None):
            raise ValueError(
                "corpus_size goes with tokenizer: chained_arithmetic, whose student writes that many solutions; "
                "with byte_level_bpe the corpus is the imported right solutions"
            )
        return self


class Recipe(Section):
    name: str = Field(pattern=RUN_NAME, description="name of the run's folder")
    seed: int = Field(0, description="random seed of sampling, training, and the choice and order of problems")
    iterations: int = Field(1, ge=1, description="T: M_1 to M_T are trained")
    output: TextPath = Field(Path("runs"), description="folder of runs, relative to the working directory")
    initial_model: RecipePath | None = Field(
        None, description="Hugging Face folder of M0, or of the model that warm_up trains on solutions to make M0"
    )
    problems: Problems = Field(description="where problems come from")
    prompt: Prompt = Field(Prompt(), description="how a problem is put to the model")
    sample: Sampling | None = Field(None, description="how solutions are sampled")
    judge: Judging | None = Field(None, description="what labels steps and answers")
    dataset: Dataset = Field(Dataset(), description="which examples train")
    train: Training = Field(description="layout, optimizer and loss")
    evaluate: Evaluation | None = Field(None, description="held-out problems for M0, M1, ...; null: no evaluation")
    warm_up: WarmUp | None = Field(None, description="makes M0 by supervised training; null: initial_model is M0")
    # The place of each key; () is the whole file. Empty for a recipe that came from no file.
    _places: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        if self.initial_model is None and self.warm_up is None:
            raise ValueError("give initial_model (a Hugging Face folder) or warm_up (which makes one)")
        if self.initial_model is None and self.warm_up is not None and self.warm_up.solutions:
            raise ValueError("warm_up.solutions train initial_model, a Hugging Face folder: give initial_model")
        if self.warm_up is not None and self.warm_up.solutions and self.train.lora and self.train.lora.start:
            raise ValueError(
                "train.lora.start is an adapter of initial_model, whose weights warm_up.solutions change: remove one"
            )
        sampled = self.problems.source != "imports"
        if sampled and (self.sample is None or self.judge is None):
            raise ValueError(f"problems.source: {self.problems.source} needs the sections sample and judge")
        if not sampled and (self.sample or self.evaluate or self.iterations > 1):
            raise ValueError("problems.source: imports takes one iteration and no section sample or evaluate")
        room, limit = self.train.micro_batch_tokens, self.dataset.max_tokens
        if self.sample and self.sample.max_tokens >= room:
            share = f"train.micro_batch_tokens ({room}): a prompt and its response share a micro-batch"
            if limit is None:
                raise ValueError(
                    f"sample.max_tokens ({self.sample.max_tokens}) must be smaller than {share}; change one of them, "
                    "or set dataset.max_tokens, above which examples are dropped"
                )
            if limit > room:
                raise ValueError(f"dataset.max_tokens ({limit}) must not be larger than {share}; change one of them")
        if self.sample and self.sample.is_rounded and self.sample.gap_problems == 0:
            raise ValueError(
                "with sample.quantization or sample.kv_cache_dtype the sampler is not quite the model that trains; "
                "set sample.gap_problems to 1 or more: training then reports the gap and warns above train.max_gap"
            )
        if self.evaluate and self.problems.source == "files" and not getattr(self.problems, self.evaluate.split):
            raise ValueError(
                f"evaluate.split is {self.evaluate.split}, so problems.{self.evaluate.split} must name a file"
            )
        if self.evaluate and self.problems.source == "chained_arithmetic" and self.evaluate.num_problems is None:
            raise ValueError(
                "problems.source: chained_arithmetic needs evaluate.num_problems: the generator never ends"
            )
        return self

    def measured(self) -> list[int]:
        """T of each M_T that a run measures."""
        if self.evaluate is None:
            return []
        return [0, self.iterations] if self.evaluate.models == "first_and_last" else [*range(self.iterations + 1)]

    @property
    def run_dir(self) -> Path:
        return self.output / self.name

    def pretrained(self) -> Path | None:
        """The folder initial_model where a warm-up trains it to make M0; None: it is M0, or a new model becomes M0.

        Raises:
            UserError: there is no such folder.
        """
        return self.given_model() if self.warm_up is not None and self.warm_up.solutions else None

    def given_model(self) -> Path | None:
        """The folder initial_model; None: warm_up makes M0 from random weights.

        Raises:
            UserError: there is no such folder.
        """
        if self.initial_model is not None and not self.initial_model.is_dir():
            raise UserError(
                f"{self.place('initial_model')}: initial_model: expected a Hugging Face folder, found none at "
                f"{self.initial_model}; set it in the recipe, or remove it and give warm_up"
            )
        return self.initial_model

    def place(self, key: str) -> str:
        """file:line (or --set) of a dotted key, or of the nearest section around it: for errors found later."""
        parts = tuple(int(part) if part.isdecimal() else part for part in key.split("."))  # imports.0 is in a list
        return nearest_place(parts, self._places or {(): "recipe"})


def nearest_place(location: tuple[str | int, ...], places: dict[tuple[str | int, ...], str]) -> str:
    """file:line (or --set) of a key, or of the nearest section around it that has one."""
    return next(places[location[:n]] for n in range(len(location), -1, -1) if location[:n] in places)
