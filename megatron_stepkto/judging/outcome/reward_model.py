"""A learned outcome reward model: one score for a whole solution, where no answer can be checked.

A Hugging Face sequence-classification model with one label (AutoModelForSequenceClassification), as reward models
for preference data are: problem and solution go through its chat template as a user's and an assistant's turn, and
the head reads the last token. The score is the raw logit; above the recipe's threshold the solution counts as right.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_stepkto.base.dtypes import choose_dtype, gpu_count
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import read_config
from megatron_stepkto.base.progress import warn
from megatron_stepkto.judging.process.interface import Resources, Workplace
from megatron_stepkto.judging.process.prm import PRMJob, PRMRow, positions_of, score_job
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import load_tokenizer, render_chat


class OutcomeRewardModel:
    """Scores solutions in worker processes; what is scored survives a kill.

    Building one reads no file, as with a process judge (``ProcessJudge``), whose questions it answers.
    """

    def __init__(self, settings: recipe.RewardModel, place: Workplace | None = None) -> None:
        self.settings, self._place = settings, place or Workplace()
        self.name = f"reward_model:{settings.reward_model.name}"
        self.dtype: str = settings.dtype  # as asked, until the model is loaded

    def key(self) -> dict[str, Any]:
        """The settings that determine the outcomes."""
        model = {"sha256": self._place.hash_of(self.settings.reward_model)}
        return {"threshold": self.settings.threshold, "dtype": self.settings.dtype, "model": model}

    def resources(self) -> Resources:
        """What it needs of the machine that it works on."""
        return Resources(self.settings.workers, ("judge.outcome.workers",), takes_fewer=True)

    def load(self) -> None:
        """Read its config and its tokenizer.

        Raises:
            UserError: the model is not a classifier with one label, or its tokenizer has no chat template.
        """
        path = self.settings.reward_model
        config = read_config(path)
        architecture = (config.get("architectures") or ["none"])[0]
        # transformers writes the labels only where there are not two
        num_labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
        if not architecture.endswith("ForSequenceClassification") or num_labels != 1:
            raise UserError(
                f"{path}: expected a reward model (...ForSequenceClassification with one label), got {architecture} "
                f"with {num_labels} labels; name another model in judge.outcome.reward_model"
            )
        if not self._tokenizer.chat_template:
            raise UserError(f"{path}: the reward model's tokenizer has no chat template; add the model's own")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.settings.reward_model)

    def scores(self, pairs: Iterable[tuple[str, str]]) -> Iterator[float | None]:
        """The logit of each (problem, solution), in order; None for one with more tokens than the model has positions.

        The model works when the first is asked for.
        """
        settings, title = self.settings, "scoring solutions"
        limit = positions_of(settings.reward_model)
        fits: list[bool] = []

        def rows() -> Iterator[PRMRow]:
            for problem, text in pairs:
                row = self._row(problem, text)
                fits.append(len(row.token_ids) <= limit)
                if fits[-1]:
                    yield row

        chosen = choose_dtype(settings.dtype, settings.reward_model, on_cpu=not gpu_count())
        chosen.announce(title)
        self.dtype = chosen.dtype
        job = PRMJob.of(
            rows(), self._place.hash_of(settings.reward_model), self._place.cache,
            model=settings.reward_model, candidates=None, whole_solutions=True, dtype=chosen.dtype,
            batch_tokens=settings.batch_tokens, workers=settings.workers,
        )  # fmt: skip
        if too_long := fits.count(False):
            warn(
                f"{too_long} of {len(fits)} solutions are longer than the reward model's {limit} positions: not judged"
            )
        found = score_job(job, self._place.logs, title)
        for fit in fits:
            yield next(found)[0] if fit else None

    def _row(self, problem: str, text: str) -> PRMRow:
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": text}]
        chat = render_chat(self._tokenizer, turns, "judge.outcome.reward_model", generation_prompt=False)
        ids = self._tokenizer(chat, add_special_tokens=False)["input_ids"]
        return PRMRow(token_ids=[int(token) for token in ids], positions=[len(ids) - 1])
