"""The numbers of one update, from sums over all ranks and micro-batches: divided once, here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_stepkto.methods.method import Method

if TYPE_CHECKING:  # the report shows these numbers, and needs no torch
    from torch import Tensor

    from megatron_stepkto.losses import Balance

KINDS = ("right", "wrong", "right_steps", "wrong_steps")
# What ``objective.reward_sums`` counts of a micro-batch.
REWARD_SUMS = (
    *(f"{part}_{kind}" for part in ("log_ratio", "num") for kind in KINDS),
    *(f"signs_right{suffix}" for suffix in ("", "_steps")),
)
KL_SUMS = ("kl_outcome", "kl_outcome_count", "kl_step", "kl_step_count")
# Sums of one update that every method has, zero where it does not read them.
UPDATE_SUMS = ("loss", "units", *REWARD_SUMS, "entropy", "num_entropies", *KL_SUMS, "tokens", "padding", "flops")

Row = dict[str, float | int | None]


def own_sums(method: Method) -> list[str]:
    """The sums that the method's metrics read beside the common ones: its loss must return them as parts."""
    named = dict.fromkeys(name for ratio in method.metrics.values() for name in ratio)
    return [name for name in named if name not in UPDATE_SUMS]


def check_parts(method: Method, parts: Iterable[str]) -> None:
    """Raises ValueError unless the parts of a loss are what the method's metrics read: none would be pooled unseen."""
    own, given = own_sums(method), set(parts)
    if unread := sorted(given - set(own)):
        raise ValueError(f"method {method.name}: no metric reads the loss's part {', '.join(unread)}; name it in the "
                         "method's metrics, by a name that no common sum has, or do not return it")  # fmt: skip
    if missing := [name for name in own if name not in given]:
        raise ValueError(f"method {method.name}: its metrics read {', '.join(missing)}, which its loss does not return "
                         "as a part")  # fmt: skip


def add_up(method: Method, asides: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Sums over a rank's micro-batches, by the same names on every rank, so that ranks can pool them.

    Args:
        asides: of each micro-batch, scalars by name: the checked parts of the loss and common sums.

    Raises:
        KeyError: a name that is neither.
    """
    sums = dict.fromkeys((*UPDATE_SUMS, *own_sums(method)), 0.0)
    for aside in asides:
        for name, value in aside.items():
            sums[name] += value.item()
    return sums


def metrics_of(sums: Mapping[str, float], kl: Mapping[str, float], method: Method, betas: tuple[float, float]) -> Row:
    """Losses, log-ratios (nats), rewards, margins, shares and counts of a global batch; None where it had none.

    The method's own metrics come first: loss_outcome, loss_step, loss_dpo, loss_nll, loss_right, loss_wrong are parts
    of the loss (they add up to it), and pair_accuracy is the share of pairs whose chosen side has the larger
    log-ratio. reward_* is beta times the log-ratio; margin and step_margin are rewards of right less those of wrong.
    sign_accuracy is the share of judged solutions (steps) whose log-ratio is above 0 where right and below 0 where
    wrong. entropy is that of the policy's next-token distribution, mean over response tokens, where train.log.entropy
    asks for it.
    """

    def mean(name: str, count: str) -> float | None:
        return sums[name] / sums[count] if sums[count] else None

    row: Row = {"loss": mean("loss", "units")}
    row |= {name: mean(*ratio) for name, ratio in method.metrics.items()}
    for level in ("outcome", "step"):
        row[f"kl_{level}"] = kl[f"kl_{level}"] / kl[f"kl_{level}_count"] if kl[f"kl_{level}_count"] else None
    for kind in KINDS:
        row[f"log_ratio_{kind}"] = mean(f"log_ratio_{kind}", f"num_{kind}")
    for suffix, beta, name in (("", betas[0], "margin"), ("_steps", betas[1], "step_margin")):
        for side in ("right", "wrong"):
            ratio = row[f"log_ratio_{side}{suffix}"]
            row[f"reward_{side}{suffix}"] = beta * ratio if ratio is not None else None
        right, wrong = row[f"reward_right{suffix}"], row[f"reward_wrong{suffix}"]
        row[name] = right - wrong if right is not None and wrong is not None else None
        judged = sums[f"num_right{suffix}"] + sums[f"num_wrong{suffix}"]
        row[f"sign_accuracy{suffix}"] = sums[f"signs_right{suffix}"] / judged if judged else None
    row["entropy"] = mean("entropy", "num_entropies")
    row |= {f"num_{kind}": int(sums[f"num_{kind}"]) for kind in KINDS}
    row |= {"num_units": int(sums["units"]), "num_kl_pairs": int(kl["kl_outcome_count"])}
    row |= {"tokens": int(sums["tokens"]), "padding_share": sums["padding"] / (sums["tokens"] + sums["padding"])}
    return row


def held_out_metrics_of(sums: Mapping[str, float]) -> Row:
    """Log-ratios (nats), their margins and signs on examples that never train, from ``REWARD_SUMS``."""
    row: Row = {
        f"log_ratio_{k}": sums[f"log_ratio_{k}"] / sums[f"num_{k}"] if sums[f"num_{k}"] else None for k in KINDS
    }
    for name, suffix in (("outcome", ""), ("step", "_steps")):
        right, wrong = row[f"log_ratio_right{suffix}"], row[f"log_ratio_wrong{suffix}"]
        row[f"{name}_margin"] = right - wrong if right is not None and wrong is not None else None
        judged = sums[f"num_right{suffix}"] + sums[f"num_wrong{suffix}"]
        row[f"sign_accuracy{suffix}"] = sums[f"signs_right{suffix}"] / judged if judged else None
    return row | {f"num_{k}": int(sums[f"num_{k}"]) for k in KINDS}


def balance_note(balance: Mapping[str, Balance]) -> dict[str, dict[str, float | None]]:
    """Right against wrong in the loss by level, to four digits, for the manifest."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.4g}")

    names = ("right", "wrong", "desirable_weight", "undesirable_weight", "ratio")
    return {level: {name: short(getattr(each, name)) for name in names} for level, each in balance.items()}


def balance_text(note: Mapping[str, Mapping[str, Any]]) -> str:
    """One line from ``balance_note``: per level the sum of each class's weights in the loss times its lambda."""
    return "pull of right over wrong: " + "; ".join(
        f"{level}s {'none' if each['ratio'] is None else each['ratio']} "
        f"(right {each['right']:g} x {each['desirable_weight']:g}, "
        f"wrong {each['wrong']:g} x {each['undesirable_weight']:g})"
        for level, each in note.items()
    )
