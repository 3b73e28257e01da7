"""README and docs: every page is in the index, every link and anchor resolves, every command and make target exists."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest

from megatron_stepkto.cli.main import make_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ELSEWHERE = {"slurm/site.sh", "tools/checkpoint"}  # the user's own file, and Megatron-LM's tool

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")


def without_code(text: str) -> str:
    return SPAN.sub("", FENCE.sub("", text))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(text: str) -> Iterator[str]:
    """Commands as they would be typed: the lines of code blocks without a language, and the spans of the prose."""
    for _, language, block in FENCE.findall(text):
        if language in ("", "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield re.sub(r"(^|\s+)#.*", "", line).strip()
    for span in SPAN.findall(FENCE.sub("", text)):
        yield " ".join(span.split())


def commands(text: str) -> Iterator[list[str]]:
    """The words behind ``stepkto``; ``a|b`` as first word is two commands, ``[--option]`` counts as given."""
    for line in code(text):
        found = re.match(r"(?:srun (?:-\S+ )*)?stepkto (.+)", line)
        if not found:
            continue
        _, *words = shlex.split("stepkto " + re.sub(r"[\[\]]|\s\.\.\.", " ", found[1]))
        for name in words[0].split("|"):
            yield [name, *("1" if word in ("T", "N") else word for word in words[1:])]


def refusal(words: list[str]) -> str:
    """What argparse says against a command; empty where it accepts it."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            make_parser().parse_args(words)
        except SystemExit as end:
            return said.getvalue() if end.code else ""
    return ""


def test_index_lists_every_page() -> None:
    listed = [ROOT / "docs" / link for link in links((ROOT / "docs" / "index.md").read_text())]
    linked = {path.resolve() for path in listed}
    assert {page for page in PAGES if page.name != "index.md"} - linked == set()
    assert "docs/index.md" in links((ROOT / "README.md").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    page = ROOT / name
    for link in links(page.read_text()):
        if urlparse(link).scheme:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target), f"{name}: {link}: no such heading"


@pytest.mark.parametrize("name", NAMES)
def test_commands(name: str) -> None:
    for words in commands((ROOT / name).read_text()):
        if all(re.fullmatch("[a-z-]+", word) for word in words):  # mentioned, not to be typed: it needs no arguments
            words = [*words, "--help"]
        assert not (said := refusal(words)), f"{name}: stepkto {' '.join(words)}: {said}"


@pytest.mark.parametrize("name", NAMES)
def test_make_targets(name: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code((ROOT / name).read_text()):
        if found := re.match(r"make ([a-z0-9-]+)", line):
            assert found[1] in targets, f"{name}: make {found[1]}"


@pytest.mark.parametrize("name", NAMES)
def test_python_commands(name: str) -> None:
    """``python FILE`` and ``python -m MODULE`` of this repository exist, and define the options that are shown."""
    for line in code((ROOT / name).read_text()):
        if found := re.match(r"(?:\w+=\S+ )*python (-m )?([\w./]+)", line):
            module, path = found.groups()
            if path == "pytest":
                continue
            script = ROOT / (path.replace(".", "/") + ".py" if module else path)
            assert script.exists(), f"{name}: {line}"
            for option in re.findall(r"\s(--[a-z-]+)", line):
                assert f'"{option}"' in script.read_text(), f"{name}: {line}: no option {option}"


@pytest.mark.parametrize("name", NAMES)
def test_named_paths(name: str) -> None:
    """Files and folders of this repository that the prose names, as ``tests/gpu`` or ``benchmarks/gpu_*.py``."""
    made = {"runs", "build"}  # by runs and installs, not of the repository
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in made)
    for span in SPAN.findall(FENCE.sub("", (ROOT / name).read_text())):
        if re.fullmatch(rf"(?:{folders})/[\w./*-]+", span) and span not in ELSEWHERE:
            assert any(ROOT.glob(span)), f"{name}: {span}"


def test_named_pages() -> None:
    """Pages that messages, comments and recipes name."""
    files = [*ROOT.glob("megatron_stepkto/**/*.py"), *ROOT.glob("recipes/*.yaml"), *ROOT.glob("slurm/*")]
    for file in files:
        for page in re.findall(r"docs/[\w/.-]+\.md", file.read_text(errors="replace")):
            assert (ROOT / page).exists(), f"{file.relative_to(ROOT)}: {page}"


def test_the_checks_see_faults() -> None:
    text = (
        "`stepkto sample R --iteration T`\n```\nsrun -N1 stepkto plan M --gpus 8 [--json]  # why\n```\n`stepkto a|b X`"
    )
    assert list(commands(text)) == [
        ["plan", "M", "--gpus", "8", "--json"],
        ["sample", "R", "--iteration", "1"],
        ["a", "X"],
        ["b", "X"],
    ]
    assert "unrecognized" in refusal(["plan", "M", "--no-such-option"])
    assert refusal(["plan", "M", "--gpus", "8", "--json"]) == ""
