"""float32 matrix products on AMD's Zen 5, by oneDNN instead of MKL.

torch multiplies float32 matrices with MKL, which takes AVX-512 on Intel's processors only: on a Zen 5 core it reached
105 GFLOP/s where oneDNN, which torch carries too, reached 170 to 245 on the shapes of a training update. Both compute
in full float32; their sums run in another order.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

ZEN_5 = 26
# Multiplications of a product below which two Python calls and oneDNN's look-up cost more than MKL's product.
SMALLEST = 1 << 21

# oneDNN keeps the code it makes for each shape, and packed micro-batches have ever new ones: its 1,024 entries grew to
# a gigabyte, where 4 took nothing to speak of and 5% more time. Its own cache, and the one of torch before it.
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4", "LRU_CACHE_CAPACITY": "4"}

_library: torch.library.Library | None = None
_set: list[str] = []  # which of CACHES this module set


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, int]:
    """Maker and family as the first processor names them (``AuthenticAMD``, 26); empty and 0 where nothing says so."""
    if not cpuinfo.is_file():
        return "", 0
    lines = (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    family = found.get("cpu family", "")
    return found.get("vendor_id", ""), int(family) if family.isdigit() else 0


def is_faster() -> bool:
    """Whether this machine is of the kind where it was measured, or a later one: decided by its kind, not by a
    stopwatch, so that a resumed run computes as the interrupted one did. (Zen 4 halves 512-bit operations.)"""
    maker, family = processor()
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and maker == "AuthenticAMD"
        and family >= ZEN_5
    )


def use_for_matrix_products() -> None:
    """Replace the CPU kernel of ``aten::mm`` in this process: forward and backward passes both end there.

    To be called before the process first uses oneDNN, which reads the size of its caches then.
    """
    global _library
    if _library is not None:
        return
    for name in CACHES.keys() - os.environ.keys():
        os.environ[name] = CACHES[name]
        _set.append(name)
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that a kernel is replaced is what is wanted
        warnings.simplefilter("ignore", UserWarning)
        _library.impl("mm", _mm, "CPU", allow_override=True)


def matrix_products() -> str:
    """What multiplies float32 matrices in this process, for the log."""
    return "oneDNN" if _library is not None else "torch's BLAS"


def restore() -> None:
    """torch's own kernel again, and nothing for child processes to inherit."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
    while _set:
        os.environ.pop(_set.pop(), None)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    matrices = a.dim() == b.dim() == 2
    fits = matrices and a.shape[1] == b.shape[0] and a.dtype == b.dtype == torch.float32
    if fits and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
        return product
    # Another operator of torch's dispatcher, with the kernel that is replaced here; it refuses what is no product.
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]) if matrices else a.new_empty(0))
