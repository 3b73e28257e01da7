"""``make gpu``: set up a machine with NVIDIA GPUs. Two environments, since vLLM and training pin different packages:

  .venv-gpu-train    CUDA builds of torch and Megatron-Core, Transformer Engine, Apex if you have its source
  .venv-gpu-sample   vLLM

Every package comes from requirements/gpu-KIND.lock, whose hashes pip checks; from the package index, or offline from a
folder of wheels (``--wheels DIR``; ``--download DIR`` fills one). What is missing is said before anything is installed.
Only the standard library is imported here: the script runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu_setup"  # of what happens outside an environment
PYTHONS = ((3, 12), (3, 11))  # pyproject.toml: requires-python
KINDS = ("train", "sample")
CUDA_MAJOR, DRIVER = 13, 580  # of the locks, and the first driver branch that runs it
VENV = [sys.executable, "-m", "venv"]
CUDA_DEFAULT = Path("/usr/local/cuda")  # where CUDA's own installer puts it
CUDA_HEADERS = ("include", "targets/x86_64-linux/include")  # conda's toolkit has the second alone
INSTALLED_GB = {"train": 7, "sample": 10}  # on the disk: 5.8 and 8.8 measured, and room to unpack
ENGINE = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
ENGINE_TORCH = ENGINE[2]  # a source package: compiled against the torch that is installed
ENGINE_CORE_MINUTES = 18  # to compile it: minutes x cores
ENGINE_STATES = {"required": ["with"], "optional": ["with", "without"], "off": ["without"]}
LACKS = "Transformer Engine (FP8, context parallelism)"


class SetupError(Exception):
    """What is wrong, in one line, and what to do. ``code``: 2 for what the user can correct, 1 for the machine."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Pin:
    """One package of a lock, its version and the SHA-256 of its files; ``text`` is its part of the lock."""

    name: str
    version: str
    hashes: frozenset[str]
    text: str


def read_lock(path: Path, python: tuple[int, int]) -> list[Pin]:
    """The packages that a lock holds for a version of Python."""
    pins = []
    for text in re.split(r"\n(?=\w)", re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)):
        head = re.match(r"([\w.-]+)==(\S+)(?: ; python_full_version (<|>=) '3\.(\d+)')? \\\n", text)
        if not head:
            raise SetupError(f"{path}: expected NAME==VERSION and hashes, found {text[:60]!r}; restore it from git", 1)
        name, version, relation, minor = head.groups()
        if relation and (python < (3, int(minor))) != (relation == "<"):
            continue
        pins.append(Pin(name, version, frozenset(re.findall(r"--hash=sha256:(\w{64})", text)), text))
    return pins


def write_lock(path: Path, pins: Sequence[Pin]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(pin.text for pin in pins), encoding="utf-8")
    return str(path)


def lock_path(kind: str) -> Path:
    return ROOT / "requirements" / f"gpu-{kind}.lock"


def environment_path(kind: str) -> Path:
    return ROOT / f".venv-gpu-{kind}"


# --- what is missing, before anything starts ---------------------------------------------------------------------


def machine_faults(need_gpu: bool) -> Iterator[str]:
    if sys.version_info[:2] not in PYTHONS:
        yield (
            f"expected Python 3.12 (Megatron-Core 0.19) or 3.11 (0.16), found {platform.python_version()} "
            f"({sys.executable}); run make with PYTHON=/path/to/python3.12"
        )
    elif importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        yield f"{sys.executable} cannot make virtual environments; install python{version}-venv"
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        yield f"expected Linux on x86-64, which the locks are for, found {sys.platform} on {platform.machine()}"
    if need_gpu and (fault := driver_fault()):
        yield f"{fault}; run on a GPU node, or add GPU_ARGS=--without-gpu to prepare for one from here"


def driver_fault() -> str | None:
    wanted = f"expected an NVIDIA driver of {DRIVER} or later (CUDA {CUDA_MAJOR})"
    if shutil.which("nvidia-smi") is None:
        return f"{wanted}, found no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return f"{wanted}, but nvidia-smi does not answer"
    found = re.match(r"(\d+)\.", done.stdout)
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        return f"{wanted}, but nvidia-smi fails: {said[0] if said else 'it prints nothing'}"
    return None if int(found[1]) >= DRIVER else f"{wanted}, found {done.stdout.split()[0]}"


