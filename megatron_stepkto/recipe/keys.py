"""A recipe's keys: every one is declared here. ``file.py`` reads them from YAML.

Paths of inputs are relative to the recipe's folder (``output`` to the working directory).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.recipe.templates import TEMPLATES

Method = str  # a name of methods/registry.py, which checks it, and the keys beside it, right after loading


def _resolve(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path())
    return Path(os.path.abspath(folder / path))


def _path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("expected a path")
    return Path(value)


TextPath = Annotated[Path, BeforeValidator(_path)]
RecipePath = Annotated[TextPath, AfterValidator(_resolve)]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]


class Section(BaseModel):
    # strict: true is no number, "3" neither, and a list is no text
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Import(Section):
    """Solutions judged elsewhere: they take the place of the sample and judge stages."""

    format: str
    path: RecipePath


class Problems(Section):
    """Where problems come from: the built-in generator, or JSON lines of Problem records per split."""

    source: Literal["chained_arithmetic", "files", "imports"]
    train: RecipePath | None = None
    dev: RecipePath | None = None
    test: RecipePath | None = None
    imports: list[Import] = []
    per_iteration: int | None = Field(None, ge=1, description="train problems per iteration; null: all of them")
    apart_from: list[RecipePath] = Field([], description="further evaluation sets whose problems must not train")
    overlap: Literal["exact", "13gram"] = Field("exact", description="what counts as the same problem there")
    held_out_share: float = Field(0.0, ge=0, lt=1, description="share of problems whose examples only measure")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source == "files" and self.train is None:
            raise ValueError("source: files needs the key train (JSON lines of problems)")
        if self.source == "imports" and not self.imports:
            raise ValueError("source: imports needs the key imports (a list of {format, path})")
        if self.source == "chained_arithmetic" and self.per_iteration is None:
            raise ValueError("source: chained_arithmetic needs the key per_iteration: the generator never ends")
        return self


def _named_template(value: str) -> str:
    return TEMPLATES.get(value, value)


class Prompt(Section):
    """Text of a prompt; ``{problem}`` is replaced. With ``chat`` it is the user turn of the chat template.

    ``template`` is a text, or the name of one (templates.py): plain, boxed, qwen_math, llama_math, minerva, gsm8k.
    """

    template: Annotated[str, AfterValidator(_named_template)] = TEMPLATES["plain"]
    chat: bool = False
    system: str | None = None

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if "{problem}" not in self.template:
            raise ValueError(f"template must contain {{problem}} or be one of {', '.join(TEMPLATES)}")
        if self.system is not None and not self.chat:
            raise ValueError("system goes with chat: true; write it into template, or set chat: true")
        return self


class Sampling(Section):
    backend: Literal["vllm", "transformers"] = "vllm"
    num_samples: int = Field(8, ge=1, description="K, solutions per problem")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(ge=1)
    workers: int = Field(1, ge=1, description="processes, each with its own engine")
    chunk_problems: int = Field(32, ge=1, description="problems in one request batch: the unit of resuming")
    dtype: Dtype = Field("auto", description="auto: of the weights; on a CPU without units for it float32")
    tensor_parallel: int = Field(1, ge=1, description="GPUs per engine")
    stall_timeout_s: float = Field(600.0, gt=0, description="an engine that makes no token for so long starts anew")
    gap_problems: int = Field(8, ge=0, description="problems whose samples carry log-probs for the trainer to compare")


class RuleJudge(Section):
    """Exact rules: of the miniature task; of the equations in a step; none judges nothing."""

    kind: Literal["chained_arithmetic", "equations", "none"]


class LLMJudge(Section):
    """A language model behind an OpenAI-compatible server gives a verdict on every step (docs/judges.md)."""

    kind: Literal["llm"]
    base_url: str = Field(min_length=1, description="such as http://host:8000/v1; several servers: commas between")
    model: str = Field(min_length=1, description="its name at the server")
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    prompt: RecipePath | None = Field(None, description="Jinja template; null: judging/prompts/step_judge.txt")
    votes: int = Field(1, ge=1, description="answers per solution")
    threshold: float = Field(0.5, ge=0.5, le=1, description="share of the votes that a label must exceed; 1: all")
    temperature: float = Field(0.6, ge=0)
    max_tokens: int = Field(4096, ge=1, description="of one answer, thinking included")
    comment_chars: int = Field(200, ge=0, description="length of the comment before each verdict; 0: none")
    schema_key: Literal["response_format", "structured_outputs"] = "response_format"
    request: dict[str, Any] = Field({}, description="further keys of every request, such as chat_template_kwargs")
    concurrency: int = Field(64, ge=1, description="requests under way at a time")
    timeout_s: float = Field(600.0, gt=0, description="of one request")
    max_outage_s: float = Field(1800.0, gt=0, description="how long to wait for servers none of which answers")
    retries: int = Field(6, ge=0, description="further attempts after an answer that is not a verdict on every step")
    reported_model: str | None = Field(None, description="the model's name in the server's answers; null: model")

    @model_validator(mode="after")
    def _check_votes(self) -> Self:
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(f"votes: {self.votes} needs temperature > 0: without it all answers are the same")
        return self


class PRMJudge(Section):
    """A Hugging Face process reward model: the probability that a step is right."""

    kind: Literal["prm"]
    model: RecipePath = Field(description="Hugging Face folder; with base_url only its tokenizer is read")
    convention: Literal["qwen_math_prm", "math_shepherd"]
    threshold: float = Field(0.5, ge=0, le=1, description="probability from which a step is right")
    wrong_below: float | None = Field(None, ge=0, le=1, description="below: wrong, up to threshold: null")
    base_url: str | None = Field(None, description="vLLM servers with --runner pooling; null: transformers, here")
    served_name: str | None = Field(None, description="the model's name at the server; null: the folder's path")
    reported_model: str | None = Field(None, description="its name in the server's answers; null: the same")
    api_key_env: str | None = None
    dtype: Dtype = Field("auto", description="auto: of the weights; on a CPU without units for it float32")
    workers: int = Field(1, ge=1, description="processes, each with the model")
    batch_tokens: int = Field(16384, ge=1, description="tokens in one forward pass")
    concurrency: int = Field(64, ge=1, description="requests under way at a time")
    timeout_s: float = Field(600.0, gt=0, description="of one request")
    max_outage_s: float = Field(1800.0, gt=0, description="how long to wait for servers none of which answers")
    retries: int = Field(6, ge=0, description="further attempts after an answer that is not one score per step")

    @model_validator(mode="after")
    def _check_thresholds(self) -> Self:
        if self.wrong_below is not None and self.wrong_below > self.threshold:
            raise ValueError(f"wrong_below ({self.wrong_below}) must not be above threshold ({self.threshold})")
        if self.base_url is not None and self.convention == "math_shepherd":
            raise ValueError("convention: math_shepherd reads logits of a language model: remove base_url")
        return self


class MonteCarloJudge(Section):
    """Math-Shepherd's estimate: solutions are completed from each step on; do they reach the answer?"""

    kind: Literal["monte_carlo"]
    model: RecipePath | None = Field(None, description="Hugging Face folder that completes; null: the sampler's own")
    sample: Sampling = Field(description="how completions are drawn; num_samples of them per step")
    threshold: float = Field(
        0.0, ge=0, lt=1, description="share of right completions that makes a step right when exceeded; 0: any one"
    )


