"""What every process judge takes, gives and says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Label, Opinion, Problem, Step
from megatron_stepkto.base.stage import input_hash
from megatron_stepkto.recipe import keys as recipe

Keys = TypeVar("Keys", bound=recipe.Section)


@dataclass(frozen=True)
class Solution:
    """A solution to judge. ``steps`` are not labelled; token ids are the sampler's own.

    Where a solution comes as text alone, the token ids are empty and so are the steps' token spans.
    """

    solution_id: str
    problem: Problem
    text: str
    steps: tuple[Step, ...]
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    finished: bool = True

    @property
    def step_texts(self) -> list[str]:
        return [self.text[step.start : step.end] for step in self.steps]


class Solutions(Protocol):
    """Solutions that are read, in order, as often as a judge asks; a file's are never all in memory."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Solution]: ...


@dataclass(frozen=True)
class Workplace:
    """Where a judge keeps its unfinished work, and what it may need from around it.

    ``directory/cache`` holds answers keyed by all that decides them: it outlives a change of the recipe.
    ``directory``: None for a judge that is asked about itself and judges nothing.
    ``model`` is the Hugging Face folder of the model that sampled. ``hashes`` keeps the hashes of large folders.
    """

    directory: Path | None = None
    model: Path | None = None
    seed: int = 0
    workers: int = 2  # processes that split, apply rules, decide answer equivalence
    timeout_s: float = 5.0
    hashes: Path | None = None

    @property
    def folder(self) -> Path:
        assert self.directory is not None, "this judge was built to be asked, not to judge"
        return self.directory

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def hash_of(self, path: Path) -> str:
        """Hash of a file's or a model folder's content: its weights may change under the same path."""
        return input_hash(path, self.hashes)


@dataclass(frozen=True)
class Resources:
    """What a judge needs of the machine that it works on.

    gpus: that it can use at once; 0: none. gpu_keys: the recipe keys whose product ``gpus`` is.
    takes_fewer: it works with fewer GPUs too, with a worker on each.
    servers: base URLs, without a slash at the end, of the servers that it asks. served: the model's name there.
    """

    gpus: int = 0
    gpu_keys: tuple[str, ...] = ()
    takes_fewer: bool = False
    servers: tuple[str, ...] = ()
    served: str | None = None


@dataclass(frozen=True)
class Typical:
    """The solutions of an iteration as a plan assumes them. All but the first two are mean tokens.

    per_problem: solutions of one problem. prompt: of the problem with its instructions. step: of one step, its share of
    ``response``. reference: of a problem's reference solution.
    """

    solutions: int
    per_problem: int
    prompt: int
    response: int
    step: int
    reference: int

    @property
    def steps(self) -> float:
        return max(1.0, self.response / self.step)


@dataclass(frozen=True)
class Work:
    """What a judge's model has to do for such solutions: for a plan, before anything is sampled.

    model: its folder, or its name at a server. read: tokens of all its forward passes, without those in a prefix cache.
    written: tokens that it generates. length: of one request, prompt and answer. gpus: that it uses at most; 0: its
    server's. batch_tokens: in one forward pass of a model that only reads; 0: an engine serves it.
    """

    model: Path
    read: float
    written: float
    length: float
    gpus: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """A step's label, and what it was decided from.

    ``votes``: single opinions (answers of a model, rollouts). ``score``: the share of "right" in the votes that say
    right or wrong, or its probability.
    ``members``: the verdicts of a combined judge's members, by name.
    """

    label: Label
    votes: tuple[Label, ...] | None = None
    score: float | None = None
    members: Mapping[str, Verdict] | None = None

    def of_step(self) -> dict[str, Any]:
        """The fields of ``Step`` that a judge fills."""
        if self.members is None:
            return self._opinion()
        opinions = {name: Opinion(**verdict._opinion()) for name, verdict in self.members.items()}
        return {**self._opinion(), "members": opinions}

    def _opinion(self) -> dict[str, Any]:
        return {"label": self.label, "votes": None if self.votes is None else list(self.votes), "score": self.score}


Verdicts = list[Verdict] | UserError  # an error: this one solution cannot be judged
Judged = Generator[Verdicts, None, None]  # closed early, it ends the processes that work for it


class ProcessJudge(ABC, Generic[Keys]):
    """Labels the steps of solutions: 1 right, 0 wrong, None not judged.

    Building one reads no file and starts nothing, so that stages and Slurm can ask it about itself.

    Args:
        settings: the keys of ``judge.process``.
        place: where it works; not needed for ``resources``.
    """

    recipe_keys: ClassVar[type[recipe.Section]]  # the class of ``settings``: by it the registry finds the judge

    def __init__(self, settings: Keys, place: Workplace | None = None) -> None:
        self.settings, self.place = settings, place or Workplace()

    @property
    @abstractmethod
    def name(self) -> str:
        """The judge's name in records and reports."""

    def key(self) -> dict[str, Any]:
        """The settings that determine the labels: a stage with another key is done again.

        Files count by content, not by path.

        Raises:
            UserError, OSError: a file cannot be read.
        """
        kept = recipe.deciding(self.settings)
        return kept | {name: {"sha256": self.content_hash(path)} for name, path in self.inputs().items()}

    def inputs(self) -> dict[str, Path]:
        """The files and folders whose content determines the labels, by the name of their key."""
        return {}

    def content_hash(self, path: Path) -> str:
        """Hash of one of ``inputs``."""
        return self.place.hash_of(path)

    def resources(self) -> Resources:
        """What it needs of the machine that it works on."""
        return Resources()

    def work(self, typical: Typical) -> Work | None:
        """What its model has to do for an iteration's solutions; None: it has no model.

        Raises:
            UserError: that is not known before it has judged some.
        """
        return None

    def members(self) -> Mapping[str, ProcessJudge[Any]]:
        """The judges whose verdicts it combines, by the names that they have in records; empty for most judges."""
        return {}

    def load(self) -> None:
        """Read what judging needs: prompts, tokenizers.

        Raises:
            UserError: a file is missing or does not fit.
        """

    def check(self) -> None:
        """Find out, before there are solutions, whether anything can be judged here and now.

        Raises:
            UserError: nothing can be judged, for any reason that ``load`` or ``judge`` would give: a server is down, a
                package is missing.
        """
        self.load()

    @abstractmethod
    def judge(self, solutions: Solutions) -> Judged:
        """One verdict per step, or the reason why a solution has none, in order; shows its progress.

        What it holds should not grow with the number of solutions; rollouts alone hold all of them.

        Raises:
            UserError: nothing can be judged (a server is down, a model is missing).
        """

    def counts(self) -> dict[str, Any]:
        """What the manifest should say of the work: requests, tokens, retries."""
        return {}


def majority(votes: Sequence[Label], threshold: float) -> Verdict:
    """The label that more than ``threshold`` of all votes give (all of them at 1.0); None where neither does.

    A vote of None counts as a vote for neither, so a tie, or too much doubt, is not judged. The score leaves such votes
    out: they do not say how right the step is.
    """
    counted = tuple(votes)
    right, wrong = counted.count(1), counted.count(0)
    score = right / (right + wrong) if right + wrong else None
    for given, label in ((right, 1), (wrong, 0)):
        if given and (given / len(counted) > threshold or given == len(counted)):
            return Verdict(1 if label else 0, counted, score)
    return Verdict(None, counted, score)


def cut_after_first_error(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Labels after the first wrong step become None; what they were decided from stays."""
    kept, wrong = [], False
    for verdict in verdicts:
        kept.append(replace(verdict, label=None) if wrong else verdict)
        wrong = wrong or verdict.label == 0
    return kept
