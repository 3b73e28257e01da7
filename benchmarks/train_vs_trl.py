"""This trainer beside TRL's KTOTrainer: same rows, model, batches and updates, float32, one CPU core each.

    make benchmark-trl                  (installs TRL beside the environment, see requirements/bench.txt)

Every side runs alone in a process of its own, in turn, ``--repeats`` times. An update's seconds are the median over
the repeats; tables and ratios are sums of these medians. ``--clock processor`` takes processor seconds: for a machine
that does other work at the same time.

What is the same: rows in file order, eight per update, every KL pair computed, completions rotated by one inside the
batch, AdamW (0.9, 0.999) at 1e-5 without decay, gradients clipped at 1, beta 0.1. The first losses and gradient norms
are compared before anything is reported. What differs: TRL pads a batch to its longest row, scores prompt positions
too (and drops them later), and by default keeps a second model whose forward runs in each update.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.workload import BATCH, made_rows, read_rows, run_side, test_rows, write_model, write_rows

# Losses of the same update, ours and theirs: after the first, tiny gradients give AdamW steps of either sign.
TOLERANCE = {"losses": 2e-5, "grad_norms": 2e-3}
COMPARED = 8


def check_same_maths(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences of the first updates.

    Raises:
        SystemExit: they are not the same computation.
    """
    found = {}
    for name, tolerance in TOLERANCE.items():
        pairs = list(zip(ours[name], theirs[name], strict=True))[:COMPARED]
        found[name] = max(abs(a - b) / abs(b) for a, b in pairs)
        if found[name] > tolerance:
            raise SystemExit(f"{name} of the first {COMPARED} updates differ by {found[name]:.1e}: not the same work")
    # TRL logs the reference point after clamping.
    found["kl"] = max(abs(max(a, 0) - b) for a, b in list(zip(ours["kl"], theirs["kl"], strict=True))[:COMPARED])
    return found


class Timings:
    """Results of all repeats of one side."""

    def __init__(self, results: list[dict[str, Any]], clock: str) -> None:
        self.results, self.suffix = results, "_cpu_s" if clock == "processor" else "_s"

    def total(self, name: str) -> float:
        """Seconds: the sum over updates of the median over repeats."""
        values = [result[name + self.suffix] for result in self.results]
        if isinstance(values[0], list):
            return sum(statistics.median(same) for same in zip(*values, strict=True))
        return statistics.median(values)

    @property
    def peak_mb(self) -> float:
        return max(result["peak_mb"] for result in self.results)


def compare_kl(share: dict[str, Any], full: dict[str, Any]) -> dict[str, float]:
    """The estimate of an update's mean log-ratio from a share of its pairs, beside that from all of them (nats)."""
    pairs = [(a, b) for a, b in zip(share["kl"], full["kl"], strict=True) if a is not None]
    return {
        "updates_without_a_pair": len(full["kl"]) - len(pairs),
        "mean_of_all_pairs": statistics.fmean(b for _, b in pairs),
        "mean_difference": statistics.fmean(a - b for a, b in pairs),
        "rms_difference": math.sqrt(statistics.fmean((a - b) ** 2 for a, b in pairs)),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(share["losses"], full["losses"], strict=True)),
    }


def report(timings: dict[str, Timings], tokens: int, clock: str) -> dict[str, Any]:
    print(f"\n{clock} seconds       updates   tokens/s   reference   peak MB")
    for name, side in timings.items():
        seconds = side.total("update")
        print(
            f"{name:20s} {seconds:9.2f} {tokens / seconds:10,.0f} {side.total('reference'):11.2f} {side.peak_mb:9.0f}"
        )
    updates = {name: side.total("update") for name, side in timings.items()}
    ours = updates["ours, KTO"]
    step = timings["ours, Step-KTO"]
    kl_forward = step.total("kl_forward")
    return {
        "ratio_default": updates["TRL, default"] / ours,
        "ratio_precomputed": updates["TRL, precomputed"] / ours,
        "ratio_end_to_end": updates["TRL, default"] / (ours + timings["ours, KTO"].total("reference")),
        "over_supervised": (updates["ours, Step-KTO"] - kl_forward) / updates["ours, supervised"],
        "kl_forward_share": kl_forward / updates["ours, Step-KTO"],
        "quarter_of_kl_pairs_saves": 1 - updates["ours, KTO, 1/4 KL"] / ours,
        "peak_memory_ratio": timings["ours, KTO"].peak_mb / timings["TRL, default"].peak_mb,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="folder that holds TRL and accelerate")
    parser.add_argument("--rows", type=int, default=512, help="multiple of 8")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--output", type=Path, help="write every side's raw results here, as JSON")
    arguments = parser.parse_args()
    path = test_rows()
    rows = (read_rows(path) if path else made_rows(arguments.rows))[: arguments.rows]
    tokens = sum(map(len, rows))
    width = sum(BATCH * max(map(len, rows[i : i + BATCH])) for i in range(0, len(rows), BATCH))
    print(f"{len(rows)} rows {'of the test data' if path else 'made here'}, {tokens} tokens; padded: {width} positions")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        common = ["--rows", str(write_rows(work / "rows.jsonl", rows)), "--model", str(write_model(work / "model"))]

        def ours(method: str, *more: str) -> dict[str, Any]:
            options = [*common, "--work", str(work / "run"), "--method", method, *more]
            return run_side("benchmarks.our_side", options, work / "log", distributed=True)

        def theirs(*more: str) -> dict[str, Any]:
            return run_side(
                "benchmarks.trl_side", [*common, *more], work / "log", distributed=False, extra_path=arguments.trl
            )

        sides = {
            "TRL, default": lambda: theirs(),
            "ours, KTO": lambda: ours("kto"),
            "TRL, precomputed": lambda: theirs("--precompute"),
            "ours, Step-KTO": lambda: ours("step_kto"),
            "ours, supervised": lambda: ours("rft"),
            "ours, KTO, 1/4 KL": lambda: ours("kto", "--kl-share", "0.25"),
        }
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for repeat in range(arguments.repeats):
            for name, run in sides.items():
                results[name].append(run())
                last = results[name][-1]
                print(
                    f"run {repeat + 1} of {arguments.repeats}: {name}: updates {sum(last['update_s']):.1f} s "
                    f"(processor {sum(last['update_cpu_s']):.1f} s), reference {last['reference_s']:.1f} s",
                    flush=True,
                )
    if arguments.output:
        arguments.output.write_text(json.dumps(results))
    differences = check_same_maths(results["ours, KTO"][0], results["TRL, default"][0])
    print(f"first {COMPARED} updates, largest differences:", {k: f"{v:.1e}" for k, v in differences.items()})
    print("1/4 of the KL pairs:", compare_kl(results["ours, KTO, 1/4 KL"][0], results["ours, KTO"][0]))
    timings = {name: Timings(found, arguments.clock) for name, found in results.items()}
    summary = report(timings, tokens, arguments.clock)
    summary |= {
        "rows": len(rows),
        "repeats": arguments.repeats,
        "clock": arguments.clock,
        "trl": results["TRL, default"][0]["trl"],
        "padding_share": results["ours, KTO"][0]["padding_share"],
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in summary.items()}))


if __name__ == "__main__":
    main()
