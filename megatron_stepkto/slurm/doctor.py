"""``stepkto doctor``: checks that this machine, or every node of this job, is fit for the run, in under a minute.

Alone, or once per node (``srun --ntasks-per-node=1 stepkto doctor RECIPE``). The nodes find each other through files
in the run's folder, which shows that the folder is shared; then their ranks do one real all-reduce.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import StageFailed, UserError
from megatron_stepkto.base.files import read_json, write_json
from megatron_stepkto.base.nodes import Nodes, this_node
from megatron_stepkto.base.processes import Child, child_main, run_children
from megatron_stepkto.base.progress import say
from megatron_stepkto.base.stage import package_versions
from megatron_stepkto.base.words import counted
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.run.folder import Run
from megatron_stepkto.run.refusals import Environment, machine_refusals
from megatron_stepkto.training.requirements import check_gpus

OPEN_FILES = 4096
LOCKED_MEMORY = 64 << 20  # bytes; InfiniBand pins its buffers
MAX_SKEW_S = 5.0  # between a node's clock and the file server's: make, logs and lock files are read by their times
IDLE_BYTES = 1 << 30  # of a GPU's memory; a display or MPS takes less
MEET_S = 45.0  # NFS may show a folder as it was for 30 s (acdirmin)
ALL_REDUCE_S = 40.0
ALL_REDUCE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def doctor(run: Run, environment: Environment | None = None) -> list[str]:
    """All faults found here: on the first node those of all nodes, on the others their own.

    Args:
        environment: look for what the stages of that environment of a cluster would refuse; None: of both.

    Raises:
        UserError: the nodes were started wrongly (see ``this_node``).
    """
    nodes, recipe = this_node(), run.recipe
    on_gpu = _wants_gpu(recipe)
    folder = recipe.run_dir / "doctor" / (nodes.attempt or f"alone-{uuid.uuid4().hex[:8]}")
    name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    faults = _limits(on_gpu)
    devices = 1 if nodes.count > 1 else 2
    if on_gpu:
        devices = 1 if environment == "sample" else nodes.ranks_here(recipe.train.parallel.ranks)
        faults += _gpus(devices)
    # one line for one cause: that GPUs are missing is known by now
    try:
        refused = machine_refusals(run, environment=environment)
    except UserError as error:  # no such model
        refused = [str(error)]
    faults += [line for line in refused if not any(line.endswith(fault) for fault in faults)]
    writable, skew = _write_test(folder, nodes)
    faults += writable
    own = {"node": name, "faults": faults, "versions": _versions(on_gpu), "clock_s": skew}
    if writable:  # without the folder the others cannot be met; they will say that this node is not seen
        return [f"{name}: {fault}" for fault in faults]
    write_json(folder / f"node-{nodes.number}.json", own)
    reports = _meet(folder, nodes.count)
    found = [f"{report['node']}: {fault}" for report in reports for fault in report["faults"]]
    found += _unseen(folder, reports, nodes.count) + disagreements(reports)
    if not found:  # a node with a fault would make the others wait in the collective
        found += _all_reduce(folder, nodes, devices, on_gpu)
    if nodes.count == 1 and not found:
        shutil.rmtree(folder, ignore_errors=True)
    return found if nodes.number == 0 else [line for line in found if line.startswith(f"{name}: ")]


def report(run: Run, environment: Environment | None = None) -> None:
    """Print the faults, or that there are none; raises SystemExit(1) when there are."""
    begun = time.monotonic()
    faults = doctor(run, environment)
    for fault in faults:
        print(f"fault: {fault}", flush=True)
    if faults:
        raise SystemExit(1)
    if int(os.environ.get("SLURM_NODEID", "0")) == 0 or "SLURM_STEP_NUM_NODES" not in os.environ:
        say(f"no fault found, {time.monotonic() - begun:.0f} s")


def _wants_gpu(recipe: Recipe) -> bool:
    import torch

    return recipe.train.device == "cuda" or (recipe.train.device == "auto" and torch.cuda.is_available())


# --- this node -------------------------------------------------------------------------------------------------


def _limits(on_gpu: bool) -> list[str]:
    faults = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        faults.append(
            f"a process may open {files} files, checkpoints and data need {OPEN_FILES}; "
            f"put `ulimit -n {OPEN_FILES}` into the site file's environment(), or ask for a higher hard limit"
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if on_gpu and locked != resource.RLIM_INFINITY and locked < LOCKED_MEMORY:
        faults.append(
            f"a process may lock {locked >> 10} KiB of memory, InfiniBand needs more (NCCL would fail or use TCP); "
            "ask the site to set PropagateResourceLimitsExcept=MEMLOCK in slurm.conf and memlock unlimited for slurmd"
        )
    return faults


def _gpus(wanted: int) -> list[str]:
    try:
        check_gpus(wanted)
    except UserError as error:
        return [str(error)]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not answer ({error}); a GPU may have fallen off the bus: drain the node"]
    return busy_gpus(listed)


def busy_gpus(listed: str) -> list[str]:
    """``listed``: lines "index, MiB used" of nvidia-smi."""
    faults = []
    for line in listed.splitlines():
        index, used = (part.strip() for part in line.split(","))
        if int(used) << 20 > IDLE_BYTES:
            faults.append(f"GPU {index} is not idle: {used} MiB in use; end what runs there, or leave the node out")
    return faults


def _versions(on_gpu: bool) -> dict[str, str]:
    found = package_versions()
    if on_gpu:
        import torch

        found["cuda of torch"] = str(torch.version.cuda)
        if torch.distributed.is_nccl_available():  # not in the CPU build of torch, where `_gpus` found no GPU
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _write_test(folder: Path, nodes: Nodes) -> tuple[list[str], float]:
    """Check that this node can write there, and measure how far its clock is from the file server's."""
    path = folder / f".clock-{nodes.number}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = time.time()
        path.write_text("x")
        written = path.stat().st_mtime
        # a slow file server is not a wrong clock: only what is outside the time of the write counts
        skew = max(0.0, before - written) or min(0.0, time.time() - written)
        path.unlink()
    except OSError as error:
        return [f"{folder}: cannot write ({error.strerror}); give a shared folder of yours as `output`"], 0.0
    if abs(skew) > MAX_SKEW_S:
        return [f"the clock is {skew:+.0f} s from that of the file server; start NTP (chronyd) on the node"], skew
    return [], skew


