"""Judging a sample: is its answer right (outcome), is each of its steps right (process)."""