def compiler_faults() -> Iterator[str]:
    """What the compilation of Transformer Engine's torch part lacks."""
    or_without = f"or add GPU_ARGS='--transformer-engine off' to go without {LACKS}"
    try:
        cuda_home()
    except SetupError as error:
        yield f"{error}, {or_without}"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        yield f"expected a C++ compiler, found no {os.environ.get('CXX', 'c++')}; install g++, {or_without}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        yield f"expected Python.h in {sysconfig.get_path('include')}; install python{version}-dev, {or_without}"


def cuda_home() -> Path:
    """The folder of the CUDA toolkit: that of nvcc in CUDA_HOME, on PATH, or where CUDA's installer puts it.

    Raises:
        SetupError: there is none, or it is of another version or has no headers.
    """
    places = [f"{os.environ['CUDA_HOME']}/bin/nvcc" if os.environ.get("CUDA_HOME") else None, shutil.which("nvcc"),
              CUDA_DEFAULT / "bin" / "nvcc"]  # fmt: skip
    nvcc = next((Path(place).resolve() for place in places if place and Path(place).is_file()), None)
    if nvcc is None:
        where = f"in CUDA_HOME, on PATH and in {CUDA_DEFAULT}"
        raise SetupError(f"expected nvcc of CUDA {CUDA_MAJOR}, found none {where}; install it")
    release = re.search(r"release (\d+)\.\d+", output_of(nvcc, "--version"))
    if not release or int(release[1]) != CUDA_MAJOR:
        found = release[0] if release else "no release"
        raise SetupError(f"expected nvcc of CUDA {CUDA_MAJOR}, found {found} ({nvcc}); set CUDA_HOME")
    # On PATH may be a script that starts the real nvcc, which alone knows where it is.
    real = re.search(r"^#\$ _HERE_=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    home = Path(real[1] if real else nvcc.parent).parent
    if not any((home / folder / "cuda_runtime_api.h").is_file() for folder in CUDA_HEADERS):
        raise SetupError(f"expected CUDA's headers in {home}/include, found no cuda_runtime_api.h; set CUDA_HOME")
    return home


def output_of(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def disk_fault(needed_gb: int) -> str | None:
    free = shutil.disk_usage(ROOT).free / 1e9
    return None if free >= needed_gb else f"expected {needed_gb} GB free in {ROOT}, found {free:.0f}; make room"


def wheel_faults(folder: Path, pins: Sequence[Pin], python: tuple[int, int]) -> Iterator[str]:
    """What a folder of wheels lacks. Files are matched by name, tags and hash, as pip does."""
    if not folder.is_dir():
        yield f"{folder}: expected a folder of wheels; fill one with make gpu-wheels WHEELS={folder}"
        return
    files: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if fits(path.name, python):
            name, version = path.name.removesuffix(".tar.gz").split("-")[:2]
            files.setdefault((normal(name), version), []).append(path)
    missing = []
    for pin in pins:
        found = files.get((normal(pin.name), pin.version), [])
        if not found:
            missing.append(f"{pin.name}=={pin.version}")
        elif not any(sha256(path) in pin.hashes for path in found):
            yield (
                f"{found[0]}: its SHA-256 is not in the lock for {pin.name}=={pin.version}; delete it and run "
                f"make gpu-wheels WHEELS={folder}"
            )
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        version = f"Python {python[0]}.{python[1]}"
        yield f"{folder}: no file for {version} of {some}; run make gpu-wheels WHEELS={folder} with {version}"


def fits(file: str, python: tuple[int, int]) -> bool:
    """Whether a wheel's tags fit a CPython on Linux x86-64; a source package always does."""
    if file.endswith(".tar.gz"):
        return "-" in file
    parts = file.removesuffix(".whl").split("-")
    if not file.endswith(".whl") or len(parts) not in (5, 6):
        return False
    interpreters, abis, platforms = (set(part.split(".")) for part in parts[-3:])
    versions = [int(found[1]) for tag in interpreters if (found := re.fullmatch(r"cp3(\d+)", tag))]
    right_python = not interpreters.isdisjoint({"py3", f"py{python[0]}{python[1]}", f"cp{python[0]}{python[1]}"}) or (
        "abi3" in abis and any(version <= python[1] for version in versions)
    )
    return right_python and any(tag == "any" or re.fullmatch(r"(many)?linux\S*_x86_64", tag) for tag in platforms)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- steps -------------------------------------------------------------------------------------------------------


def run(what: str, command: Sequence[str], log: Path, total: int = 0, **env: str) -> str:
    """Output of a command, kept in ``log`` too; says every half minute how far it is, of ``total`` packages if given.

    Raises:
        SetupError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = said = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT, text=True
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    print(f"  {what}: {said - begun:.0f} s{progress(log, total)}", flush=True)
        except BaseException:
            process.kill()
            raise
    text = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        raise SetupError(f"{what}: {complaint(text)} (exit code {process.returncode}; see {log})", 1)
    return text


def progress(log: Path, total: int) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    if compiled := re.findall(r"^\s*\[(\d+)/(\d+)\] ", text, re.MULTILINE):  # ninja's lines
        return f", {compiled[-1][0]} of {compiled[-1][1]} files compiled"
    if "Installing collected packages" in text:
        return ", unpacking"
    fetched = len(re.findall(r"^(?:Collecting|Processing) ", text, re.MULTILINE))
    return f", {min(fetched, total)} of {total} packages fetched" if total else ""


def complaint(text: str) -> str:
    """The line of a log that says what went wrong; pip prints advice behind it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        package = next((line for line in lines if "from " in line and "==" in line and line.endswith(":")), "a package")
        return f"the hash of {package.rstrip(':')} is not the lock's"
    unreached = [line for line in lines if "connection broken by" in line]
    if unreached and "(from versions: none)" in text:  # pip then says that no such package exists
        cause = re.sub(r".*connection broken by '(.*)': /.*", r"\1", unreached[-1])
        return f"the package index cannot be reached: {cause[-150:]}"
    if compilers := [line for line in lines if re.search(r":\d+: (fatal )?error: ", line)]:
        return re.sub(r"^\S*/", "", compilers[0])[:200]
    errors = [line for line in lines if re.match(r"(ERROR|error|\w*Error)(:|$)", line)]
    causes = [line for line in errors if not re.search(r"-failed$|-error$|: Failed building", line)]  # pip's headings
    return (causes or errors or lines or ["no output"])[-1][:200]


@dataclass(frozen=True)
class Options:
    wheels: Path | None
    engine: str  # required, optional or off: Transformer Engine
    gpu: bool
    apex: Path | None


class Environment:
    """One of the two virtual environments while it is made."""

    def __init__(self, kind: str, options: Options) -> None:
        self.kind, self.options = kind, options
        self.folder = environment_path(kind)
        self.python = self.folder / "bin" / "python"
        self.logs = self.folder / "logs"
        self.pins = read_lock(lock_path(kind), sys.version_info[:2])

    def wanted(self) -> list[Pin]:
        """The packages to install; Transformer Engine's are left out where it is off."""
        return [pin for pin in self.pins if self.options.engine != "off" or pin.name not in ENGINE]

    def stamp(self) -> str:
        """What it is made from: the Python and the lock."""
        return hashlib.sha256("\n".join([sys.version, *(pin.text for pin in self.pins)]).encode()).hexdigest()

    def is_ready(self) -> bool:
        """Whether it is there, from this lock, with at least what is asked for."""
        path = self.folder / ".ready"
        stamp, engine, apex = path.read_text(encoding="utf-8").split("\n")[:3] if path.is_file() else ("", "", "")
        return (
            stamp == self.stamp()
            and (self.kind != "train" or engine in ENGINE_STATES[self.options.engine])
            and (self.kind != "train" or not self.options.apex or apex == str(self.options.apex))
        )

    def make(self) -> str:
        """Makes it from nothing, so that it holds what the lock holds; returns what it holds."""
        if self.folder.exists():
            print(f"{self.folder.name}: of another lock or not finished: removing it", flush=True)
            shutil.rmtree(self.folder)
        begun = time.monotonic()
        size = re.search(r"To download.*: (.+)", lock_path(self.kind).read_text(encoding="utf-8"))
        where = f"from {self.options.wheels}" if self.options.wheels else f"{size and size[1]} to download"
        pins = [pin for pin in self.wanted() if pin.name not in ENGINE]
        print(f"{self.folder.name}: {len(pins)} packages, {where}, about {INSTALLED_GB[self.kind]} GB here", flush=True)
        run("virtual environment", [*VENV, str(self.folder)], LOGS / "venv.log")
        self.install("packages", pins)
        without = self.add_transformer_engine() if self.kind == "train" else ""
        if self.options.apex and self.kind == "train":
            self.add_apex(self.options.apex)
        self.pip("this package", ["--no-deps", "--no-build-isolation", "--no-index", "--editable", str(ROOT)])
        run("consistency", [str(self.python), "-m", "pip", "check"], self.logs / "check.log")
        said = self.probe() + (f"; without {LACKS}: {without}" if without else "")
        has_engine = "without" if without else "with"
        (self.folder / ".ready").write_text(f"{self.stamp()}\n{has_engine}\n{self.options.apex}\n", encoding="utf-8")
        print(f"{self.folder.name}: ready after {time.monotonic() - begun:.0f} s: {said}", flush=True)
        return said

    def install(self, what: str, pins: Sequence[Pin], **env: str) -> None:
        listed = write_lock(self.logs / f"{what.replace(' ', '_')}.lock", pins)
        offline = ["--no-index", "--find-links", str(self.options.wheels)] if self.options.wheels else []
        self.pip(what, [*offline, "--no-deps", "--no-build-isolation", "--require-hashes", "-r", listed],
                 total=len(pins), **env)  # fmt: skip

    def pip(self, what: str, arguments: Sequence[str], total: int = 0, **env: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
        if "MAX_JOBS" in env:  # a compilation, of which pip otherwise shows nothing until it ends
            command.append("--verbose")
        run(f"{self.kind}: {what}", [*command, *arguments], self.logs / f"{what.replace(' ', '_')}.log", total, **env)

    def add_transformer_engine(self) -> str:
        """Returns why it is left out, or nothing."""
        if self.options.engine == "off":
            return "off"
        try:
            if faults := list(compiler_faults()):
                raise SetupError(faults[0])
            core = [pin for pin in self.pins if pin.name in ENGINE and pin.name != ENGINE_TORCH]
            self.install("transformer engine", core)
            jobs = compile_jobs()
            minutes = max(1, round(ENGINE_CORE_MINUTES / jobs))
            print(f"  compiling {ENGINE_TORCH}: about {minutes} minutes with {jobs} compilers", flush=True)
            torch_part = [pin for pin in self.pins if pin.name == ENGINE_TORCH]
            self.install("transformer engine torch", torch_part, **compiler_settings(self.python, jobs))
            loads = [str(self.python), "-c", "import transformer_engine.pytorch"]
            run("transformer engine", loads, self.logs / "te.log")
        except SetupError as error:
            if self.options.engine == "required":
                raise
            # Half of it would break every import of Megatron-Core, and with it what needs none of it.
            if self.logs.joinpath("transformer_engine.log").exists():
                command = [str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", *ENGINE]
                run("transformer engine", command, self.logs / "te_removed.log")
            return str(error)
        return ""

    def add_apex(self, source: Path) -> None:
        """From a checkout of its source: on the package index the name belongs to another project."""
        print(f"  compiling Apex from {source}", flush=True)
        self.pip("apex", ["--no-deps", "--no-build-isolation", "--no-index", str(source)], APEX_CPP_EXT="1",
                 APEX_CUDA_EXT="1", **compiler_settings(self.python, compile_jobs()))  # fmt: skip

    def probe(self) -> str:
        """Imports what matters; returns the versions."""
        modules = ["megatron_stepkto", "megatron.core" if self.kind == "train" else "vllm"]
        shown = ["torch", "megatron-core", "transformer-engine", "apex", "vllm"]
        script = f"""
import importlib
import importlib.metadata
import torch
for name in {modules!r}:
    importlib.import_module(name)
found = {{each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}}
print("; ".join(f"{{name}} {{found[name]}}" for name in {shown!r} if name in found))
if {self.options.gpu!r} and not torch.cuda.is_available():
    raise SystemExit(f"error: torch {{torch.__version__}} sees no GPU")
"""
        return run("check", [str(self.python), "-W", "ignore", "-c", script], self.logs / "probe.log").splitlines()[-1]


def compiler_settings(python: Path, jobs: int) -> dict[str, str]:
    """Environment variables for compilations against the torch that ``python`` imports."""
    home = cuda_home()
    # A CUDA toolkit brings no headers of cuDNN and NCCL: those that came with torch.
    where = "import nvidia, pathlib as p; print(*(d for r in nvidia.__path__ for d in p.Path(r).glob('*/include')))"
    found = subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=False).stdout.split()
    headers = [*(str(home / folder) for folder in CUDA_HEADERS), *found]
    return {
        "CUDA_HOME": str(home),
        "CPATH": os.pathsep.join([*headers, os.environ.get("CPATH", "")]).strip(os.pathsep),
        "PATH": os.pathsep.join([str(python.parent), str(home / "bin"), os.environ["PATH"]]),
        "MAX_JOBS": str(jobs),
        # Otherwise its setup.py fetches a compiled wheel from a release page, past the lock's hashes.
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        # pip's cache does not know which torch a wheel was compiled against.
        "PIP_NO_CACHE_DIR": "1",
    }


def compile_jobs() -> int:
    """Compilers at a time: one takes up to 3 GB. MAX_JOBS overrides."""
    if given := os.environ.get("MAX_JOBS"):
        if not re.fullmatch("[1-9][0-9]*", given):
            raise SetupError(f"MAX_JOBS: expected a number of compilers of at least 1, found {given!r}")
        return int(given)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gb // 3)))


# --- the folder of wheels, and an image that brings most packages ------------------------------------------------

# pip downloads a source package only where it can compute its metadata: enough of torch and CUDA for that.
TORCH_STUB = {
    "torch/__init__.py": f"class version: cuda = '{CUDA_MAJOR}.0'\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "from setuptools import Extension\n"
    "from setuptools.command.build_ext import build_ext as BuildExtension\n"
    "def CppExtension(name, sources, **_): return Extension(name, [])\n",
    "bin/nvcc": f"#!/bin/sh\necho release {CUDA_MAJOR}.0\n",
}


def download(folder: Path, kinds: Sequence[str]) -> str:
    """Fills a folder with the files of the locks, for this version of Python. Files that it has are kept."""
    python = sys.version_info[:2]
    folder.mkdir(parents=True, exist_ok=True)
    every: list[Pin] = []
    with tempfile.TemporaryDirectory() as scratch:
        pip = [f"{scratch}/venv/bin/python", "-m", "pip", "--disable-pip-version-check"]
        get = [*pip, "download", "--no-deps", "--progress-bar=off", "--require-hashes", f"--find-links={folder}",
               f"--dest={folder}"]  # fmt: skip
        run("virtual environment", [*VENV, f"{scratch}/venv"], LOGS / "venv.log")
        for kind in kinds:
            pins = read_lock(lock_path(kind), python)
            every += pins
            print(f"{lock_path(kind).name}: {len(pins)} packages", flush=True)
            listed = write_lock(Path(scratch, "packages.lock"), [pin for pin in pins if pin.name != ENGINE_TORCH])
            run(f"{kind}: packages", [*get, "-r", listed], LOGS / f"download_{kind}.log", len(pins))
            for engine in (pin for pin in pins if pin.name == ENGINE_TORCH):
                tools = [
                    f"{pin.name}=={pin.version}" for pin in pins if pin.name in ("packaging", "setuptools", "wheel")
                ]
                offline = ["install", "--no-deps", "--no-index", f"--find-links={folder}"]
                run("build tools", [*pip, *offline, *tools], LOGS / "download_tools.log")
                for file, text in TORCH_STUB.items():
                    path = Path(scratch, "stub", file)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
                    path.chmod(0o755)
                listed = write_lock(Path(scratch, "engine.lock"), [engine])
                stub = {"PYTHONPATH": f"{scratch}/stub", "CUDA_HOME": f"{scratch}/stub"}
                run(ENGINE_TORCH, [*get, "--no-build-isolation", "-r", listed], LOGS / "download_engine.log", **stub)
    if faults := list(wheel_faults(folder, every, python)):
        raise SetupError(faults[0], 1)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{folder} holds every file for Python {python[0]}.{python[1]}, {size / 1e9:.1f} GB"


def complete() -> str:
    """Adds to the running Python, that of vLLM's image, what this package needs besides; what the image has stays.

    Raises:
        SetupError: the image's vLLM is not the lock's, or what it has does not satisfy this package.
    """
    import tomllib  # not in the Pythons that machine_faults() refuses

    pins = {normal(pin.name): pin for pin in read_lock(lock_path("sample"), sys.version_info[:2])}
    have = {normal(each.name): each.version for each in importlib.metadata.distributions()}
    if have.get("vllm") != pins["vllm"].version:
        raise SetupError(f"expected an image with vLLM {pins['vllm'].version}, found {have.get('vllm', 'none')}")
    install = [sys.executable, "-m", "pip", "install", "--progress-bar=off", "--no-deps"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted, added = project["dependencies"], []
    while lacking := sorted({name for name in map(requirement_name, wanted) if name in pins and name not in have}):
        listed = write_lock(LOGS / "lacking.lock", [pins[name] for name in lacking])
        run("packages", [*install, "--require-hashes", "-r", listed], LOGS / "packages.log", len(lacking))
        importlib.invalidate_caches()
        have |= {name: pins[name].version for name in lacking}
        wanted = [line for name in lacking for line in importlib.metadata.requires(name) or []]
        added += [f"{name} {pins[name].version}" for name in lacking]
    run("this package", [*install, "--no-build-isolation", "--no-index", "--editable", str(ROOT)], LOGS / "package.log")
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    if faults := [line for line in done.stdout.splitlines() if line.startswith(project["name"])]:
        raise SetupError(f"the image's packages do not fit: {'; '.join(faults)}", 1)
    return f"added {', '.join(added) or 'nothing'}"


def requirement_name(requirement: str) -> str:
    """The normalised name in NAME, NAME>=1, NAME[extra] ...: all that counts here, since the lock is complete."""
    return normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])


# --- the command -------------------------------------------------------------------------------------------------


def check(environments: Sequence[Environment], options: Options) -> None:
    """Prints every fault that can be known before the set-up, a line each.

    Raises:
        SetupError: there is one.
    """
    faults = list(machine_faults(options.gpu))
    todo = [environment for environment in environments if not environment.is_ready()]
    if (options.engine == "required" or options.apex) and any(environment.kind == "train" for environment in todo):
        faults += compiler_faults()
    if options.apex and not (options.apex / "setup.py").is_file():
        faults.append(f"{options.apex}: expected a checkout of NVIDIA Apex, found no setup.py in it")
    if todo and (fault := disk_fault(sum(INSTALLED_GB[environment.kind] for environment in todo))):
        faults.append(fault)
    if options.wheels and not faults:
        pins = {(pin.name, pin.version): pin for environment in todo for pin in environment.wanted()}
        faults += wheel_faults(options.wheels, list(pins.values()), sys.version_info[:2])
    for fault in faults[:-1]:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        raise SetupError(faults[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, help="one of the two environments")
    parser.add_argument("--wheels", type=Path, help="folder of wheels and source packages; nothing is downloaded")
    parser.add_argument("--download", type=Path, metavar="DIR", help="fill a folder for --wheels; nothing is installed")
    parser.add_argument("--without-gpu", action="store_true", help="prepare for GPUs on a machine that has none")
    parser.add_argument("--transformer-engine", choices=("required", "optional", "off"), default="required",
                        help="optional: go on without it where it cannot be compiled")  # fmt: skip
    parser.add_argument("--apex", type=Path, metavar="SOURCE", help="a checkout of NVIDIA Apex, to be compiled")
    parser.add_argument("--check", action="store_true", help="say what is missing; install nothing")
    parser.add_argument("--complete", action="store_true", help="in vLLM's image: add what sampling needs besides")
    arguments = parser.parse_args()
    if arguments.download and (arguments.check or arguments.wheels):
        parser.error("--download goes neither with --check nor with --wheels")
    kinds = [arguments.only] if arguments.only else list(KINDS)
    options = Options(arguments.wheels and arguments.wheels.resolve(), arguments.transformer_engine,
                      not arguments.without_gpu, arguments.apex and arguments.apex.resolve())  # fmt: skip
    try:
        if arguments.complete:
            print(complete())
            return
        if arguments.download:
            if faults := list(machine_faults(need_gpu=False)):
                raise SetupError(faults[0])
            print(download(arguments.download.resolve(), kinds))
            return
        environments = [Environment(kind, options) for kind in kinds]
        check(environments, options)
        if options.engine != "off" or options.apex:
            compile_jobs()
        for environment in environments:
            if arguments.check or environment.is_ready():
                print(f"{environment.folder.name}: {'ready' if environment.is_ready() else 'can be made here'}")
            else:
                environment.make()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        print("interrupted; run it again to start over", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # no space left, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
