"""float32 matrix products on AMD processors with AVX-512, by oneDNN instead of MKL.

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

# Multiplications of a product below which two Python calls and oneDNN's look-up cost more than MKL's product.
SMALLEST = 1 << 21

# oneDNN keeps the code it makes for each shape, and packed micro-batches have ever new ones: its 1,024 entries grew to
# a gigabyte, where 4 took nothing to speak of and 5% more time. Its own cache, and the one of torch before it.
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4", "LRU_CACHE_CAPACITY": "4"}

_library: torch.library.Library | None = None


def processor_maker(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the processor names it (``GenuineIntel``, ``AuthenticAMD``); empty where the system does not say."""
    if not cpuinfo.is_file():
        return ""
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")


def is_faster() -> bool:
    """Whether this machine is of the kind where it was measured: decided by its kind, not by a stopwatch, so that a
    resumed run computes as the interrupted one did."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and processor_maker() == "AuthenticAMD"
    )


def use_for_matrix_products() -> None:
    """Replace the CPU kernel of ``aten::mm`` in this process: forward and backward passes both end there.

    To be called before the process first uses oneDNN, which reads the size of its caches then.
    """
    global _library
    if _library is not None:
        return
    for name, entries in CACHES.items():
        os.environ.setdefault(name, entries)
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that a kernel is replaced is what is wanted
        warnings.simplefilter("ignore", UserWarning)
        _library.impl("mm", _mm, "CPU", allow_override=True)


def matrix_products() -> str:
    """What multiplies float32 matrices in this process, for the log."""
    return "oneDNN" if _library is not None else "torch's BLAS"


def restore() -> None:
    """torch's own kernel again."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype is torch.float32 and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST and b.dtype is torch.float32:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
        return product
    # another operator of torch's dispatcher, with the kernel that is replaced here
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
