"""The learning rate as a function of the update alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from megatron_stepkto.recipe import keys as recipe


def learning_rate(update: int, num_updates: int, settings: recipe.Optimizer) -> float:
    """Rate of update 0..num_updates-1: linear warm-up, then constant, or linear or cosine down to lr * min_lr_ratio."""
    if update < settings.warmup_updates:
        return settings.lr * (update + 1) / settings.warmup_updates
    if settings.schedule == "constant":
        return settings.lr
    span = max(1, num_updates - settings.warmup_updates)
    share = (update - settings.warmup_updates) / span
    low = settings.min_lr_ratio
    left = 1 - share if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return settings.lr * (low + (1 - low) * left)
