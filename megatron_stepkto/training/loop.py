"""The training loop: reference log-probs, then per update the KL pass, the loss, the step, the log."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stepkto.checkpoints.convert import COMPANIONS
from megatron_stepkto.checkpoints.huggingface import copy_companions
from megatron_stepkto.data.batching import plan_updates
from megatron_stepkto.errors import UserError
from megatron_stepkto.files import atomic_writer, write_json
from megatron_stepkto.losses import ReferencePoints
from megatron_stepkto.progress import ProgressFile
from megatron_stepkto.records import LogRatios, TrainExample, write_records
from megatron_stepkto.training.documents import Document, MicroBatch, kl_document, pack_units, solution_document
from megatron_stepkto.training.engine import Engine
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.objectives import (
    SUMS,
    kl_sums,
    make_objective,
    reference_points,
    reward_sums,
    unit_documents,
)
from megatron_stepkto.training.references import (
    load_references,
    per_step,
    per_token,
    save_references,
    score_documents,
)
from megatron_stepkto.training.schedule import learning_rate
from megatron_stepkto.training.watch import WINDOW, falling_below_zero


class Trainer:
    """One training run on this rank. ``run`` starts or continues it, and leaves the final weights."""

    def __init__(
        self, engine: Engine, job: Job, examples: Sequence[TrainExample], held_out: Sequence[TrainExample]
    ) -> None:
        self.engine, self.job, self.settings = engine, job, job.settings
        self.objective = make_objective(job.settings.method, job.settings.loss, examples)
        self.units = self.objective.units(examples)
        self.held_out = list(held_out)
        self.updates = plan_updates(
            len(self.units), job.settings.global_batch_size, job.settings.epochs, job.seed, job.settings.max_updates
        )
        self.references: dict[str, Tensor] = {}
        self.progress = ProgressFile(job.progress)
        self.is_writer = dist.get_rank() == 0
        self.notes: dict[str, Any] = {}
        self.batch_kl = {"kl_outcome": 0.0, "kl_outcome_count": 0.0, "kl_step": 0.0, "kl_step_count": 0.0}
        self.right_history: list[float] = []
        self._stop = False

    # --- before the first update -----------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end and leave the final weights, or save and raise SystemExit on SIGTERM or SIGUSR1."""
        self.train()
        self._finish()

    def train(self) -> None:
        """All updates that are left. Leaves the weights in the engine."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask_to_stop)
        examples = [example for unit in self.units for example in unit]
        self.engine.load_weights(self.job.initial)
        self._measure_gap(examples)
        self._find_references(examples)
        done = self._resume()
        if self.held_out and done == 0:
            self._log_held_out(0)
        for update in range(done, len(self.updates)):
            self._update(update)
            finished = update + 1 == len(self.updates)
            stop = self._anyone_asked_to_stop()
            due = (update + 1) % self.settings.checkpoint_every == 0
            if not finished and due and self.held_out:  # before the checkpoint: a resumed run keeps the rows up to it
                self._log_held_out(update + 1)
            if not finished and (stop or due):
                self._checkpoint(update + 1)
            if stop and not finished:
                raise SystemExit(143)
        if self.held_out:
            self._log_held_out(len(self.updates))

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop = True

    def _anyone_asked_to_stop(self) -> bool:
        flag = torch.tensor(float(self._stop), device=self.engine.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _report(self, done: int, total: int, note: str, *, last: bool = False) -> None:
        if self.is_writer:
            self.progress.report(done, total, note, last=last)

    def _measure_gap(self, examples: Sequence[TrainExample]) -> None:
        """Compare the sampler's log-probs with this model's: the model trained must be the model sampled."""
        given = {e.example_id: torch.tensor(e.token_log_probs) for e in examples if e.token_log_probs is not None}
        if not given:
            return
        documents = [solution_document(e) for e in examples if e.example_id in given]
        ours = score_documents(self.engine, documents, per_token, lambda _: None)
        gaps = torch.cat([(ours[key] - given[key]).abs() for key in given])
        self.notes["gap"] = {"tokens": gaps.numel(), "mean": gaps.mean().item(), "max": gaps.max().item()}
        if self.notes["gap"]["mean"] > self.settings.max_gap:
            self._warn(
                f"sampler and trainer disagree: mean |log-prob difference| {gaps.mean():.4f} nats over "
                f"{gaps.numel()} tokens (train.max_gap is {self.settings.max_gap}); the model trained may not be "
                "the model sampled: check dtype, RoPE settings and the prompt's tokens"
            )

    def _find_references(self, examples: Sequence[TrainExample]) -> None:
        """Reference log-probs of all documents, from the file of an earlier attempt or by a pass of the reference."""
        documents: list[Document] = [solution_document(e) for e in self.held_out]
        if self.objective.uses_reference:
            documents += [solution_document(e) for e in examples]
        if self.objective.uses_kl:
            documents += [kl_document(e, e.kl_partner) for e in examples if e.kl_partner]
            if not any(e.kl_partner for e in examples):
                raise UserError(
                    f"{self.job.train_examples}: no example has a KL pair, but train.loss.reference_point is "
                    "mismatched; raise dataset.kl_pair_share or set reference_point to none"
                )
        if not documents:
            return
        path = self.job.directory / "reference.safetensors"
        found = load_references(path, self.job.fingerprint)
        if found is None:
            if self.job.reference is not None:
                self.engine.load_weights(self.job.reference)
            found = score_documents(
                self.engine,
                documents,
                per_step,
                lambda done: self._report(0, len(self.updates), f"reference log-probs {done}/{len(documents)}"),
            )
            if self.is_writer:
                save_references(path, found, self.job.fingerprint)
            if self.job.reference is not None:
                self.engine.load_weights(self.job.initial)
        self.references = found

    # --- one update ------------------------------------------------------------------------------------------

    def _update(self, update: int) -> None:
        begun = time.perf_counter()
        units = [unit_documents(self.units[i], self.references, self.objective.uses_kl) for i in self.updates[update]]
        points, kl = self._reference_points([unit.kl for unit in units if unit.kl is not None])
        batches = pack_units([unit.documents for unit in units], self.engine.slot())

        def loss(batch: MicroBatch, log_probs: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
            result = self.objective.loss(batch, log_probs, points)
            sums = {"loss": result.total.detach(), **result.parts}
            if self.objective.uses_reference:
                sums |= reward_sums(batch, log_probs)
                if self.settings.loss.reference_point == "batch":
                    sums |= kl_sums(batch, log_probs.detach())
            return result.total, result.num_units, sums | {"units": torch.tensor(float(result.num_units))}

        asides = self.engine.accumulate(batches, loss)
        sums = self._pool(asides, batches)
        self._check_finite(update, sums["loss"], "loss", asides, batches)
        lr = learning_rate(update, len(self.updates), self.settings.optimizer)
        grad_norm = self.engine.step(lr)
        self._check_finite(update, grad_norm, "gradient norm", asides, batches)
        if self.settings.loss.reference_point == "batch":
            self.batch_kl = {name: sums[name] for name in self.batch_kl}
            kl = self.batch_kl
        self._log(update, sums, kl, points, grad_norm, lr, time.perf_counter() - begun)

    def _reference_points(self, documents: Sequence[Document]) -> tuple[ReferencePoints, dict[str, float]]:
        """z_o and z_s of this global batch, and the pooled sums behind them.

        mismatched: one pass without gradient over the KL pairs of the whole global batch. batch: the mean
        log-ratio of the previous update's own solutions and steps (0 before the first), so that it costs no pass
        and does not depend on how a batch was cut.
        """
        kl = dict.fromkeys(self.batch_kl, 0.0)
        if self.objective.uses_kl and documents:
            batches = pack_units([[document] for document in documents], self.engine.slot())
            for sums in self.engine.score(batches, kl_sums):
                for name in kl:
                    kl[name] += sums[name].item()
            kl = self.engine.pool(kl)
        elif self.settings.loss.reference_point == "batch":
            kl = self.batch_kl
        return reference_points(kl, self.settings.loss.reference_point, self.engine.device), kl

    def _pool(self, asides: Sequence[dict[str, Tensor]], batches: Sequence[MicroBatch]) -> dict[str, float]:
        sums = dict.fromkeys(SUMS, 0.0)
        for aside in asides:
            for name, value in aside.items():
                if name in sums:
                    sums[name] += value.item()
        sums["tokens"] = float(sum(batch.tokens.numel() - batch.num_padding for batch in batches))
        sums["padding"] = float(sum(batch.num_padding for batch in batches))
        return self.engine.pool(sums)

    def _check_finite(
        self, update: int, value: float, name: str, asides: Sequence[dict[str, Tensor]], batches: Sequence[MicroBatch]
    ) -> None:
        """All ranks see the same pooled value, so all stop here together."""
        if math.isfinite(value):
            return
        bad = [
            d.key
            for aside, batch in zip(asides, batches, strict=False)
            if not math.isfinite(aside["loss"].item())
            for d in batch.documents
        ]
        everyone: list[list[str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, bad if self.engine.counts_once else [])
        ids = sorted({key for share in everyone for key in share or []})
        last = self._checkpoints()
        raise UserError(
            f"update {update + 1}: {name} is {value}; records in the micro-batches concerned: "
            f"{', '.join(ids[:20]) or 'none has a non-finite loss of its own'}; last good checkpoint: "
            f"{last[-1][1] if last else self.job.initial}. Lower train.optimizer.lr or the betas, or remove the records"
        )

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
    ) -> None:
        def mean(name: str, count: str) -> float | None:
            return sums[name] / sums[count] if sums[count] else None

        step_kto = self.settings.method in ("step_kto", "kto")
        row = {
            "update": update + 1,
            "num_updates": len(self.updates),
            "epoch": self.settings.epochs * (update + 1) / len(self.updates) if not self.settings.max_updates else None,
            "loss": mean("loss", "units"),
            "loss_outcome": mean("loss_outcome", "units") if step_kto else None,
            "loss_step": mean("loss_step", "units") if step_kto else None,
            "kl_outcome": kl["kl_outcome"] / kl["kl_outcome_count"] if kl["kl_outcome_count"] else None,
            "kl_step": kl["kl_step"] / kl["kl_step_count"] if kl["kl_step_count"] else None,
            "z_outcome": points.outcome.item() if step_kto else None,
            "z_step": points.step.item() if step_kto else None,
            **{f"log_ratio_{kind}": mean(f"log_ratio_{kind}", f"num_{kind}") for kind in KINDS},
            **{f"num_{kind}": int(sums[f"num_{kind}"]) for kind in KINDS},
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": int(sums["tokens"]),
            "padding_share": sums["padding"] / (sums["tokens"] + sums["padding"]),
            "seconds": round(seconds, 4),
        }
        self._append(row)
        self._watch_collapse(update, row["log_ratio_right"])
        self._report(
            update + 1,
            len(self.updates),
            f"loss {row['loss']:.4f}  {sums['tokens'] / seconds:,.0f} tokens/s",
            last=update + 1 == len(self.updates),
        )

    def _watch_collapse(self, update: int, right: float | None) -> None:
        """Warn once when right solutions become less likely than under the reference, and keep falling."""
        if right is None:
            return
        if "collapse" in self.notes:
            return
        self.right_history = [*self.right_history, right][-3 * WINDOW :]
        if (fell := falling_below_zero(self.right_history)) is not None:
            before, now = fell
            self.notes["collapse"] = {"update": update + 1, "log_ratio_right": now}
            self._warn(
                f"update {update + 1}: the log-ratio of right solutions is {now:.2f} nats and falling "
                f"(it was {before:.2f}): probability leaves right answers too. Raise train.loss.beta_*, lower "
                "undesirable_weight_* or lower train.optimizer.lr"
            )

    def _warn(self, message: str) -> None:
        self.notes.setdefault("warnings", []).append(message)

    def _append(self, row: dict[str, Any]) -> None:
        if self.is_writer:
            with self.job.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _log_held_out(self, update: int) -> None:
        """Log-ratios of right and wrong solutions and steps on examples that never train."""
        documents = [solution_document(e, self.references[e.example_id]) for e in self.held_out]
        sums: dict[str, float] = dict.fromkeys((f"{p}_{k}" for p in ("log_ratio", "num") for k in KINDS), 0.0)
        for part in self.engine.score(pack_units([[d] for d in documents], self.engine.slot()), reward_sums):
            for name, value in part.items():
                sums[name] += value.item()
        sums = self.engine.pool(sums)
        row: dict[str, float | int | None] = {
            f"log_ratio_{k}": sums[f"log_ratio_{k}"] / sums[f"num_{k}"] if sums[f"num_{k}"] else None for k in KINDS
        }
        for name, suffix in (("outcome", ""), ("step", "_steps")):
            right, wrong = row[f"log_ratio_right{suffix}"], row[f"log_ratio_wrong{suffix}"]
            row[f"{name}_margin"] = right - wrong if right is not None and wrong is not None else None
        row |= {f"num_{k}": int(sums[f"num_{k}"]) for k in KINDS}
        self._append({"update": update, "held_out": row})

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _checkpoints(self) -> list[tuple[int, Any]]:
        """Finished checkpoints, oldest first."""
        return sorted(
            (int(p.name.removeprefix("update_")), p)
            for p in self.job.checkpoints.glob("update_*")
            if (p / "state.json").is_file()
        )

    def _resume(self) -> int:
        """Continue at the newest checkpoint; returns the number of updates that are done."""
        found = self._checkpoints()
        # Every rank must see the same folder before anyone acts on it.
        dist.barrier()
        if not found:
            if self.is_writer:
                self.job.metrics.write_text("")
            return 0
        done, directory = found[-1]
        self.engine.load_state(directory)
        state = json.loads((directory / "state.json").read_text())
        self.batch_kl, self.right_history = state["batch_kl"], state["right_history"]
        self.notes |= state["notes"]
        if self.is_writer:
            rows = [line for line in self.job.metrics.read_text().splitlines() if _update_of(line) <= done]
            with atomic_writer(self.job.metrics) as file:
                file.writelines(line + "\n" for line in rows)
        return done

    def _checkpoint(self, update: int) -> None:
        """Save under a temporary name; the rename makes it count. Then drop all but the newest few."""
        final = self.job.checkpoints / f"update_{update:06d}"
        temporary = final.with_name(f".{final.name}.partial")
        if self.is_writer and temporary.exists():
            shutil.rmtree(temporary)
        self.engine.save_state(temporary)
        if self.is_writer:
            write_json(
                temporary / "state.json",
                {"batch_kl": self.batch_kl, "right_history": self.right_history, "notes": self.notes},
            )
            temporary.rename(final)
            for _, old in self._checkpoints()[: -self.settings.keep_checkpoints]:
                shutil.rmtree(old)
        dist.barrier()

    def _log_ratios(self) -> None:
        """Per-step log-ratios of the first training examples under the final weights, for a reader of the report."""
        if not self.objective.uses_reference:
            return
        examples = [example for unit in self.units for example in unit][:MAX_LOG_RATIOS]
        scored = score_documents(self.engine, [solution_document(e) for e in examples], per_step, lambda _: None)
        if self.is_writer:
            rows = ((e.example_id, scored[e.example_id] - self.references[e.example_id]) for e in examples)
            write_records(self.job.log_ratios, (LogRatios(example_id=key, steps=r.tolist()) for key, r in rows))

    def _finish(self) -> None:
        self._log_ratios()
        temporary = self.job.final.with_name(".final.partial")
        if self.is_writer and temporary.exists():
            shutil.rmtree(temporary)
        self.engine.save_weights(temporary)
        if self.is_writer:
            copy_companions(self.job.initial / COMPANIONS, temporary / COMPANIONS)
            write_json(self.job.notes, self.notes)
            temporary.rename(self.job.final)


# Examples whose log-ratios are written at the end: what a page can show, one or two percent of an iteration's work.
MAX_LOG_RATIOS = 1000
KINDS = ("right", "wrong", "right_steps", "wrong_steps")


def _update_of(line: str) -> int:
    """Update of a metrics row; a row cut short by a crash counts as never written."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError):
        return 1 << 62