ProcessJudge = Annotated[RuleJudge | LLMJudge | PRMJudge | MonteCarloJudge, Field(discriminator="kind")]


def _short_form(value: Any) -> Any:
    """``process: equations`` is ``process: {kind: equations}``."""
    return {"kind": value} if isinstance(value, str) else value


class RewardModel(Section):
    """A learned judge of whole solutions, for problems without an answer to check (judging/outcome/reward_model.py)."""

    reward_model: RecipePath = Field(description="Hugging Face folder, sequence classification with one label")
    threshold: float = Field(description="logit above which a solution is right")
    dtype: Dtype = Field("auto", description="auto: of the weights; on a CPU without units for it float32")
    workers: int = Field(1, ge=1, description="processes, each with the model")
    batch_tokens: int = Field(16384, ge=1, description="tokens in one forward pass")


class Judging(Section):
    split: Literal["line", "blank_line", "step_number", "step_heading", "sentence", "tag"] = Field(
        description="where one step ends and the next begins (steps/text.py)"
    )
    step_tag: str | None = Field(None, min_length=1, description="split: tag: the text that ends each step")
    process: Annotated[ProcessJudge, BeforeValidator(_short_form)] = Field(description="who labels the steps")
    outcome: RewardModel | None = Field(None, description="judges solutions of problems without an answer")
    after_first_error: Literal["keep", "drop"] = Field("keep", description="labels behind the first wrong step")
    workers: int = Field(2, ge=1, description="processes that split, apply rules and compare answers")
    timeout_s: float = Field(3.0, gt=0, description="CPU seconds of one check; past it: undecided")

    @model_validator(mode="after")
    def _check_tag(self) -> Self:
        if (self.split == "tag") != (self.step_tag is not None):
            raise ValueError("split: tag and step_tag go together: give both, or neither")
        return self


