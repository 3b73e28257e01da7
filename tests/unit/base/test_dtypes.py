"""``dtype: auto``: by the weights and the processor's flags; and one job keeps one dtype, wherever it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_stepkto.base import dtypes
from megatron_stepkto.base.dtypes import choose_dtype, cpu_flags
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling import draw

# shortened from /proc/cpuinfo of such machines
PROCESSORS = {
    "EPYC 7763, AVX2": "processor\t: 0\nflags\t\t: fpu f16c avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx2 fma\n",
    "Xeon Skylake, AVX-512": "flags\t\t: avx2 avx512f avx512bw avx512_vnni\n",
    "EPYC 9B45, Zen 5": "flags\t\t: avx2 avx512f avx512_bf16 avx512_vnni\n",
    "Xeon Sapphire Rapids": "flags\t\t: avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8\n",
    "Graviton 2": "Features\t: fp asimd fphp asimdhp asimddp\n",
    "Graviton 3": "Features\t: fp asimd fphp asimdhp i8mm bf16\n",
    "two kinds": "flags\t\t: avx2 avx512_bf16\n\nflags\t\t: avx2\n",
    "says nothing": "processor\t: 0\n",
}


def model(folder: Path, **config: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def on_processor(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "cpuinfo"
    path.write_text(PROCESSORS[name])
    monkeypatch.setattr(dtypes, "CPUINFO", path)


@pytest.mark.parametrize(
    ("processor", "of_bfloat16", "of_float16"),
    [
        ("EPYC 7763, AVX2", "float32", "float32"),
        ("Xeon Skylake, AVX-512", "float32", "float32"),
        ("EPYC 9B45, Zen 5", "bfloat16", "float32"),
        ("Xeon Sapphire Rapids", "bfloat16", "float16"),
        ("Graviton 2", "float32", "float16"),
        ("Graviton 3", "bfloat16", "float16"),
        ("two kinds", "float32", "float32"),
        ("says nothing", "float32", "float32"),
    ],
)
def test_auto_by_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: str, of_bfloat16: str, of_float16: str
) -> None:
    on_processor(processor, tmp_path, monkeypatch)
    bfloat16, float16 = model(tmp_path / "b", dtype="bfloat16"), model(tmp_path / "h", torch_dtype="float16")
    assert choose_dtype("auto", bfloat16, on_cpu=True).dtype == of_bfloat16
    assert choose_dtype("auto", float16, on_cpu=True).dtype == of_float16
    # vLLM's own auto would halve float32 weights
    assert choose_dtype("auto", model(tmp_path / "f", dtype="float32"), on_cpu=True).dtype == "float32"
    assert choose_dtype("auto", model(tmp_path / "n"), on_cpu=True).dtype == "float32"
    assert choose_dtype("bfloat16", bfloat16, on_cpu=True).dtype == "bfloat16"  # as asked, however slow
    assert choose_dtype("auto", bfloat16, on_cpu=False).dtype == "auto"
    # all models of a run alike, whatever their folders hold
    for folder in (bfloat16, float16, tmp_path / "f"):
        for on_cpu in (True, False):
            assert choose_dtype("auto", folder, on_cpu=on_cpu, trained_in="float32").dtype == "float32"
        assert choose_dtype("auto", folder, on_cpu=True, trained_in="bfloat16").dtype == of_bfloat16
        assert choose_dtype("auto", folder, on_cpu=False, trained_in="bfloat16").dtype == "bfloat16"
    assert choose_dtype("float16", bfloat16, on_cpu=True, trained_in="float32").dtype == "float16"


def test_a_machine_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "CPUINFO", tmp_path / "none")
    assert cpu_flags() == set()


def test_a_job_goes_on_in_its_dtype_on_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model(tmp_path / "model", dtype="bfloat16")
    build_tokenizer(folder)
    monkeypatch.setattr(draw, "gpu_count", lambda: 0)
    settings = Sampling(backend="transformers", max_tokens=4)

    def dtype(directory: str, settings: Sampling = settings) -> str:
        fixed = draw.FixedDtype.of(settings, folder, tmp_path / directory)
        before = list(tmp_path.rglob("dtype.json"))
        chosen = draw.FixedDtype.of(settings, folder, tmp_path / directory).choice.dtype
        assert list(tmp_path.rglob("dtype.json")) == before, "a look writes nothing"
        fixed.keep("sample")
        return chosen

    on_processor("EPYC 7763, AVX2", tmp_path, monkeypatch)
    assert dtype("begun") == "float32"
    said = "sample: dtype auto is float32: this processor has no units for bfloat16, the format of the weights\n"
    assert capsys.readouterr().err == said
    on_processor("EPYC 9B45, Zen 5", tmp_path, monkeypatch)
    assert dtype("begun") == "float32"  # what is drawn is in float32
    assert dtype("new") == "bfloat16"
    assert dtype("begun", settings.model_copy(update={"dtype": "float16"})) == "float16"
