"""Speed of conversion as a share of ``cp``: the same bytes, on the same disk, both flushed, in one run.

    python benchmarks/convert_vs_cp.py [--layers 32] [--workers 2] [--runs 3] [--folder /tmp]

Makes a Llama of random bfloat16 numbers (32 layers: 4.2 GB), then alternates ``cp -r`` and conversion, in both
directions; the sources are in the page cache for both. Imports are apart; checksums, the check for NaN and Inf and
all of the flushing are not. The last line is JSON: medians and their ratios (1 is as fast as cp).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from tests.big_model import write_big_llama


def flush(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    flush(target)


def timed(work: Callable[[], object], target: Path) -> float:
    os.sync()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    if target.exists():
        shutil.rmtree(target)
    os.sync()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        base = Path(name)
        hf, megatron, out = base / "hf", base / "megatron", base / "out"
        num_bytes, _ = write_big_llama(hf, arguments.layers)
        flush(hf)
        hf_to_megatron(hf, megatron, workers=arguments.workers)
        jobs: dict[str, Callable[[], object]] = {
            "cp_hf": lambda: copy(hf, out),
            "hf_to_megatron": lambda: hf_to_megatron(hf, out, workers=arguments.workers),
            "cp_megatron": lambda: copy(megatron, out),
            "megatron_to_hf": lambda: megatron_to_hf(megatron, out, workers=arguments.workers),
        }
        seconds: dict[str, list[float]] = {job: [] for job in jobs}
        for run in range(arguments.runs):
            for job, work in jobs.items():
                seconds[job].append(timed(work, out))
                print(f"run {run + 1}: {job}: {seconds[job][-1]:.2f} s", flush=True)
    medians = {job: statistics.median(found) for job, found in seconds.items()}
    print(
        json.dumps(
            {
                "bytes": num_bytes,
                "workers": arguments.workers,
                "cores": len(os.sched_getaffinity(0)),
                "runs": arguments.runs,
                "seconds": {job: [round(s, 3) for s in found] for job, found in seconds.items()},
                "gb_per_s": {job: round(num_bytes / median / 1e9, 3) for job, median in medians.items()},
                "hf_to_megatron_over_cp": round(medians["cp_hf"] / medians["hf_to_megatron"], 3),
                "megatron_to_hf_over_cp": round(medians["cp_megatron"] / medians["megatron_to_hf"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