class Dataset(Section):
    max_examples_per_problem: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=2, description="prompt + response; longer examples are dropped and counted")
    kl_pair_share: float = Field(1.0, ge=0, le=1, description="share of examples that carry a KL pair")
    right_solutions: Literal["any", "no_wrong_step"] = Field(
        "any", description="right solutions that rft trains on and pairs choose: any, or those without a wrong step"
    )
    pairs_per_problem: int = Field(4, ge=1, description="preference pairs per problem (DPO, IRPO)")


class Parallel(Section):
    """Megatron-Core's layout. Data parallel size = ranks / (tensor * pipeline * context).

    expert: ranks that share the experts of a mixture of experts; they are taken from the tensor- and data-parallel
    ranks of a stage. One expert is never split over ranks.
    """

    ranks: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int | None = Field(None, ge=2)
    context: int = Field(1, ge=1, description="ranks that share the tokens of each document")
    expert: int = Field(1, ge=1)
    sequence: bool = False
    distributed_optimizer: bool = False

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if self.ranks % (self.tensor * self.pipeline * self.context):
            raise ValueError(
                f"ranks ({self.ranks}) must be a multiple of tensor x pipeline x context "
                f"({self.tensor} x {self.pipeline} x {self.context})"
            )
        if self.ranks % (self.expert * self.pipeline):
            raise ValueError(
                f"ranks ({self.ranks}) must be a multiple of expert x pipeline ({self.expert} x {self.pipeline})"
            )
        if self.expert > 1 and self.context > 1:
            raise ValueError("expert and context parallelism together are not supported: set one of them to 1")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline >= 2")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence parallelism needs tensor >= 2")
        return self


class Optimizer(Section):
    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0, description="of AdamW; on matrices and embeddings, not on norms and biases")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    clip_grad: float = Field(1.0, ge=0, description="gradient norm above which gradients are scaled down; 0: never")


class Loss(Section):
    """Step-KTO's knobs (see losses.py). KTO is Step-KTO with step_weight = 0."""

    beta_outcome: float = Field(0.1, gt=0)
    beta_step: float = Field(0.1, gt=0)
    desirable_weight_outcome: float = Field(1.0, gt=0)
    undesirable_weight_outcome: float = Field(1.0, gt=0)
    desirable_weight_step: float = Field(1.0, gt=0)
    undesirable_weight_step: float = Field(1.0, gt=0)
    balance: Literal["fixed", "auto"] = Field(
        "fixed", description="auto raises one lambda per level until right over wrong pulls with 1 to 4/3 (KTO)"
    )
    outcome_weight: float = Field(1.0, ge=0)
    step_weight: float = Field(1.0, ge=0)
    step_reduction: Literal["mean", "sum"] = "mean"
    reference_point: Literal["mismatched", "batch", "none"] = "mismatched"
    nll_weight: float = Field(1.0, ge=0, description="alpha of IRPO")
    dpo_beta: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.outcome_weight == 0 and self.step_weight == 0:
            raise ValueError("outcome_weight and step_weight are both 0: nothing would train")
        return self


