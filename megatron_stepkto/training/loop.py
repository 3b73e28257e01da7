"""The training loop: reference log-probs, then per update the KL pass, the loss, the step, the log."""

from __future__ import annotations

import copy
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_stepkto.base.ahead import OneAhead
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.base.files import flush_tree, read_json, write_json
from megatron_stepkto.base.packing import plan_updates
from megatron_stepkto.base.processes import STOPPED
from megatron_stepkto.base.records import LogRatios, write_records
from megatron_stepkto.checkpoints.adapter import Trained, check_adapter, read_adapter
from megatron_stepkto.checkpoints.convert import COMPANIONS, LORA_SETTINGS
from megatron_stepkto.checkpoints.huggingface import copy_companions
from megatron_stepkto.losses import ReferencePoints
from megatron_stepkto.megatron.batch import (
    Document,
    Documents,
    MicroBatch,
    Part,
    kl_document,
    pack_units,
    solution_document,
    with_partner,
)
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.lora import initial_factors
from megatron_stepkto.methods.metrics import (
    KL_SUMS,
    add_up,
    balance_note,
    balance_text,
    check_parts,
    held_out_metrics_of,
    metrics_of,
)
from megatron_stepkto.methods.objective import (
    kl_sums,
    reference_points,
    reward_sums,
    solutions_of,
    solutions_of_examples,
)
from megatron_stepkto.methods.registry import method_of
from megatron_stepkto.training.job import Job, State, drop_checkpoint, finished_checkpoints, half_checkpoints
from megatron_stepkto.training.journal import Journal
from megatron_stepkto.training.not_finite import bad_pairs, bad_units, not_finite
from megatron_stepkto.training.references import StepValues, find_references, per_step, per_token, score_documents
from megatron_stepkto.training.rows import HeldOut, HeldOutRow, UpdateRow
from megatron_stepkto.training.schedule import learning_rate

LAGGED = ("batch", "running")  # estimators that read the log-ratios of earlier updates
# Examples whose log-ratios are written at the end, for the page: an eighth of those trained on, a few percent of the
# training, but no fewer and no more than these.
LOG_RATIOS = (100, 1000)


@dataclass(frozen=True)
class GlobalBatch:
    """What one update reads.

    units: the documents of each. pairs: the examples with a KL pair. batches, kl_batches: this rank's micro-batches of
    the units, of the pairs.
    """

    units: list[list[Document]]
    pairs: Indices
    batches: list[MicroBatch]
    kl_batches: list[MicroBatch]


def _places(parts: Sequence[Part], indices: Indices) -> Indices:
    """Of documents of these examples that follow those of ``parts``."""
    return sum(len(part.indices) for part in parts) + np.arange(len(indices))


