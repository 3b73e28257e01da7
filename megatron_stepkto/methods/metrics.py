"""The numbers of one update, from sums over all ranks and micro-batches: divided once, here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the report shows these numbers, and needs no torch
    from megatron_stepkto.losses import Balance

KINDS = ("right", "wrong", "right_steps", "wrong_steps")
# What ``objectives.reward_sums`` counts of a micro-batch.
REWARD_SUMS = (
    *(f"{part}_{kind}" for part in ("log_ratio", "num") for kind in KINDS),
    *(f"signs_right{suffix}" for suffix in ("", "_steps")),
)
KTO_LIKE = ("step_kto", "kto")
PAIRED = ("dpo", "irpo")

Row = dict[str, float | int | None]


def metrics_of(sums: Mapping[str, float], kl: Mapping[str, float], method: str, betas: tuple[float, float]) -> Row:
    """Losses, log-ratios (nats), rewards, margins, shares and counts of a global batch; None where it had none.

    loss_outcome, loss_step, loss_dpo, loss_nll are the loss's parts (they add up to it). reward_* is beta times the
    log-ratio; margin and step_margin are rewards of right less those of wrong. sign_accuracy is the share of judged
    solutions (steps) whose log-ratio is above 0 where right and below 0 where wrong; pair_accuracy the share of
    pairs whose chosen side has the larger log-ratio. entropy is that of the policy's next-token distribution, mean over
    response tokens, where train.log.entropy asks for it.
    """

    def mean(name: str, count: str) -> float | None:
        return sums[name] / sums[count] if sums[count] else None

    row: Row = {"loss": mean("loss", "units")}
    for part, methods in (("outcome", KTO_LIKE), ("step", KTO_LIKE), ("dpo", PAIRED), ("nll", ("irpo",))):
        row[f"loss_{part}"] = mean(f"loss_{part}", "units") if method in methods else None
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
    row["pair_accuracy"] = mean("pairs_right", "units") if method in PAIRED else None
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

    return {
        level: {
            "right": short(each.right),
            "wrong": short(each.wrong),
            "desirable_weight": short(each.desirable_weight),
            "undesirable_weight": short(each.undesirable_weight),
            "ratio": short(each.ratio),
        }
        for level, each in balance.items()
    }


def balance_text(note: Mapping[str, Mapping[str, Any]]) -> str:
    """One line from ``balance_note``: per level the sum of each class's weights in the loss times its lambda."""
    return "pull of right over wrong: " + "; ".join(
        f"{level}s {'none' if each['ratio'] is None else each['ratio']} "
        f"(right {each['right']:g} x {each['desirable_weight']:g}, "
        f"wrong {each['wrong']:g} x {each['undesirable_weight']:g})"
        for level, each in note.items()
    )
