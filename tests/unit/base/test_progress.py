"""What a progress line says about the time that is left."""

from __future__ import annotations

import pytest

from megatron_stepkto.base import progress
from megatron_stepkto.base.progress import ProgressBar


def test_the_estimate_leaves_out_earlier_work_and_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 of 400 were there; processes start for 60 s, the first one advances then; from there on 2 a second."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with ProgressBar("work", 400, "pieces") as bar:
        for now, done in ((1, 100), (30, 100), (60, 120), (90, 180), (110, 220)):
            clock[0] = now
            bar.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:4] == [
        "work: 100/400 pieces, 30 s",
        "work: 120/400 pieces, 60 s",
        "work: 180/400 pieces, 90 s, about 110 s left",
        "work: 220/400 pieces, 110 s, about 90 s left",
    ]