class FP8(Section):
    """8-bit matrix products of Transformer Engine. Loss, log-probs, reference points, embedding and head stay as they
    are; optimizer and main weights stay in fp32."""

    format: Literal["e4m3", "hybrid"] = Field("hybrid", description="hybrid: e4m3 forward, e5m2 gradients")
    scaling: Literal["delayed", "current", "blockwise", "mxfp8"] = Field(
        "current", description="of a tensor by its history or its own maximum, of 128-value or 32-value blocks"
    )
    bf16_layers_at_start: int = Field(0, ge=0)
    bf16_layers_at_end: int = Field(0, ge=0)
    weights: bool = Field(
        False, description="keep and gather matrices in FP8; checkpoints hold the main weights in bf16"
    )

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.scaling == "delayed" and (self.bf16_layers_at_start or self.bf16_layers_at_end):
            raise ValueError("scaling: delayed cannot leave first or last layers in bf16; choose current or blockwise")
        if self.weights and self.scaling not in ("current", "blockwise"):
            # delayed would round the weights that are loaded by a scale of 1; megatron-core cannot gather mxfp8's
            raise ValueError(f"weights: true goes with scaling: current or blockwise, got {self.scaling}")
        return self


class Log(Section):
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = Field(True, description="event files in the train stage's folder tensorboard/")
    wandb: str | None = Field(None, min_length=1, description="project of Weights & Biases (package wandb)")
    entropy: bool = Field(False, description="mean entropy at response tokens (one more pass over the logits)")


class Training(Section):
    method: Method = "step_kto"
    parallel: Parallel = Parallel()
    optimizer: Optimizer
    loss: Loss = Loss()
    epochs: int = Field(1, ge=1)
    max_updates: int | None = Field(None, ge=1)
    global_batch_size: int = Field(ge=1, description="examples per update (pairs for DPO and IRPO)")
    micro_batch_tokens: int = Field(4096, ge=1, description="tokens that one packed micro-batch may hold")
    pad_documents_to: int = Field(
        1, ge=1, description="tokens: each document is padded to a multiple of so many; 1: packed without gaps"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    reference: Literal["previous", "initial"] = Field("previous", description="the model the log-ratios are taken to")
    checkpoint_every: int = Field(50, ge=1, description="updates")
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones; older ones are removed")
    async_checkpoints: bool = Field(False, description="write checkpoints in processes beside the training")
    recompute: bool = False
    transformer_engine: Literal["required", "auto", "off"] = Field(
        "auto",
        description="layers of Transformer Engine: insist, use them for bfloat16 on a GPU where installed, or never",
    )
    apex: Literal["required", "auto", "off"] = Field(
        "auto", description="NVIDIA Apex's fused weight gradients and Adam"
    )
    fp8: FP8 | None = None
    max_gap: float = Field(0.05, gt=0, description="nats: mean |sampler - trainer| log-prob above which the run warns")
    log: Log = Log()
    timeout_s: float = Field(600.0, gt=0, description="limit of one collective operation")

    @property
    def document_multiple(self) -> int:
        """Tokens that every document is padded to a multiple of: context parallelism cuts it into twice its ranks."""
        return math.lcm(self.pad_documents_to, 2 * self.parallel.context if self.parallel.context > 1 else 1)

    @model_validator(mode="after")
    def _check_acceleration(self) -> Self:
        if self.transformer_engine == "required" and self.dtype == "float32":
            raise ValueError(
                "transformer_engine: required goes with dtype: bfloat16: it would multiply float32 matrices in TF32, "
                "which keeps 11 bits; set dtype: bfloat16, or transformer_engine: auto"
            )
        if self.fp8 is None:
            return self
        if self.dtype != "bfloat16":
            raise ValueError(f"fp8 goes with dtype: bfloat16, got {self.dtype}")
        if self.transformer_engine == "off":
            raise ValueError("fp8 needs Transformer Engine: set transformer_engine to required or auto")
        if self.fp8.weights and not self.parallel.distributed_optimizer:
            raise ValueError(
                "fp8.weights needs parallel.distributed_optimizer: true, which holds the fp32 main weights"
            )
        return self


class Measure(Section):
    split: Literal["dev", "test"] = "test"
    k: int = Field(8, ge=1, description="samples per problem for maj@k")
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)


