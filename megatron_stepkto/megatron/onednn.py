"""CPU only, for the speed of `make demo` on AMD's Zen 5: float32 matrix products by oneDNN instead of MKL.

torch multiplies float32 matrices with MKL, which takes AVX-512 on Intel's processors only: on a Zen 5 core it reached
105 GFLOP/s where oneDNN, which torch carries too, reached 170 to 245 on the shapes of a training update. Both compute
in full float32; their sums run in another order.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from megatron_stepkto.base.dtypes import processors

ZEN_5 = 26
# Products with fewer multiplications than this are faster in MKL, given two Python calls and oneDNN's look-up.
SMALLEST = 1 << 21

# oneDNN caches generated code per shape, and packed micro-batches keep producing new shapes: 1,024 entries grew to a
# gigabyte; 4 take almost nothing, and 5% more time. oneDNN's own cache, and torch's cache in front of it.
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4", "LRU_CACHE_CAPACITY": "4"}

_library: torch.library.Library | None = None
_set: list[str] = []  # which of CACHES this module set


def processor() -> tuple[str, int]:
    """Vendor and family of the first processor (``AuthenticAMD``, 26); empty and 0 where unknown."""
    found = next(iter(processors()), {})
    family = found.get("cpu family", "")
    return found.get("vendor_id", ""), int(family) if family.isdigit() else 0


def is_faster() -> bool:
    """Whether this is the processor family where it was measured, or a later one. Not decided by timing, so that a
    resumed run computes like the interrupted one. (Zen 4 halves 512-bit operations.)"""
    maker, family = processor()
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and maker == "AuthenticAMD"
        and family >= ZEN_5
    )


def use_for_matrix_products() -> None:
    """Replace the CPU kernel of ``aten::mm`` in this process: forward and backward passes both end there.

    Call it before the process first uses oneDNN, which then reads the sizes of its caches.
    """
    global _library
    if _library is not None:
        return
    for name in CACHES.keys() - os.environ.keys():
        os.environ[name] = CACHES[name]
        _set.append(name)
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch warns that a kernel is replaced
        warnings.simplefilter("ignore", UserWarning)
        _library.impl("mm", _mm, "CPU", allow_override=True)


def matrix_products() -> str:
    """What multiplies float32 matrices in this process, for the log."""
    return "oneDNN" if _library is not None else "torch's BLAS"


def restore() -> None:
    """Restore torch's own kernel, and unset the variables that child processes would inherit."""
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
    # mm.out is another operator, which still has torch's kernel; it raises for invalid shapes.
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]) if matrices else a.new_empty(0))
