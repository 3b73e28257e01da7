"""Peak memory of a conversion at several sizes of model: anonymous memory of the process, pages of files apart.

    python benchmarks/convert_memory.py [--folder /tmp]

Each conversion runs in a process of its own with 2 workers, which samples RssAnon every 5 ms, and once after the
imports. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.big_model import write_big_llama

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import json, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from megatron_stepkto.checkpoints import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak = imported = anonymous()
def sample():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)
threading.Thread(target=sample, daemon=True).start()
getattr(convert, sys.argv[2])(Path(sys.argv[3]), Path(sys.argv[4]), workers=2)
print(json.dumps([imported, max(peak, anonymous())]))
"""
SIZES = {
    "1.2 GB, largest tensor 0.13 GB": {"layers": 8},
    "4.2 GB, largest tensor 0.13 GB": {"layers": 32},
    "4.1 GB, largest tensor 1.05 GB": {"layers": 16, "vocabulary": 256000},
}


def peak(direction: str, source: Path, target: Path) -> tuple[int, int]:
    command = [sys.executable, "-c", CHILD, str(ROOT), direction, str(source), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    imported, most = json.loads(done.stdout.splitlines()[-1])
    return imported, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    found = []
    arguments = parser.parse_args()
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            base = Path(folder)
            total, largest = write_big_llama(base / "hf", **sizes)
            row: dict[str, object] = {"model": name, "bytes": total, "largest_tensor": largest}
            for direction, source, target in (
                ("hf_to_megatron", "hf", "megatron"),
                ("megatron_to_hf", "megatron", "back"),
            ):
                imported, most = peak(direction, base / source, base / target)
                row[direction] = {"after_imports_mb": round(imported / 1e6), "peak_mb": round(most / 1e6)}
                print(f"{name}: {direction}: {imported / 1e6:.0f} MB after imports, {most / 1e6:.0f} MB at most")
            found.append(row)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
