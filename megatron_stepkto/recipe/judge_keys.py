"""The section judge of a recipe: how solutions are cut into steps, and what labels steps and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_stepkto.recipe.sample_keys import Sampling
from megatron_stepkto.recipe.section import Added, Dtype, RecipePath, Section, Unkeyed


def server_urls(base_url: str) -> tuple[str, ...]:
    """The servers that a ``base_url`` names, without slashes at the end. Raises ValueError: one is not a URL."""
    urls = tuple(url.strip().rstrip("/") for url in base_url.split(",") if url.strip())
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:  # of a host or a port that cannot be
            good = False
        if not good:
            raise ValueError(f"{url!r} is not a URL; expected http://host:port/v1")
    if not urls:
        raise ValueError("expected http://host:port/v1")
    return urls


def _servers(base_url: str) -> str:
    server_urls(base_url)
    return base_url


ServerURLs = Annotated[str, AfterValidator(_servers)]


class RuleJudge(Section):
    """Exact rules: of the miniature task; of the equations in a step; none judges nothing."""

    kind: Literal["chained_arithmetic", "equations", "none"] = Field(
        description="which rule labels steps; none: no step is judged"
    )


class LLMJudge(Section):
    """A language model behind an OpenAI-compatible server gives a verdict on every step (docs/judges.md)."""

    kind: Literal["llm"] = Field(description="a language model behind a server gives a verdict on every step")
    base_url: Unkeyed[ServerURLs] = Field(description="http://host:8000/v1; several servers: commas between")
    model: str = Field(min_length=1, description="the model's name at the server")
    api_key_env: Unkeyed[str | None] = Field(None, description="environment variable that holds the API key")
    format: Added[Literal["schema", "genprm", "thinkprm", "r_prm"]] = Field(
        "schema", description="how the model was trained to judge; schema: any model, under a JSON schema"
    )
    prompt: RecipePath | None = Field(
        None, description="Jinja template; null: judging/prompts/step_judge.txt; r_prm: text with three places {}"
    )
    votes: int = Field(1, ge=1, description="answers per solution")
    threshold: float = Field(0.5, ge=0.5, le=1, description="share of the votes that a label must exceed; 1: all")
    temperature: float = Field(0.6, ge=0, description="sampling temperature of the verdicts; 0: greedy")
    max_tokens: int = Field(4096, ge=1, description="limit of one answer, thinking included")
    comment_chars: int = Field(200, ge=0, description="length of the comment before each verdict; 0: no comment")
    schema_key: Literal["response_format", "structured_outputs"] = Field(
        "response_format", description="field of the request that carries the JSON schema"
    )
    request: dict[str, Any] = Field({}, description="further fields of every request, such as chat_template_kwargs")
    concurrency: Unkeyed[int] = Field(64, ge=1, description="concurrent requests")
    timeout_s: Unkeyed[float] = Field(600.0, gt=0, description="seconds: limit of one request")
    max_outage_s: Unkeyed[float] = Field(1800.0, gt=0, description="seconds to wait while no server answers")
    retries: Unkeyed[int] = Field(
        6, ge=0, description="further attempts after an answer without a verdict on every step"
    )
    reported_model: str | None = Field(None, description="the model's name in the server's answers; null: model")

    @model_validator(mode="after")
    def _check_votes(self) -> Self:
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(f"votes: {self.votes} needs temperature > 0: without it all answers are the same")
        return self

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if self.format == "r_prm" and self.prompt is None:
            raise ValueError("format: r_prm needs prompt: a file with R-PRM's instructions (docs/judges.md)")
        if self.format in ("genprm", "thinkprm") and self.prompt is not None:
            raise ValueError(f"format: {self.format} has the prompt that the model was trained on: remove prompt")
        return self


class PRMJudge(Section):
    """A Hugging Face process reward model: the probability that a step is right."""

    kind: Literal["prm"] = Field(description="a process reward model gives each step a probability of being right")
    model: RecipePath = Field(description="Hugging Face folder; with base_url only its tokenizer is read")
    convention: Literal["qwen_math_prm", "math_shepherd"] = Field(
        description="how the model reads steps and where it gives its scores"
    )
    threshold: float = Field(0.5, ge=0, le=1, description="probability from which a step is right")
    wrong_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="probability below which a step is wrong, unjudged up to threshold; null: threshold",
    )
    base_url: Unkeyed[ServerURLs | None] = Field(
        None, description="vLLM servers with --runner pooling; null: transformers, in this process"
    )
    served_name: Unkeyed[str | None] = Field(
        None, description="the model's name at the server; null: the folder's path"
    )
    reported_model: str | None = Field(
        None, description="the model's name in the server's answers; null: the name it is asked by"
    )
    api_key_env: Unkeyed[str | None] = Field(None, description="environment variable that holds the API key")
    dtype: Dtype = Field("auto", description="auto: that of the weights; float32 on a CPU without instructions for it")
    workers: Unkeyed[int] = Field(1, ge=1, description="processes, each with the model")
    batch_tokens: Unkeyed[int] = Field(16384, ge=1, description="tokens in one forward pass")
    concurrency: Unkeyed[int] = Field(64, ge=1, description="concurrent requests")
    timeout_s: Unkeyed[float] = Field(600.0, gt=0, description="seconds: limit of one request")
    max_outage_s: Unkeyed[float] = Field(1800.0, gt=0, description="seconds to wait while no server answers")
    retries: Unkeyed[int] = Field(6, ge=0, description="further attempts after an answer without one score per step")

    @model_validator(mode="after")
    def _check_thresholds(self) -> Self:
        if self.wrong_below is not None and self.wrong_below > self.threshold:
            raise ValueError(f"wrong_below ({self.wrong_below}) must not be above threshold ({self.threshold})")
        if self.base_url is not None and self.convention == "math_shepherd":
            raise ValueError("convention: math_shepherd reads logits of a language model: remove base_url")
        return self


class MonteCarloJudge(Section):
    """Math-Shepherd's estimate: solutions are completed from each step on; do they reach the answer?"""

    kind: Literal["monte_carlo"] = Field(
        description="rollouts: a step is right if completions from it reach the answer"
    )
    model: RecipePath | None = Field(None, description="Hugging Face folder that completes; null: the sampler's own")
    sample: Sampling = Field(description="how completions are sampled; num_samples of them per step")
    threshold: float = Field(
        0.0, ge=0, lt=1, description="share of right completions that makes a step right when exceeded; 0: any one"
    )


