"""oneDNN's matrix products against float64, through torch's own operators; which machines get them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_stepkto.base import dtypes
from megatron_stepkto.megatron import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def replaced() -> Iterator[None]:
    onednn.use_for_matrix_products()
    yield
    onednn.restore()


GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    truth = a.double() @ b.double()
    return ((a @ b).double() - truth).norm().item() / truth.norm().item()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (randn(300, 257), randn(257, 190)),
        (randn(300, 257), randn(190, 257).t()),
        (randn(257, 300).t(), randn(257, 190)),
        (randn(300, 514)[:, ::2], randn(257, 380)[:, 50:240]),
        (randn(300, 257)[1:], randn(1, 190).expand(257, 190)),
    ],
    ids=["plain", "forward", "weight gradient", "slices", "expanded"],
)
def test_products_are_those_of_float32(a: torch.Tensor, b: torch.Tensor, replaced: None) -> None:
    assert a.shape[0] * a.shape[1] * b.shape[1] >= onednn.SMALLEST
    found = relative_error(a, b)
    assert 0 < found < 1e-6  # float32's sums of 257 give about 3e-7, bfloat16's would give 2e-3, TF32's 3e-4


def test_the_backward_pass_goes_there_too(replaced: None) -> None:
    x, w = torch.randn(400, 96, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    g = torch.randn(400, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        (x @ w).backward(g)
    assert sum(e.count for e in seen.key_averages() if "mkldnn::_linear_pointwise" in e.key) == 3
    assert x.grad is not None and w.grad is not None
    torch.testing.assert_close(x.grad.double(), g.double() @ w.detach().double().t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(w.grad.double(), x.detach().double().t() @ g.double(), rtol=1e-5, atol=1e-4)


def test_small_and_other_products_stay_as_they_were() -> None:
    small = torch.randn(7, 5), torch.randn(5, 3)
    empty = torch.randn(0, 5), torch.randn(5, 3)
    others = [[t.to(dtype) for t in (torch.randn(200, 150), torch.randn(150, 200))] for dtype in
              (torch.bfloat16, torch.float64)]  # fmt: skip
    integers = torch.arange(12).view(3, 4), torch.arange(8).view(4, 2)
    before = [a @ b for a, b in (small, empty, *others, integers)]
    onednn.use_for_matrix_products()
    after = [a @ b for a, b in (small, empty, *others, integers)]
    onednn.restore()
    for x, y in zip(before, after, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_what_is_no_product_is_refused_in_torchs_words(replaced: None) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(300x257 and 256x190\)"):
        torch.mm(torch.randn(300, 257), torch.randn(256, 190))
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(torch.randn(2, 300, 257), torch.randn(257, 190))
    with pytest.raises(RuntimeError, match="expected m1 and m2 to have the same dtype"):
        torch.mm(torch.randn(300, 257), torch.randn(257, 190).double())


def test_restored() -> None:
    onednn.use_for_matrix_products()
    inherited = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert "LRU_CACHE_CAPACITY=4" in inherited
    onednn.restore()
    assert "CACHE_CAPACITY" not in subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        _ = torch.randn(300, 257) @ torch.randn(257, 190)
    assert not [e for e in seen.key_averages() if "_linear_pointwise" in e.key]


def test_which_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(dtypes, "CPUINFO", cpuinfo)
    assert onednn.processor() == ("", 0)
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n\nprocessor\t: 1\n")
    assert onednn.processor() == ("GenuineIntel", 6)
    cpuinfo.write_text("processor\t: 0\nCPU architecture: 8\n")
    assert onednn.processor() == ("", 0)
    for kind, capability, wanted in (
        (("AuthenticAMD", 26), "AVX512", True), (("AuthenticAMD", 25), "AVX512", False),
        (("GenuineIntel", 6), "AVX512", False), (("AuthenticAMD", 26), "AVX2", False),
    ):  # fmt: skip
        monkeypatch.setattr(onednn, "processor", lambda kind=kind: kind)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert onednn.is_faster() is wanted


def test_many_shapes_take_no_memory_and_give_the_same_bits_again() -> None:
    """300 shapes: with oneDNN's own cache size they would keep some 300 MB. In a process that has not used it."""
    program = """
import resource, torch
from megatron_stepkto.megatron import onednn
torch.set_num_threads(1)
onednn.use_for_matrix_products()
a, b = torch.randn(1000, 256), torch.randn(256, 1536)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for rows in range(700, 720): a[:rows] @ b
first = a @ b
before = peak()
for rows in range(600, 900): a[:rows] @ b
print((peak() - before) // 1024)
assert torch.equal(a @ b, first)  # its code was generated again
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 60, done.stdout
