"""Judges of a solution's final answer: answer equivalence, or a reward model."""