class Evaluation(Measure):
    num_problems: int = Field(ge=1)


class WarmUp(Section):
    """Makes M0: a new model and tokenizer, trained on solutions with plain next-token loss."""

    architecture: dict[str, Any] = Field(description="keys of the Hugging Face config.json; vocab_size is filled in")
    tokenizer: Literal["chained_arithmetic", "byte_level_bpe"]
    vocab_size: int = Field(512, ge=300, description="of a byte_level_bpe tokenizer")
    corpus_size: int | None = Field(None, ge=1, description="solutions of the simulated student (chained_arithmetic)")
    training: Training

    @model_validator(mode="after")
    def _check_corpus(self) -> Self:
        if (self.tokenizer == "chained_arithmetic") != (self.corpus_size is not None):
            raise ValueError(
                "corpus_size goes with tokenizer: chained_arithmetic, whose student writes so many solutions; "
                "with byte_level_bpe the corpus is the imported right solutions"
            )
        return self


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    iterations: int = Field(1, ge=1)
    output: TextPath = Path("runs")
    initial_model: RecipePath | None = None
    problems: Problems
    prompt: Prompt = Prompt()
    sample: Sampling | None = None
    judge: Judging | None = None
    dataset: Dataset = Dataset()
    train: Training
    evaluate: Evaluation | None = None
    warm_up: WarmUp | None = None
    # Where each key stands; () is the whole file. Empty for a recipe that came from no file.
    _places: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        if self.initial_model is None and self.warm_up is None:
            raise ValueError("give initial_model (a Hugging Face folder) or warm_up (which makes one)")
        sampled = self.problems.source != "imports"
        if sampled and (self.sample is None or self.judge is None):
            raise ValueError(f"problems.source: {self.problems.source} needs the sections sample and judge")
        if not sampled and (self.sample or self.evaluate or self.iterations > 1):
            raise ValueError("problems.source: imports takes one iteration and no section sample or evaluate")
        if self.sample and self.sample.max_tokens >= self.train.micro_batch_tokens:
            raise ValueError(
                f"sample.max_tokens ({self.sample.max_tokens}) must be smaller than train.micro_batch_tokens "
                f"({self.train.micro_batch_tokens}): a prompt and its response share a micro-batch"
            )
        if self.evaluate and self.problems.source == "files" and getattr(self.problems, self.evaluate.split) is None:
            raise ValueError(
                f"evaluate.split is {self.evaluate.split}, so problems.{self.evaluate.split} must name a file"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return self.output / self.name

    def given_model(self) -> Path | None:
        """The folder initial_model; None: warm_up makes M0.

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
        return nearest_place(tuple(key.split(".")), self._places or {(): "recipe"})


def nearest_place(location: tuple[str | int, ...], places: dict[tuple[str | int, ...], str]) -> str:
    """file:line (or --set) of a key, or of the nearest section around it that has one."""
    return next(places[location[:n]] for n in range(len(location), -1, -1) if location[:n] in places)
