"""Takes wheels to a GPU machine without a network, in folders small enough to be sent one by one.

    python tools/gpu_pack.py make OUT --wheels DIR --present FILE     here: OUT/1, OUT/2 ... of at most --limit-mib each
    python3 tools/gpu_pack.py take OUT/1 DIR                          there, for each folder that has arrived
    python3 tools/gpu_pack.py install DIR SITE                        there; then export PYTHONPATH=SITE

DIR holds the wheels for that machine's Python (docs/gpu.md). FILE lists the packages that the machine has, one a line,
as ``pip list --format=freeze`` prints them: they are not sent, and neither are torch and NVIDIA's libraries. The first
folders hold what is needed without Transformer Engine. It follows in the last, as its largest file is cut into pieces;
its torch part is a source package that ``install`` compiles there, unless DIR holds a wheel of it.
Only the standard library and this folder's gpu_setup.py are imported here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import gpu_setup

# The machine's own: they fit its driver.
NEVER = re.compile(r"torch|torchvision|torchaudio|triton|nvidia-.*|cuda-.*")
ENGINE = "transformer-engine"
PIECE = ".piece"


def package_of(file: Path) -> str:
    """Normalised name of a wheel's or a source package's project."""
    return re.sub(r"[-_.]+", "-", re.split(r"-\d", file.name)[0]).lower()


def packages_in(path: Path) -> set[str]:
    names = (re.split(r"[=<>!~ @;\[]", line.strip())[0] for line in path.read_text(encoding="utf-8").splitlines())
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names if name and not name.startswith("#")}


def to_send(wheels: Path, present: Iterable[str]) -> list[Path]:
    """Files of the folder that the machine needs, small ones first and Transformer Engine's last.

    A project's source is left out if the folder has a wheel of it.
    """
    have = set(present)
    files = [file for file in wheels.iterdir() if file.name.endswith((".whl", ".tar.gz", ".zip"))]
    built = {package_of(file) for file in files if file.suffix == ".whl"}
    needed = [
        file
        for file in files
        if not (package_of(file) in have or NEVER.fullmatch(package_of(file)))
        and (file.suffix == ".whl" or package_of(file) not in built)
    ]
    return sorted(needed, key=lambda file: (package_of(file).startswith(ENGINE), file.stat().st_size, file.name))


def divide(files: Sequence[Path], out: Path, limit: int) -> list[Path]:
    """Copy the files, in order, into out/1, out/2 ... of at most ``limit`` bytes each; a larger file is cut.

    The first file of Transformer Engine begins a new folder: what comes before it is of use without it.
    """
    number, used = 0, limit
    folders: list[Path] = []

    def folder(size: int, new: bool = False) -> Path:
        nonlocal number, used
        if new or used + size > limit:
            number, used = number + 1, 0
            folders.append(out / str(number))
            folders[-1].mkdir(parents=True)
        used += size
        return folders[-1]

    engine = next((file for file in files if package_of(file).startswith(ENGINE)), None)
    for file in files:
        size = file.stat().st_size
        if size <= limit:
            shutil.copy(file, folder(size, new=file == engine))
            continue
        total = -(-size // limit)
        with file.open("rb") as source:
            for piece in range(total):
                data = source.read(limit)
                target = folder(len(data), new=file == engine and piece == 0)
                (target / f"{file.name}{PIECE}{piece:02}of{total:02}").write_bytes(data)
    return folders


def make(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if not arguments.wheels.is_dir():
        raise SystemExit(f"error: {arguments.wheels}: expected a folder of wheels")
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"error: {out}: expected a new or empty folder")
    present = packages_in(arguments.present) if arguments.present else set()
    files = [*to_send(arguments.wheels, present), *arguments.also]
    for folder in divide(files, out, int(arguments.limit_mib * 2**20)):
        names = sorted(file.name for file in folder.iterdir())
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB, {len(names)} files, {names[0]} ... {names[-1]}")


def take(arguments: argparse.Namespace) -> None:
    """Keep a folder's files, and join the file whose pieces are all there."""
    into: Path = arguments.into
    into.mkdir(parents=True, exist_ok=True)
    for file in arguments.folder.iterdir():
        shutil.copy(file, into)
    for name in {file.name.partition(PIECE)[0] for file in into.glob(f"*{PIECE}*")}:
        pieces = sorted(into.glob(f"{name}{PIECE}*"))
        total = int(pieces[0].name.rpartition("of")[2])
        if len(pieces) < total:
            print(f"{name}: {len(pieces)} of {total} pieces are there")
            continue
        with (into / name).open("wb") as whole:
            for piece in pieces:
                whole.write(piece.read_bytes())
                piece.unlink()
    print(f"{into}: {len(list(into.iterdir()))} files")


def install(arguments: argparse.Namespace) -> None:
    """Put every complete package of the folder into ``site``; compile those that are sources."""
    site: Path = arguments.site
    files = sorted(file for file in arguments.folder.iterdir() if PIECE not in file.name)
    wheels = [str(file) for file in files if file.suffix == ".whl"]
    sources = [str(file) for file in files if file.name.endswith((".tar.gz", ".zip"))]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps",
           "--no-compile", "--upgrade", "--target", str(site)]  # fmt: skip
    if wheels:
        subprocess.run([*pip, *wheels], check=True)
    if not sources:
        return
    settings = gpu_setup.compiler_settings(Path(sys.executable), gpu_setup.compile_jobs())
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    for source in sources:
        command = [*pip, "--no-build-isolation", source]
        subprocess.run(command, check=True, env={**os.environ, **settings, "PYTHONPATH": path})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="make|take|install")
    here = commands.add_parser("make", help="divide a folder of wheels")
    here.add_argument("out", type=Path, help="a new folder")
    here.add_argument("--wheels", type=Path, required=True, metavar="DIR", help="for the GPU machine's Python")
    here.add_argument("--present", type=Path, metavar="FILE", help="what the GPU machine has")
    here.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="FILE", help="further files, such as a model's"
    )
    here.add_argument("--limit-mib", type=float, default=57, help="of a folder (default 57)")
    here.set_defaults(run=make)
    there = commands.add_parser("take", help="on the GPU machine: keep a folder that has arrived")
    there.add_argument("folder", type=Path)
    there.add_argument("into", type=Path)
    there.set_defaults(run=take)
    last = commands.add_parser("install", help="on the GPU machine: install what was taken")
    last.add_argument("folder", type=Path)
    last.add_argument("site", type=Path, help="a folder for PYTHONPATH")
    last.set_defaults(run=install)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except gpu_setup.SetupError as error:
        raise SystemExit(f"error: {error}") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: pip ended with exit code {error.returncode}; its message is above") from None


if __name__ == "__main__":
    main()
