"""A checker for the pairs that need computer algebra; its process starts once per module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_stepkto.answers.equivalence import EquivalenceChecker


@pytest.fixture(scope="module")
def checker() -> Iterator[EquivalenceChecker]:
    with EquivalenceChecker(workers=1, timeout_s=20.0) as checker:
        yield checker
