"""The knobs that the paper leaves open, and label noise, on the miniature: one knob changed at a time, several seeds.

python -m benchmarks.study run [--recipe recipes/mini_cpu.yaml] [--seeds 0,1,2] [--only NAME,...] [--output runs/study]
                               [--record FILE.csv]
python -m benchmarks.study table [--against base] [--record FILE.csv]

Every run has the same sample budget, which is smaller than the demo's: 160 problems an iteration. ``run`` goes on where
it was stopped. Variants of one seed share M0, its evaluation and the first samples with that seed's base run.
The record has a line for each finished run, so that a study may be spread over days and machines. ``table`` prints
means over its seeds, and draws ``FILE.svg``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_stepkto.base.files import atomic_writer
from megatron_stepkto.base.locks import exclusive_lock

SUMMARY = "summary.json"
BUDGET = ("problems.per_iteration=160", "evaluate.num_problems=1000", "evaluate.k=1", "sample.workers=1")
LOSS = "train.loss."
VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "kto": ("train.method=kto",),
    **{f"flip {share}%": (f"dataset.flip_step_labels={share / 100}",) for share in (10, 20, 30, 40, 50)},
    "steps summed": (f"{LOSS}step_reduction=sum",),
    "beta_step 0.5": (f"{LOSS}beta_step=0.5",),
    "beta_step 8": (f"{LOSS}beta_step=8",),
    "undesirable 0.25": (f"{LOSS}undesirable_weight_outcome=0.25", f"{LOSS}undesirable_weight_step=0.25"),
    "undesirable 1": (f"{LOSS}undesirable_weight_outcome=1", f"{LOSS}undesirable_weight_step=1"),
    "z: batch": (f"{LOSS}reference_point=batch",),
    "z: none": (f"{LOSS}reference_point=none", "dataset.kl_pair_share=0"),
    "reference: initial": ("train.reference=initial",),
    "drop after error": ("judge.after_first_error=drop",),
}
SHARED = ("evaluate/problems", "evaluate/M0", "iteration_1/problems", "iteration_1/sample")
FIGURES = {
    "pass_at_1": "pass@1",
    "cot_pass_at_1": "CoT-pass@1",
    "wrong_step_share_of_correct": "right answers with a wrong step",
}
DRAWN = ("pass_at_1", "wrong_step_share_of_correct")
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5% quantile of Student's t by degrees of freedom


def folder_of(output: Path, variant: str, seed: int) -> Path:
    return output / f"{variant.replace('%', '').replace(': ', '_').replace(' ', '_')}-{seed}"


def run(recipe: Path, seeds: list[int], names: list[str], output: Path, record: Path) -> None:
    """Run what the record lacks; the base run of a seed also where its folder, which the others share, is not here."""
    for seed in seeds:
        base, recorded = folder_of(output, "base", seed), results(record)
        missing = [name for name in names if seed not in recorded.get(name, {})]
        if missing and not (base / SUMMARY).is_file():
            missing = ["base", *(name for name in missing if name != "base")]
        for name in missing:
            folder = folder_of(output, name, seed)
            if name != "base" and not folder.exists():
                judges_otherwise = any(key.startswith("judge.") for key in VARIANTS[name])
                for part in SHARED:
                    if not (judges_otherwise and part == "evaluate/M0"):
                        shutil.copytree(base / part, folder / part)
            print(f"{name}, seed {seed}", flush=True)
            sets = (*BUDGET, *VARIANTS[name], f"seed={seed}", f"name={folder.name}", f"output={output.resolve()}")
            stepkto = [sys.executable, "-m", "megatron_stepkto"]
            if code := subprocess.call([*stepkto, "run", str(recipe), *(f"--set={key}" for key in sets)]):
                sys.exit(code)
            rows = json.loads((folder / SUMMARY).read_text())["iterations"]
            of_base = {"M0": rows[0]} if name == "base" else {}  # a variant that judges otherwise has its own
            write_down(record, seed, {**of_base, name: rows[-1]})


def write_down(record: Path, seed: int, rows: dict[str, dict[str, float]]) -> None:
    """Add what one run measured; another process may run another seed."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(record.with_name(f".{record.name}.lock"), str(record), wait=True):
        found = results(record)
        for name, row in rows.items():
            found.setdefault(name, {})[seed] = {key: 100 * row[key] for key in FIGURES}
        with atomic_writer(record) as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["variant", "seed", *FIGURES])
            for name in ("M0", *VARIANTS):
                for number, row in sorted(found.get(name, {}).items()):
                    lines.writerow([name, number, *(f"{row[key]:.4f}" for key in FIGURES)])