# --- all nodes -------------------------------------------------------------------------------------------------


def _meet(folder: Path, count: int) -> list[dict[str, Any]]:
    """The reports of all nodes, or of those that came within ``MEET_S``."""
    deadline = time.monotonic() + MEET_S
    paths = [folder / f"node-{number}.json" for number in range(count)]
    while not all(path.is_file() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [read_json(path) for path in paths if path.is_file()]


def _unseen(folder: Path, reports: Sequence[dict[str, Any]], count: int) -> list[str]:
    if len(reports) == count:
        return []
    return [
        f"only {len(reports)} of {count} nodes ({', '.join(r['node'] for r in reports)}) are seen in {folder} after "
        f"{MEET_S:.0f} s: it is not shared, or a node could not write there; set output to a folder that all nodes see"
    ]


def disagreements(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Versions and clocks that differ between nodes."""
    faults = []
    first = reports[0] if reports else {}
    for other in reports[1:]:
        for name in sorted({*first["versions"], *other["versions"]}):
            here, there = first["versions"].get(name, "absent"), other["versions"].get(name, "absent")
            if here != there:
                faults.append(
                    f"{other['node']}: {name} is {there}, on {first['node']} it is {here}; "
                    "use one environment (site file: environment, IMAGE_TRAIN) on all nodes"
                )
        if abs(other["clock_s"] - first["clock_s"]) > MAX_SKEW_S:
            apart = other["clock_s"] - first["clock_s"]
            faults.append(f"{other['node']}: clock is {apart:+.0f} s from {first['node']}'s; start NTP (chronyd)")
    return faults


def _all_reduce(folder: Path, nodes: Nodes, devices: int, on_gpu: bool) -> list[str]:
    ranks = devices * nodes.count
    env = {"OMP_NUM_THREADS": "1"}
    if nodes.count == 1:
        env["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    device = "cuda" if on_gpu else "cpu"
    command = [sys.executable, "-W", "ignore", "-m", "megatron_stepkto.slurm.doctor"]
    children = [
        Child(
            [*command, str(folder), device, str(ALL_REDUCE_S)],
            folder / f"rank-{nodes.number * devices + local}.log",
            {**env, **nodes.environment(ranks, local)},
        )
        for local in range(devices)
    ]
    try:
        run_children(children, title="all-reduce", unit="ranks")
    except (StageFailed, UserError) as error:
        last = str(error).splitlines()[-1].strip()
        node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        return [
            f"{node}: all-reduce over {ranks} ranks failed: {last}; logs: {folder}; "
            "check NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in the site file (NCCL_DEBUG=INFO tells more)"
        ]
    if nodes.number == 0:
        result = read_json(folder / "all_reduce.json")
        say(
            f"all-reduce of {result['bytes'] >> 20} MiB over {ranks} ranks on {counted(nodes.count, 'node')}, "
            f"{result['backend']}: {result['gb_per_s']:.2f} GB/s bus bandwidth"
        )
    return []


def _rank() -> None:
    """One rank of the all-reduce: the sum must be right; rank 0 writes the speed, median of five."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("limit_s", type=float)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=arguments.limit_s))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = ALL_REDUCE_BYTES[device.type]
    values = torch.empty(size // 4, device=device)
    seconds = []
    for _ in range(6):
        values.fill_(rank + 1)
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        expected = ranks * (ranks + 1) / 2
        if not bool((values == expected).all()):
            raise UserError(
                f"rank {rank}: the all-reduce gave a wrong sum (expected {expected}): the network or a GPU is faulty"
            )
    if rank == 0:
        median = sorted(seconds[1:])[2]  # the first one sets up connections
        bus = 2 * (ranks - 1) / ranks * size / median  # as nccl-tests define it
        write_json(arguments.folder / "all_reduce.json", {"bytes": size, "backend": backend, "gb_per_s": bus / 1e9})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    child_main(_rank)