class Trainer:
    """One training run on this rank. ``run`` starts or resumes it, and writes the final weights."""

    def __init__(self, engine: Engine, job: Job, examples: Examples, held_out: Examples | None) -> None:
        self.engine, self.job, self.settings = engine, job, job.settings
        self.method = method_of(job.settings.method)
        self.estimator = self.method.estimator(job.settings.loss)
        self.examples, self.held_out = examples, held_out
        self.units = self.method.units(examples)
        self.updates = plan_updates(
            len(self.units), job.settings.global_batch_size, job.settings.epochs, job.seed, job.settings.max_updates
        )
        used = np.concatenate(self.updates)  # as often as they train: epochs may end within one
        self.objective = self.method.objective(job.settings.loss, examples, self.units[used].ravel())
        # max_updates may leave out most
        self.trained: Indices = self.units[np.unique(used)].ravel()
        self.references: StepValues | None = None
        # of each example, its solution's and its KL pair's place among the documents with a reference, or -1
        self.solution_place, self.pair_place = (np.full(len(examples), -1) for _ in range(2))
        self.is_writer = dist.get_rank() == 0
        self.journal = Journal(job, writes=self.is_writer, against_collapse=self.method.against_collapse)
        if self.objective.balance:
            balance = self.journal.notes["balance"] = balance_note(self.objective.balance)
            if self.is_writer:
                print(balance_text(balance), flush=True)  # into the log of this attempt
        self.batch_kl = dict.fromkeys(KL_SUMS, 0.0)  # what the next update reads, of LAGGED
        self.saved = 0  # updates in the newest checkpoint
        self._asked = False  # this rank, by a signal, at any instant
        self._stop = False  # all ranks have agreed, in _meet: decisions that they take together look at this alone

    # --- before the first update -----------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end and write the final weights.

        Raises:
            SystemExit: asked to stop, by SIGTERM or SIGUSR1 to any rank; a checkpoint of all updates done is saved.
        """
        self.train()
        self._finish()

    def train(self) -> None:
        """Run all remaining updates. The weights stay in the engine."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask_to_stop)
        self.engine.checkpoints.load_weights(self.job.initial)
        self.start_adapters()
        first = [solution_document(self.examples, i) for i in self.trained[: self.settings.global_batch_size]]
        self.engine.calibrate(pack_units([[document] for document in first], self.engine.slot()))
        self._measure_gap()
        self._find_references()
        done = self._resume()
        self.journal.open(done)
        if done == 0:
            self._show_gradients()
        self._log_held_out(done)
        self.journal.report(done, len(self.updates), at_once=True)  # the first update may take minutes
        with OneAhead(self._global_batch, self.updates[done:]) as prepared:
            for update in range(done, len(self.updates)):
                self._update(update, prepared)
                self.engine.checkpoints.finish_saving(wait=False)
                if self._due(update + 1):
                    prepared.settle()  # an asynchronous save forks
                if self._stop:
                    self._save_and_end(update + 1)
                self._log_held_out(update + 1)  # before the checkpoint: a resumed run keeps the rows up to it
                if self._due(update + 1) and update + 1 < len(self.updates):
                    self._checkpoint(update + 1)

    def start_adapters(self) -> None:
        """Give the adapters, if the model has some, the values that training starts from."""
        if self.settings.lora is None:
            return
        factors = initial_factors(self.job.seed)
        if self.job.adapter:
            adapter = read_adapter(self.job.adapter)
            check_adapter(adapter, self.engine.adapted, self.settings.lora)
            factors = adapter.factors
        self.engine.set_adapters(factors)

    def _due(self, update: int) -> bool:
        """Whether a checkpoint follows this update, or the end."""
        return update % self.settings.checkpoint_every == 0 or update == len(self.updates)

    def _save_and_end(self, update: int) -> NoReturn:
        """Save a checkpoint and end, after ``update`` updates: a rank was asked to stop."""
        if update:
            self._checkpoint(update)
        self.journal.close()
        raise SystemExit(STOPPED)

    def _show_gradients(self) -> None:
        """Compute gradients of the first batch without an update, so that FP8's scales of gradients have a history.

        ``Engine.calibrate`` does the same for activations. With scales of 1 the first update's gradients would be
        rounded to 0.
        """
        if self.engine.acceleration.rounds_by_history:
            points = reference_points(self.batch_kl, "none", self.engine.device)
            self._accumulate(self._global_batch(self.updates[0]).batches, points)

    def _ask_to_stop(self, *_: Any) -> None:
        self._asked = True

    def _meet(self) -> float:
        """All ranks learn whether one was asked to stop; returns the largest rank's peak memory, in bytes."""
        both = torch.tensor(
            [float(self._asked), self.engine.peak_memory()], dtype=torch.float64, device=self.engine.device
        )
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        self._stop = bool(both[0].item())
        return float(both[1].item())

    def _score(
        self,
        title: str,
        documents: Documents,
        what: Callable[[MicroBatch, Tensor], list[Tensor]],
        take: Callable[[int, Tensor], None],
        *,
        known: NDArray[np.bool_] | None = None,
        keep: Callable[[bool], None] = lambda _: None,
        update: int = 0,
    ) -> None:
        """``score_documents`` with its progress.

        Args:
            keep: called after each part of the pass, with whether it ends there because it was asked to stop.
            update: updates done, which are saved when asked to stop.

        Raises:
            SystemExit: asked to stop.
        """

        def after_part() -> None:
            self._meet()
            keep(self._stop)
            if self._stop:
                self._save_and_end(update)

        score_documents(
            self.engine, documents, what, take, known=known, after_part=after_part,
            progress=lambda done, total: self.journal.report(done, total, unit=f"tokens of {title}"),
        )  # fmt: skip

    def _score_steps(self, title: str, part: Part, update: int) -> Tensor:
        """[S] float64 log-probs of all steps of the documents, one after another, under the engine's weights."""
        documents = Documents([part])
        found = StepValues(documents.num_steps)
        self._score(title, documents, per_step, found.put, update=update)
        return found.of(0, len(documents))

    def _measure_gap(self) -> None:
        """Compare the sampler's log-probs with this model's: the model trained must be the model sampled."""
        indices = self.units.ravel()
        indices = indices[self.examples.has_log_probs[self.examples.sample[indices]]]
        if not indices.size:
            return
        total, largest, tokens = 0.0, 0.0, 0

        def take(number: int, ours: Tensor) -> None:
            nonlocal total, largest, tokens
            given = self.examples.solution(self.examples.sample[indices[number]]).log_probs
            difference = (ours - torch.tensor(given)).abs()
            total += difference.double().sum().item()
            largest = max(largest, difference.max().item())
            tokens += difference.numel()

        documents = Documents([Part(self.examples, indices)])
        self._score("the comparison with the sampler", documents, per_token, take)
        mean = total / tokens
        self.journal.notes["gap"] = {"tokens": tokens, "mean": mean, "max": largest}
        if mean > self.settings.max_gap:
            self.journal.warn(
                f"sampler and trainer disagree: mean |log-prob difference| {mean:.4f} nats over "
                f"{tokens} tokens (train.max_gap is {self.settings.max_gap}); the model trained may not be "
                "the model sampled: check dtype, RoPE settings and the prompt's tokens"
            )

    def _find_references(self) -> None:
        """Reference log-probs of all documents that an update or a measurement reads."""
        parts = [Part(self.held_out, np.arange(len(self.held_out)))] if self.held_out else []
        if self.method.uses_reference:
            self.solution_place[self.trained] = _places(parts, self.trained)
            parts.append(Part(self.examples, self.trained))
        if self.estimator == "mismatched":
            indices = with_partner(self.examples, self.trained)
            if not indices.size:
                raise UserError(
                    f"{self.job.train_examples}: no example that trains has a KL pair, but train.loss.reference_point "
                    "is mismatched; raise dataset.kl_pair_share or set reference_point to none"
                )
            without = sum(not with_partner(self.examples, self.units[update].ravel()).size for update in self.updates)
            if without:
                self.journal.warn(
                    f"{without} of {len(self.updates)} updates have no KL pair: their reference point is 0, not a "
                    "mean; raise dataset.kl_pair_share or train.global_batch_size"
                )
            self.pair_place[indices] = _places(parts, indices)
            parts.append(Part(self.examples, indices, kl=True))
        if parts:
            score = partial(self._score, "the reference's log-probs")
            self.references = find_references(self.engine, self.job, Documents(parts), score)

    def _reference(self, place: int) -> Tensor | None:
        """Of the document in this place, where there is one."""
        return None if place < 0 or self.references is None else self.references.of(place)

    # --- one update ------------------------------------------------------------------------------------------

    def _global_batch(self, members: Sequence[int]) -> GlobalBatch:
        """The batch of these units. Changes nothing and meets no other rank: a thread runs it during an update."""
        indices = self.units[members]
        units = [
            [solution_document(self.examples, i, self._reference(self.solution_place[i])) for i in unit]
            for unit in indices
        ]
        pairs = with_partner(self.examples, indices.ravel() if self.estimator == "mismatched" else indices[:0, 0])
        kl = [[kl_document(self.examples, i, self._reference(self.pair_place[i]))] for i in pairs]
        slot = self.engine.slot()
        return GlobalBatch(units, pairs, pack_units(units, slot), pack_units(kl, slot) if kl else [])

    def _update(self, update: int, prepared: Iterator[GlobalBatch]) -> None:
        begun = time.perf_counter()
        batch = next(prepared)
        points, kl = self._reference_points(batch.kl_batches)
        if not all(map(math.isfinite, kl.values())):
            blamed = bad_pairs(batch.pairs, self.engine, self.examples)
            self._stop_not_finite(update, "the log-ratio over the KL pairs", blamed, "KL pairs")
        sums = self._accumulate(batch.batches, points)
        if not math.isfinite(sums["loss"]):
            self._stop_not_finite(update, "the loss", self._bad_units(batch.units, points))
        lr = learning_rate(update, len(self.updates), self.settings.optimizer)
        grad_norm = self.engine.step(lr)
        if not math.isfinite(grad_norm):
            self._stop_not_finite(update, "the gradient", self._bad_units(batch.units, points))
        if self.estimator in LAGGED:
            before = self.batch_kl if self.estimator == "running" else dict.fromkeys(KL_SUMS, 0.0)
            kl = self.batch_kl = {name: before[name] + sums[name] for name in KL_SUMS}
        memory = self._meet()
        self._log(update, sums, kl, points, grad_norm, lr, time.perf_counter() - begun, memory)

    def _bad_units(self, units: Sequence[Sequence[Document]], points: ReferencePoints) -> list[str]:
        return bad_units(units, self.engine, lambda batches: self._accumulate(batches, points)["loss"])

    def _stop_not_finite(self, update: int, what: str, blamed: Sequence[str], records: str = "records") -> NoReturn:
        self.engine.checkpoints.finish_saving(wait=True)
        raise not_finite(self.job, update + 1, what, records, blamed)

    def _accumulate(self, batches: Sequence[MicroBatch], points: ReferencePoints) -> dict[str, float]:
        """Gradients of the mean loss over all ranks' ``batches``, in the engine; returns sums pooled over all ranks."""

        def loss(batch: MicroBatch, log_probs: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
            result = self.objective.loss(batch, log_probs, points)
            check_parts(self.method, result.parts)
            sums = {"loss": result.total.detach(), **result.parts}
            if self.method.uses_reference:
                sums |= reward_sums(solutions_of(batch, log_probs.detach()))
                if self.estimator in LAGGED:
                    sums |= kl_sums(batch, log_probs.detach())
            return result.total, result.num_units, sums | {"units": torch.tensor(float(result.num_units))}

        return self._pool(self.engine.accumulate(batches, loss), batches)

    def _reference_points(self, batches: Sequence[MicroBatch]) -> tuple[ReferencePoints, dict[str, float]]:
        """z_o and z_s of a global batch, from this rank's micro-batches of its KL pairs, and the pooled sums.

        mismatched: one pass without gradient over the KL pairs of the whole global batch. batch: the mean
        log-ratio of the previous update's own solutions and steps (0 before the first), so that it costs no pass
        and does not depend on how a batch was cut. running: the same, of all updates before this one.
        """
        kl = dict.fromkeys(KL_SUMS, 0.0)
        if self.estimator == "mismatched" and batches:
            for sums in self.engine.score(batches, kl_sums):
                for name in kl:
                    kl[name] += sums[name].item()
            kl = self.engine.pool(kl)
        elif self.estimator in LAGGED:
            kl = self.batch_kl
        return reference_points(kl, self.estimator, self.engine.device), kl

    def _pool(self, asides: Sequence[dict[str, Tensor]], batches: Sequence[MicroBatch]) -> dict[str, float]:
        sums = add_up(self.method, asides)
        sums["tokens"] = float(sum(batch.tokens.numel() - batch.num_padding for batch in batches))
        sums["padding"] = float(sum(batch.num_padding for batch in batches))
        sums["flops"] = sum(map(self.engine.update_flops, (d for batch in batches for d in batch.documents)))
        return self.engine.pool(sums)

    # --- log -------------------------------------------------------------------------------------------------

    def _log(
        self,
        update: int,
        sums: dict[str, float],
        kl: dict[str, float],
        points: ReferencePoints,
        grad_norm: float,
        lr: float,
        seconds: float,
        memory: float,
    ) -> None:
        row = {
            "update": update + 1,
            "num_updates": len(self.updates),
            "epoch": self.settings.epochs * (update + 1) / len(self.updates) if not self.settings.max_updates else None,
            **metrics_of(sums, kl, self.method, self.objective.betas),
            **{f"z_{level}": getattr(points, level).item() for level in self.method.reference_levels},
            "grad_norm": grad_norm,
            "lr": lr,
            **(self.engine.expert_load.take() if self.engine.expert_load else {}),
            "seconds": round(seconds, 4),
            "tokens_per_second": sums["tokens"] / seconds,
            "tflops_per_rank": sums["flops"] / seconds / 1e12 / self.settings.parallel.ranks,
            "memory_gb": memory / 1e9,
        }
        self.journal.append(UpdateRow.model_validate(row))
        self.journal.watch_collapse(update + 1, row["log_ratio_right"])
        note = f"loss {row['loss']:.4f}  {sums['tokens'] / seconds:,.0f} tokens/s"
        self.journal.report(update + 1, len(self.updates), note)

    def _log_held_out(self, update: int) -> None:
        """Log-ratios of right and wrong solutions and steps on examples that never train; where due, and once."""
        if not self.held_out or not self._due(update):
            return
        measured = [self.journal.has_held_out(update)]
        dist.broadcast_object_list(measured, src=0)  # only the writer sees the rows of an earlier attempt
        if measured[0]:
            return
        assert self.references is not None
        indices = np.arange(len(self.held_out))
        found = self._score_steps("held-out examples", Part(self.held_out, indices), update)
        solutions = solutions_of_examples(self.held_out, indices, found - self.references.of(0, len(indices)))
        sums = {name: value.item() for name, value in reward_sums(solutions).items()}
        self.journal.append(HeldOutRow(update=update, held_out=HeldOut.model_validate(held_out_metrics_of(sums))))

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the number of updates that are done."""
        if self.is_writer:
            for left in half_checkpoints(self.job.checkpoints):
                drop_checkpoint(left)
        # As rank 0 sees the folder: another node's cache may lack the newest, and ranks at different updates would
        # add up gradients of different batches without an error.
        newest: list[tuple[int, Path] | None] = [next(reversed(finished_checkpoints(self.job.checkpoints)), None)]
        dist.broadcast_object_list(newest, src=0)
        if newest[0] is None:
            return 0
        done, directory = newest[0]
        self.saved = done
        state = read_json(directory / "state.json", State)
        if self.settings.lora and state["base"] != self.job.base:
            raise UserError(
                f"{directory}: its adapters belong to another base model than {self.job.initial}; restore that model, "
                "or remove the checkpoint to train from the start"
            )
        self.engine.checkpoints.load_state(directory)
        self.batch_kl = state["batch_kl"]
        self.journal.restore(done, state["right_history"], state["notes"])
        return done

    def _checkpoint(self, update: int) -> None:
        """Save under a temporary name; the rename makes it count. Then drop all but the newest few."""
        self.engine.checkpoints.finish_saving(wait=True)
        if update == self.saved:
            return
        self.saved = update
        final = self.job.checkpoints / f"update_{update:06d}"
        temporary = final.with_name(f".{final.name}.partial")
        state = {
            "base": self.job.base,
            "batch_kl": self.batch_kl,
            "right_history": self.journal.right_history,
            "notes": copy.deepcopy(self.journal.notes),
        }

        def publish() -> None:
            if self.is_writer:
                flush_tree(temporary)  # Megatron leaves its small files, without which none loads, in the cache
                write_json(temporary / "state.json", state)
                temporary.rename(final)
                for _, old in finished_checkpoints(self.job.checkpoints)[: -self.settings.keep_checkpoints]:
                    drop_checkpoint(old)
            dist.barrier()

        if self.settings.async_checkpoints and not self._stop:
            self.engine.checkpoints.begin_saving_state(temporary, publish)
        else:
            self.engine.checkpoints.save_state(temporary)
            publish()

    def _log_ratios(self) -> None:
        """Per-step log-ratios of the first training examples under the final weights, for a reader of the report."""
        if not self.method.uses_reference:
            return
        assert self.references is not None
        least, most = LOG_RATIOS
        indices = self.trained[: min(max(len(self.trained) // 8, least), most)]
        first = int(self.solution_place[indices[0]])
        scored = self._score_steps("the log-ratios for the report", Part(self.examples, indices), len(self.updates))
        ratios = scored - self.references.of(first, first + len(indices))
        if self.is_writer:
            steps = ratios.split(self.examples.num_steps[self.examples.sample[indices]].tolist())
            rows = zip(map(self.examples.example_id, indices), steps, strict=True)
            write_records(self.job.log_ratios, (LogRatios(example_id=key, steps=r.tolist()) for key, r in rows))

    def _finish(self) -> None:
        self._log_ratios()
        self.journal.close()
        self.engine.checkpoints.finish_saving(wait=True)
        temporary = self.job.final.with_name(".final.partial")
        if self.is_writer and temporary.exists():
            shutil.rmtree(temporary)
        self.engine.checkpoints.save_weights(temporary)
        if self.is_writer:
            if self.settings.lora:
                about = Trained(lora=self.settings.lora.model_copy(update={"start": None}), base=self.job.base)
                write_json(temporary / LORA_SETTINGS, about.model_dump(mode="json"))
            copy_companions(self.job.initial / COMPANIONS, temporary / COMPANIONS)
            write_json(self.job.notes, self.journal.notes)
            flush_tree(temporary)
            temporary.rename(self.job.final)
