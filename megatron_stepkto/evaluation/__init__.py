"""Held-out problems: solve, judge, measure, compare."""