def results(record: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Percent, by variant and seed: the last model of each finished run; "M0" is the one that all start from."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    if record.is_file():
        with record.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["variant"], {})[int(row["seed"])] = {key: float(row[key]) for key in FIGURES}
    return found


def difference(rows: dict[int, dict[str, float]], base: dict[int, dict[str, float]], key: str) -> str:
    """Mean over seeds of variant minus base, in points, with its 95% interval (Student's t over paired seeds)."""
    gains = [row[key] - base[seed][key] for seed, row in rows.items() if seed in base]
    if len(gains) < 2:
        return f"{statistics.mean(gains):+.1f}" if gains else ""
    half = T_95[len(gains) - 1] * statistics.stdev(gains) / math.sqrt(len(gains))
    return f"{statistics.mean(gains):+.1f} ± {half:.1f}"


def table(record: Path, against: str) -> str:
    """Markdown: means over seeds, and each variant's difference to the variant ``against``."""
    found = results(record)
    base = found.get(against, {})
    lines = [
        "| | seeds | " + " | ".join(f"{title} | Δ" for title in FIGURES.values()) + " |",
        "| --- " * (2 + 2 * len(FIGURES)) + "|",
    ]
    for name, rows in found.items():
        cells = []
        for key in FIGURES:
            cells.append(f"{statistics.mean(row[key] for row in rows.values()):.1f}")
            cells.append("" if name in ("M0", against) else difference(rows, base, key))
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawing(record: Path) -> str:
    """SVG: a panel for each of two figures, a line for each variant, a dot for each seed, a bar at the mean."""
    found = {name: rows for name, rows in results(record).items() if name != "M0"}
    width, left, line = 320, 150, 22
    height = 60 + line * len(found)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 2 * (width + 40)} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for panel, key in enumerate(DRAWN):
        values = [row[key] for rows in found.values() for row in rows.values()]
        low = math.floor(min(values) / 5) * 5
        high = max(math.ceil(max(values) / 5) * 5, low + 5)
        begin = left + panel * (width + 40)

        def x(value: float, begin: int = begin, low: int = low, high: int = high) -> float:
            return begin + (value - low) / (high - low) * width

        parts.append(f'<text x="{begin}" y="16" font-weight="bold">{FIGURES[key]}, %</text>')
        step = 5 if high - low <= 40 else 10
        for tick in range(low, high + 1, step):
            parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="36" y2="{height - 8}" stroke="#ddd"/>')
            parts.append(f'<text x="{x(tick):.1f}" y="31" text-anchor="middle" fill="#666">{tick}</text>')
        for number, (name, rows) in enumerate(found.items()):
            y = 52 + number * line
            if panel == 0:
                parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{name}</text>')
            mean = x(statistics.mean(row[key] for row in rows.values()))
            parts.append(
                f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 8}" y2="{y + 8}" stroke="#1f4e9c" stroke-width="3"/>'
            )
            for row in rows.values():
                parts.append(f'<circle cx="{x(row[key]):.1f}" cy="{y}" r="3.5" fill="#1f4e9c" fill-opacity="0.45"/>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/mini_cpu.yaml"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS), metavar="NAME,...")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--record", type=Path, default=Path("runs/study/study.csv"))
    parser.add_argument("--against", default="base", choices=VARIANTS, help="what the table's differences are to")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if arguments.command == "run":
        names = ["base", *(name for name in arguments.only.split(",") if name != "base")]
        run(arguments.recipe, seeds, names, arguments.output, arguments.record)
    else:
        print(table(arguments.record, arguments.against))
        arguments.record.with_suffix(".svg").write_text(drawing(arguments.record))


if __name__ == "__main__":
    main()