def _short_form(value: Any) -> Any:
    """``process: equations`` is ``process: {kind: equations}``."""
    return {"kind": value} if isinstance(value, str) else value


SingleJudge = Annotated[RuleJudge | LLMJudge | PRMJudge | MonteCarloJudge, Field(discriminator="kind")]


class CombinedJudge(Section):
    """Several judges label every step; a rule makes one label of theirs, null where they disagree (docs/judges.md)."""

    kind: Literal["combine"] = Field(description="several judges label every step, and a rule combines their labels")
    judges: list[Annotated[SingleJudge, BeforeValidator(_short_form)]] = Field(
        min_length=2, description="the members; their order counts for first and confirm_wrong"
    )
    rule: Literal["all", "majority", "first", "confirm_wrong"] = Field(
        description="all: the label on which all members agree; majority: the label of more than half; first: the "
        "label of the first member that has one; confirm_wrong: the first member's label, but its 'wrong' counts only "
        "if another member agrees"
    )


ProcessJudge = Annotated[RuleJudge | LLMJudge | PRMJudge | MonteCarloJudge | CombinedJudge, Field(discriminator="kind")]


class RewardModel(Section):
    """A learned judge of whole solutions, for problems without an answer to check (judging/outcome/reward_model.py)."""

    reward_model: RecipePath = Field(description="Hugging Face folder, sequence classification with one label")
    threshold: float = Field(description="logit above which a solution is right")
    dtype: Dtype = Field("auto", description="auto: that of the weights; float32 on a CPU without instructions for it")
    workers: Unkeyed[int] = Field(1, ge=1, description="processes, each with the model")
    batch_tokens: Unkeyed[int] = Field(16384, ge=1, description="tokens in one forward pass")


class Judging(Section):
    split: Literal["line", "blank_line", "step_number", "step_heading", "sentence", "tag"] = Field(
        description="where one step ends and the next begins (steps/text.py)"
    )
    step_tag: str | None = Field(None, min_length=1, description="split: tag: the text that ends each step")
    process: Annotated[ProcessJudge, BeforeValidator(_short_form)] = Field(description="what labels the steps")
    outcome: RewardModel | None = Field(None, description="reward model for problems without an answer; null: none")
    after_first_error: Literal["keep", "drop"] = Field("keep", description="labels after the first wrong step")
    workers: Unkeyed[int] = Field(2, ge=1, description="processes that split, apply rules and compare answers")
    timeout_s: float = Field(3.0, gt=0, description="CPU seconds of one check; past it: undecided")

    @model_validator(mode="after")
    def _check_tag(self) -> Self:
        if (self.split == "tag") != (self.step_tag is not None):
            raise ValueError("split: tag and step_tag go together: give both, or neither")
        return self
