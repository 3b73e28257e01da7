"""What a method is: all that tells one from another, in one class. Importable without torch and Megatron.

A method is one file of this folder, which subclasses ``Method``, and one line of ``registry.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.methods.select import Candidates, Chosen
from megatron_stepkto.recipe import keys as recipe

if TYPE_CHECKING:  # the command line lists the methods, and must not wait for torch
    from torch import Tensor

    from megatron_stepkto.losses import Balance, LossSum, ReferencePoints
    from megatron_stepkto.megatron.batch import MicroBatch

# Where the reference points of a global batch come from: a pass over its KL pairs, the previous update's own
# log-ratios, those of all updates before this one, or nowhere (0).
Estimator = Literal["mismatched", "batch", "running", "none"]
Metrics = Mapping[str, tuple[str, str]]


class Objective(Protocol):
    """A method's loss, as the training loop calls it."""

    @property
    def betas(self) -> tuple[float, float]:
        """Of a solution's and of a step's log-ratio: beta times it is the implicit reward."""
        ...

    @property
    def balance(self) -> Mapping[str, Balance]:
        """Right against wrong in the loss, by level (outcome, step) of those that take part; empty without classes."""
        ...

    def loss(self, batch: MicroBatch, token_log_probs: Tensor, points: ReferencePoints) -> LossSum:
        """Summed over the units of a micro-batch; ``parts`` are the sums that the method's ``metrics`` name.

        Args:
            token_log_probs: of the policy at response tokens, with gradient.
        """
        ...


class Method(ABC):
    """One way to turn judged samples into weights.

    metrics maps the name of a metric to a pair of sums: numerator and denominator. The sums are those that the
    objective returns as ``parts`` of its loss, or common ones (metrics.UPDATE_SUMS; "units" counts solutions, pairs or
    tokens). Each is pooled over micro-batches and ranks before the division. A part that no metric reads is an error,
    and so is a metric whose sum the loss does not return.
    """

    name: ClassVar[str]  # train.method
    title: ClassVar[str]
    source: ClassVar[str]  # the paper
    needs: ClassVar[str]  # the least that gives an example, for a message
    loss_keys: ClassVar[frozenset[str]]  # keys of train.loss that determine the weights
    dataset_keys: ClassVar[frozenset[str]]  # keys of the section dataset that determine the examples
    metrics: ClassVar[Metrics]
    against_collapse: ClassVar[str]  # the setting that keeps right solutions likely, for a warning

    paired: ClassVar[bool] = False  # a unit is (chosen, rejected) of one problem, not one solution
    contrasts: ClassVar[bool] = False  # learns from right against wrong examples: the data must have both
    reads_steps: ClassVar[bool] = False  # labels of steps enter the loss
    uses_reference: ClassVar[bool] = True  # the loss reads log-ratios to the reference model
    reference_levels: ClassVar[tuple[str, ...]] = ()  # reference points that are logged: outcome, step

    @abstractmethod
    def select(self, by_problem: Candidates, settings: recipe.Dataset, seed: int) -> list[Chosen]:
        """The examples to train on, from judged samples by problem."""

    @abstractmethod
    def objective(self, loss: recipe.Loss, examples: Examples, used: Indices) -> Objective:
        """The loss over micro-batches.

        Args:
            used: indices of the examples that train, on all ranks, as often as they train; ``balance: auto`` weighs
                their classes.

        Raises:
            UserError: the examples do not suit the loss, for instance all are right.
        """

    def estimator(self, loss: recipe.Loss) -> Estimator:
        """Where the reference points of the loss come from."""
        return "none"

    def check_settings(self, loss: recipe.Loss) -> None:  # noqa: B027 (most methods have nothing to check)
        """Raises ValueError for keys that each are valid and make no sense together with this method."""

    def check_examples(self, examples: Examples) -> None:  # noqa: B027
        """Raises ValueError, which names the example, what was expected and what came, for another method's data."""

    def units(self, examples: Examples) -> Indices:
        """[U, 1] or, of pairs, [U, 2] indices of what must stay together: one example, or (chosen, rejected).

        Raises:
            UserError: the examples were made for another method; they would train silently, and wrongly.
        """
        fix = f"build the data set again: `stepkto dataset` with train.method: {self.name}"
        pair, has_pair = examples.pairs()
        if (other := np.flatnonzero(has_pair != self.paired)).size:
            wanted = "a" if self.paired else "no"
            name = examples.example_id(other[0])
            raise UserError(f"{name}: expected {wanted} preference pair for {self.name}; {fix}")
        try:
            self.check_examples(examples)
        except ValueError as error:
            raise UserError(f"{error}; {fix}") from None
        if not self.paired:
            return np.arange(len(examples), dtype=np.int64)[:, None]
        order = np.lexsort((examples.side, pair))
        starts = np.flatnonzero(np.diff(pair[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        for start, size in zip(starts, sizes, strict=True):
            members = order[start : start + size]
            if examples.side[members].tolist() != [0, 1]:
                sides = [examples.side_name(i) for i in members]
                raise UserError(
                    f"pair {examples.pair_id(members[0])}: expected one chosen and one rejected example, got {sides}; "
                    f"{fix}"
                )
        return order.reshape(-1, 2)


def all_but(section: type[recipe.Section], *keys: str) -> frozenset[str]:
    """The keys of a recipe's section but for ``keys``."""
    return frozenset(section.model_fields) - set(keys)
