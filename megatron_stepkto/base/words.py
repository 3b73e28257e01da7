"""Words of messages."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """The number with its noun, in the singular or plural: 1 GPU, 7,500 GPUs, 0.25 GPUs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
