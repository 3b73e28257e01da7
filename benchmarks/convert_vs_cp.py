"""Speed of conversion as a share of ``cp``: the same bytes, on the same disk, both flushed, in one run.

    python benchmarks/convert_vs_cp.py [--layers 32] [--workers 2] [--runs 5] [--folder /tmp]

Makes a Llama of random bfloat16 numbers (32 layers: 4.2 GB), then alternates ``cp -r`` and conversion, in both
directions; the sources are in the page cache for both. Imports are apart; checksums, the check for NaN and Inf and
all of the flushing are not. Disks drift: each conversion is set against the cp just before it, and the medians of
these ratios are the result (1 is as fast as cp). A first round is not counted. The last line is JSON.
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
    parser.add_argument("--runs", type=int, default=5)
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
        for run in range(arguments.runs + 1):
            for job, work in jobs.items():
                took = timed(work, out)
                print(f"run {run or '(not counted)'}: {job}: {took:.2f} s", flush=True)
                if run:
                    seconds[job].append(took)
    medians = {job: statistics.median(found) for job, found in seconds.items()}

    def over_cp(copy: str, conversion: str) -> list[float]:
        return [round(a / b, 3) for a, b in zip(seconds[copy], seconds[conversion], strict=True)]

    ratios = {
        "hf_to_megatron": over_cp("cp_hf", "hf_to_megatron"),
        "megatron_to_hf": over_cp("cp_megatron", "megatron_to_hf"),
    }
    print(
        json.dumps(
            {
                "bytes": num_bytes,
                "workers": arguments.workers,
                "cores": len(os.sched_getaffinity(0)),
                "runs": arguments.runs,
                "seconds": {job: [round(s, 3) for s in found] for job, found in seconds.items()},
                "gb_per_s": {job: round(num_bytes / median / 1e9, 3) for job, median in medians.items()},
                "ratios": ratios,
                "hf_to_megatron_over_cp": statistics.median(ratios["hf_to_megatron"]),
                "megatron_to_hf_over_cp": statistics.median(ratios["megatron_to_hf"]),
            }
        )
    )


if __name__ == "__main__":
    main()
