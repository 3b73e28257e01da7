"""The hash of the code that decides a value follows its imports, whatever they are, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_stepkto.answers import equivalence, exact, math_verify_worker
from megatron_stepkto.base import code_hash as module
from megatron_stepkto.base.code_hash import code_hash, versions
from megatron_stepkto.judging.process import prm, rule
from megatron_stepkto.sampling import job, vllm_engine, worker
from megatron_stepkto.steps import tokens as steps

Hashes = Callable[[], dict[str, str]]


@pytest.fixture
def hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hashes]:
    """Of a copy of the package, whose files may be edited."""
    copy = tmp_path / "package"
    shutil.copytree(module.ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "ROOT", copy)
    roots = {
        "algebra": (math_verify_worker.__name__, exact.__name__), "steps": (steps.__name__,), "rule": (rule.__name__,),
        "scores": (prm.WORKER,), "rollouts": (worker.__name__,),
    }  # fmt: skip

    def compute() -> dict[str, str]:
        code_hash.cache_clear()
        return {name: code_hash(*modules) for name, modules in roots.items()}

    yield compute
    code_hash.cache_clear()


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        (math_verify_worker.__name__, {"algebra"}),
        (exact.__name__, {"algebra"}),
        ("megatron_stepkto.answers.text", {"algebra"}),  # imported by both
        ("megatron_stepkto.answers.units", {"algebra"}),  # imported by one of them
        ("megatron_stepkto.judging.equations", {"rule"}),
        ("megatron_stepkto.steps.text", {"steps"}),
        (prm.WORKER, {"scores"}),
        (vllm_engine.__name__, {"rollouts"}),  # imported inside of a function
        (job.__name__, {"rollouts"}),
        ("megatron_stepkto.base.files", set()),
        ("megatron_stepkto.report.page", set()),
    ],
)
def test_an_edit_changes_what_it_decides(hashes: Hashes, edited: str, changed: set[str]) -> None:
    before = hashes()
    source = module._find(edited)
    assert source is not None
    source.write_text(source.read_text() + "\n# edited\n")
    after = hashes()
    assert {name for name in before if before[name] != after[name]} >= changed
    # steps are read by a rule's worker, too
    assert {name for name in before if before[name] != after[name]} - changed <= {"rule"}


def test_a_module_that_is_not_there_is_no_empty_hash() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"megatron_stepkto\.nothing"):
        code_hash("megatron_stepkto.nothing")
    with pytest.raises(ModuleNotFoundError):
        code_hash("json")


def test_versions_of_the_libraries_of_computer_algebra() -> None:
    assert set(equivalence._algebra()[1]) == {"math-verify", "latex2sympy2_extended", "sympy", "mpmath"}
    assert versions("sympy")["sympy"].startswith("1.")
