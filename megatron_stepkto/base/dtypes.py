"""``dtype: auto``: the number format in which a model computes on this machine, chosen before it is loaded.

In a run it is the format that training computes in: the sampler is then the model that trains, and M0, whose folder
may have another format than those that the run writes, is measured like the others. Elsewhere the engine chooses on a
GPU, and on a CPU it is the format of the weights. A CPU without units for the format computes in float32: it would
emulate bfloat16, at a third of float32's speed or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_stepkto.base.files import read_json
from megatron_stepkto.base.progress import say

# flags of /proc/cpuinfo (of x86 processors, then of Arm's); any one of them means native support
UNITS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Choice:
    """``dtype``: float32, bfloat16, float16, or auto where the engine chooses. ``reason``: why; empty where the recipe
    decides."""

    dtype: str
    reason: str = ""

    def announce(self, title: str) -> None:
        if self.reason:
            say(f"{title}: dtype auto is {self.dtype}: {self.reason}")


def processors() -> list[dict[str, str]]:
    """What /proc/cpuinfo says of each processor, by key; empty where there is no such file."""
    blocks = CPUINFO.read_text(errors="replace").split("\n\n") if CPUINFO.is_file() else []
    split = ([line.partition(":") for line in block.splitlines()] for block in blocks)
    return [{key.strip(): value.strip() for key, _, value in lines} for lines in split]


def cpu_flags() -> set[str]:
    """Features that all processors of this machine have; empty where /proc does not list them."""
    listed = (each.get("flags", each.get("Features")) for each in processors())
    found = [set(flags.split()) for flags in listed if flags is not None]
    return set.intersection(*found) if found else set()


def gpu_count() -> int:
    """GPUs that this process may use."""
    import torch  # seconds to import

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_bytes() -> int | None:
    """Memory of the smallest GPU that this process may use; None: there is none."""
    import torch

    return min((torch.cuda.get_device_properties(n).total_memory for n in range(gpu_count())), default=None)


def choose_dtype(asked: str, model: Path, *, on_cpu: bool, trained_in: str | None = None) -> Choice:
    """The dtype to load a model with.

    Args:
        asked: the recipe's value.
        model: Hugging Face folder; its config.json names the format of the weights.
        trained_in: the run's train.dtype, for a model of a run.
    """
    if asked != "auto" or (trained_in is None and not on_cpu):
        return Choice(asked)
    if trained_in is not None:
        wanted, what = trained_in, "train.dtype"
    else:
        config = read_json(model / "config.json")
        wanted = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        what = "the format of the weights"
    if wanted == "float32" or not on_cpu:
        return Choice(wanted, what)
    if UNITS.get(wanted, set()) & cpu_flags():
        return Choice(wanted, f"{what}, for which this processor has units")
    return Choice("float32", f"this processor has no units for {wanted}, {what}")
