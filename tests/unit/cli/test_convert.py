"""``stepkto convert IN OUT`` and the two tools: directions, what is there already, verification, dry run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_stepkto.checkpoints import convert
from megatron_stepkto.checkpoints.manifest import damaged_files, read_manifest
from megatron_stepkto.checkpoints.stream import Files
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.checkpoints.verify import verify
from megatron_stepkto.cli.main import main
from tests.unit.checkpoint_folders import DATA_FILE, GATE, assert_same_bits, change_config, change_weights, copy


def stepkto(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_direction_is_that_of_the_folder(models: dict[str, Path], tmp_path: Path) -> None:
    assert stepkto("convert", models["untied"], tmp_path / "megatron", "--verify") == 0
    assert stepkto("convert", tmp_path / "megatron", tmp_path / "back", "--verify", "--workers", 3) == 0
    assert_same_bits(
        load_file(tmp_path / "back" / "model.safetensors"), load_file(models["untied"] / "model.safetensors")
    )


@pytest.mark.parametrize("place", ["iter_0000010", "."])
def test_a_trainers_folder(
    models: dict[str, Path], tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron-LM's: the tracker names the iteration. The companions are there, or beside the tracker."""
    trained = tmp_path / "trained"
    iteration = copy(models["megatron"], trained / "iter_0000010")
    (trained / "latest_checkpointed_iteration.txt").write_text("10\n")
    if place == ".":
        (iteration / "conversion.json").unlink()
        (iteration / convert.COMPANIONS).rename(trained / convert.COMPANIONS)
    assert stepkto("convert", trained, tmp_path / "back", "--verify") == 0
    assert stepkto("convert", trained, tmp_path / "back") == 0
    assert_same_bits(
        load_file(tmp_path / "back" / "model.safetensors"), load_file(models["tied"] / "model.safetensors")
    )
    (iteration / DATA_FILE).write_bytes((iteration / DATA_FILE).read_bytes()[:-1000])
    cut = stepkto("convert", trained, tmp_path / "again")
    assert cut == (0 if place == "." else 2), "the manifest, if there is one, is the iteration's"
    capsys.readouterr()
    assert stepkto("convert", tmp_path, tmp_path / "none") == 2
    assert "a trainer's folder of them (with latest_checkpointed_iteration.txt)" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_tools_are_the_same_code(models: dict[str, Path], tmp_path: Path, repository: Path) -> None:
    for tool, source, target in (
        ("hf_to_megatron.py", models["bf16"], tmp_path / "megatron"),
        ("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back"),
    ):
        command = [sys.executable, str(repository / "tools" / tool), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=repository)
        assert done.returncode == 0, done.stderr
        assert "39 tensors, all finite" in done.stderr
        again = subprocess.run([*command, "--verify"], capture_output=True, text=True, timeout=300, cwd=repository)
        assert "hold the same model, bit by bit" in again.stderr
    wrong = [sys.executable, str(repository / "tools" / "megatron_to_hf.py"), str(models["bf16"]), str(tmp_path / "x")]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=300, cwd=repository)
    assert done.returncode == 2
    assert "expected a Megatron torch_dist checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_target_is_left_alone_and_any_other_is_refused(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = copy(models["tied"], tmp_path / "hf"), tmp_path / "megatron"
    assert stepkto("convert", source, target) == 0
    before = (target / DATA_FILE).stat().st_mtime_ns
    assert stepkto("convert", source, target) == 0
    assert "already the finished result" in capsys.readouterr().err
    assert (target / DATA_FILE).stat().st_mtime_ns == before

    change_weights(source, lambda weights: weights[GATE][3].add_(1))
    assert stepkto("convert", source, target) == 2
    assert "already there, and not the result of" in capsys.readouterr().err
    assert stepkto("convert", source, target, "--force") == 0
    assert verify(source, target) == []
    change_config(source, rms_norm_eps=1e-3)
    assert stepkto("convert", source, target) == 2
    change_config(source, rms_norm_eps=1e-6)
    (source / "tokenizer.json").write_text("{}")
    assert stepkto("convert", source, target) == 2
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert stepkto("convert", source, foreign) == 2
    assert (foreign / "thesis.txt").read_text() == "mine"


def _other_end(folder: Path) -> None:
    change_config(folder, eos_token_id=7)


def _no_generation_settings(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def _more_generation_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.1}')


def _reversed_vocabulary(folder: Path) -> None:
    """Of the same size: only the bytes tell."""
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps({**words, "vocab": dict(zip(words["vocab"], (1, 0), strict=True))}))


def _new_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("way", ["from Hugging Face", "from Megatron"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_end, "config.json differ: eos_token_id: "),
        (_no_generation_settings, "generation_config.json: has no counterpart in "),
        (_more_generation_settings, "generation_config.json differ"),
        (_reversed_vocabulary, "tokenizer.json differ"),
        (_new_template, "chat_template.jinja: has no counterpart in "),
    ],
)
def test_config_and_tokenizer_are_part_of_the_model(
    models: dict[str, Path],
    tmp_path: Path,
    way: str,
    change: Callable[[Path], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the same weights, another end token or tokenizer makes another model."""
    hf, out = change_config(copy(models["tied"], tmp_path / "hf"), eos_token_id=2, dtype="float16"), tmp_path / "out"
    (hf / "generation_config.json").write_text('{"temperature": 0.7}')
    (hf / "tokenizer.json").write_text('{"vocab": {"a": 0, "b": 1}}')
    source = hf
    if way == "from Megatron":
        source = tmp_path / "megatron"
        assert stepkto("convert", hf, source) == 0
        (source / "conversion.json").unlink()
    assert stepkto("convert", source, out) == 0
    assert stepkto("convert", source, out, "--verify") == 0
    assert stepkto("convert", source, out) == 0, "the dtype in config.json is not that of the weights"
    change(source if source == hf else source / convert.COMPANIONS)
    capsys.readouterr()
    assert stepkto("convert", source, out) == 2
    assert f"{out}: already there, and not the result of {source}" in " ".join(capsys.readouterr().err.split())
    assert stepkto("convert", source, out, "--verify") == 1
    assert said in " ".join(capsys.readouterr().err.split())
    (difference,) = verify(*((source, out) if source == hf else (out, source)))
    assert said in difference
    assert stepkto("convert", source, out, "--force", "--verify") == 0


def test_a_target_that_comes_while_the_source_is_looked_at_is_not_replaced(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands name one folder by mistake; the second looked before the first was done, and has no --force."""
    target, real = tmp_path / "megatron", convert.HFSide

    def slowly(source: Path, **options: bool) -> convert.HFSide:
        monkeypatch.setattr(convert, "HFSide", real)
        convert.hf_to_megatron(models["untied"], target)
        return real(source, **options)

    monkeypatch.setattr(convert, "HFSide", slowly)
    assert stepkto("convert", models["tied"], target) == 2
    assert f"{target}: already exists: another process has just written it" in " ".join(capsys.readouterr().err.split())
    assert verify(models["untied"], target) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".megatron.lock", "megatron"]


def test_places_that_would_lose_something(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--force removes nothing but a converted model, and never the source."""
    source = copy(models["tied"], tmp_path / "work" / "hf")
    (tmp_path / "work" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "source").symlink_to(source)
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    for target, said in (
        (source, "is inside"),
        (tmp_path / "source", "is inside"),
        (source / "megatron", "is inside"),
        (tmp_path / "work", "which would be removed"),
        (tmp_path / "notes", "--force replaces a model, and this folder holds none, but thesis.tex"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "a" / "out", f"{tmp_path / 'file'} is a file; choose another folder"),
        (tmp_path / "link", "is a link to"),
        (tmp_path / "dangling", "is a link to"),
    ):
        assert stepkto("convert", source, target, "--force") == 2
        assert said in " ".join(capsys.readouterr().err.split())
    monkeypatch.chdir(tmp_path / "work")
    for target in (".", "..", source / ".."):
        assert stepkto("convert", source, target, "--force") == 2
        assert "would be removed" in " ".join(capsys.readouterr().err.split())
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert stepkto("convert", tmp_path / "source", tmp_path / "empty", "--force") == 0
    assert stepkto("convert", tmp_path / "source", tmp_path / "empty", "--verify") == 0


@pytest.mark.parametrize(
    ("model", "others", "said"),
    [
        # a project: config.json alone is not a model
        (["config.json"], ["src/train.py", "thesis.tex"], "this folder holds none, but config.json, src, thesis.tex"),
        (["config.json"], [], "this folder holds none, but config.json"),
        (["config.json", "pytorch_model.bin"], [], "this folder holds none, but config.json, pytorch_model.bin"),
        # a model, and more
        (["config.json", "model.safetensors"], ["src/a.py", "b.tex"], "holds other things too: b.tex, src; move them"),
        (["conversion.json"], ["README.md"], "holds other things too: README.md; move them"),
        ([".metadata", "__0_0.distcp"], ["huggingface/notes.md"], "other things too: huggingface/notes.md; move them"),
        (["latest_checkpointed_iteration.txt"], ["iter_0000010/a/b", "iter_x/c"], "too: iter_0000010/a, iter_x; move"),
        (["conversion.json"], [f"{i}.tex" for i in range(7)], "too: 0.tex, 1.tex, 2.tex, 3.tex, 4.tex, ...; move"),
    ],
)
def test_force_never_removes_what_is_no_model(
    models: dict[str, Path],
    tmp_path: Path,
    model: list[str],
    others: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in (*model, *others):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    assert stepkto("convert", models["tied"], tmp_path / "out", "--force") == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in (*model, *others):
        assert (tmp_path / "out" / name).read_text() == name


@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model.v3",
         "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja"],
        ["conversion.json"],
        [".metadata", "common.pt", "metadata.json", "__0_0.distcp", "huggingface/config.json"],
        ["latest_checkpointed_iteration.txt", "iter_0000010/.metadata", "iter_0000010/__0_0.distcp",
         "release/common.pt", "huggingface/tokenizer.json"],
    ],
)  # fmt: skip
def test_force_replaces_a_model_of_either_kind(models: dict[str, Path], tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("an older model")
    assert stepkto("convert", models["tied"], tmp_path / "out", "--force") == 0
    assert verify(models["tied"], tmp_path / "out") == []
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert b"an older model" not in [path.read_bytes() for path in left]


def test_verification_names_what_differs(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy(models["tied"], tmp_path / "hf")
    name = "model.layers.2.self_attn.k_proj.weight"

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name][5, 7] += 1e-6
        weights[name][9, :2] *= 2
        weights["model.norm.weight"][0] = -0.0 if weights["model.norm.weight"][0] else 1.0

    change_weights(changed, change)
    assert verify(changed, models["megatron"]) == [
        f"{name} [32, 64]: 3 elements in 2 rows differ, first in row 5",
        "model.norm.weight [64]: 1 elements in 1 rows differ, first in row 0",
    ]
    assert stepkto("convert", changed, models["megatron"], "--verify") == 1
    assert "3 elements in 2 rows differ" in capsys.readouterr().err
    change_weights(changed, lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items()}))
    assert len(verify(changed, models["megatron"])) == 38
    other_rope = change_config(
        copy(models["tied"], tmp_path / "rope"), rope_parameters={"rope_type": "default", "rope_theta": 5.0}
    )
    (difference,) = verify(other_rope, models["megatron"])
    assert "rope" in difference


def test_verification_reads_the_manifest(models: dict[str, Path], tmp_path: Path) -> None:
    """A flipped bit outside every tensor is found by the file's checksum, and only by it."""
    megatron = copy(models["megatron"], tmp_path / "megatron")
    manifest = read_manifest(megatron)
    assert manifest is not None
    files = {str(path.relative_to(megatron)) for path in megatron.rglob("*") if path.is_file()}
    assert files == {*manifest.files, "conversion.json"}
    assert damaged_files(megatron, manifest) == []
    content = bytearray((megatron / DATA_FILE).read_bytes())
    content[-5] ^= 4
    (megatron / DATA_FILE).write_bytes(content)
    (difference,) = verify(models["tied"], megatron)
    assert difference.startswith(f"{megatron / DATA_FILE}: damaged: its CRC-32 is ")
    (megatron / "common.pt").unlink()
    assert f"{megatron / 'common.pt'}: missing" in verify(models["tied"], megatron)


@pytest.mark.parametrize("direction", ["from Hugging Face", "from Megatron"])
def test_damage_after_a_conversion_is_found_by_the_next(
    models: dict[str, Path], tmp_path: Path, direction: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest's checksum of every tensor is compared in passing, without --verify."""
    source, name = tmp_path / "source", "model.layers.3.mlp.down_proj.weight"
    if direction == "from Hugging Face":
        assert stepkto("convert", models["megatron"], source) == 0
        damaged = source / "model.safetensors"
    else:
        damaged = copy(models["megatron"], source) / DATA_FILE
    row = load_file(models["tied"] / "model.safetensors")[name][1].numpy().tobytes()
    content = damaged.read_bytes()
    assert content.count(row) == 1
    damaged.write_bytes(content.replace(row, row[:8] + b"\1" + row[9:]))
    assert stepkto("convert", source, tmp_path / "target") == 2
    said = capsys.readouterr().err
    assert f"{name}: the bytes differ from the checksums in conversion.json" in said
    assert not (tmp_path / "target").exists()
    (source / "conversion.json").unlink()
    assert stepkto("convert", source, tmp_path / "target") == 0


@pytest.mark.parametrize("name", [DATA_FILE, "common.pt", "metadata.json", "huggingface/merges.txt"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_file_that_was_lost_after_a_conversion_is_found_by_the_next(
    models: dict[str, Path], tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where every weight can be read: the cut is behind the last one, or in a file without any."""
    hf, source = copy(models["tied"], tmp_path / "hf"), tmp_path / "source"
    (hf / "merges.txt").write_text("a b\nc d\n")
    assert stepkto("convert", hf, source) == 0
    path = source / name
    content, said = path.read_bytes(), "missing"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-4])
        said = f"has {len(content) - 4} bytes, conversion.json says {len(content)}"
    capsys.readouterr()
    assert stepkto("convert", source, tmp_path / "target") == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{path}: " in printed
    assert (said in printed) or (name == DATA_FILE and "the file is missing or damaged" in printed)
    assert not (tmp_path / "target").exists()


def test_files_that_were_changed_on_purpose_are_taken_without_the_manifest(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    assert stepkto("convert", models["megatron"], source) == 0
    (source / "merges.txt").write_text("")
    change_config(source, eos_token_id=1234)
    assert stepkto("convert", source, tmp_path / "target") == 2
    assert f"{source / 'config.json'}: has " in " ".join(capsys.readouterr().err.split())
    (source / "conversion.json").unlink()
    assert stepkto("convert", source, tmp_path / "target") == 0


def test_a_manifest_is_the_same_for_the_same_input(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        copied = copy(models["tied"], tmp_path / f"source of {name}")
        assert stepkto("convert", copied, tmp_path / name, "--workers", 1 if name == "one" else 4) == 0
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_code_of_the_models_author_is_named_and_left_behind(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = change_config(copy(models["tied"], tmp_path / "hf"), auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (source / "evil.py").write_text("raise SystemExit('ran')")
    assert stepkto("convert", source, tmp_path / "megatron") == 0
    assert "auto_map names the author's own code, which is neither run nor copied" in capsys.readouterr().err
    assert stepkto("convert", tmp_path / "megatron", tmp_path / "back") == 0
    for folder in (tmp_path / "megatron" / "huggingface", tmp_path / "back"):
        assert not (folder / "evil.py").exists()
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tied}"], "OUT is missing"),
        (["recipe.yaml"], "stepkto convert recipe.yaml: moved to a command of its own: `stepkto export"),
        (["{tied}", "{new}", "--iteration", "1"], "stepkto convert --iteration: moved to a command of its own"),
        (["{new}", "{new}2"], "expected a Hugging Face folder"),
        (["{tied}", "{new}", "--workers", "0"], "expected 1 or more"),
        (["{tied}", "{new}", "--workers", "many"], "expected a whole number, got 'many'"),
        (
            ["{tied}", "{new}", "--tensor", "2", "--virtual-pipeline", "2"],
            "--tensor, --virtual-pipeline: expected with",
        ),
        (
            ["{tied}", "{new}", "--set", "a=b", "--method", "kto"],
            "stepkto convert --set: moved to a command of its own: `stepkto export",
        ),
        (["{tied}", "--dry-run", "--pipeline", "2", "--virtual-pipeline", "1"], "--virtual-pipeline: expected 2 or"),
        (["--iter=1", "recipe.yaml"], "stepkto convert --iteration: moved to a command of its own"),
    ],
)
def test_wrong_arguments(
    models: dict[str, Path],
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"tied": models["tied"], "new": tmp_path / "new"}
    assert stepkto("convert", *(argument.format(**places) for argument in arguments)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_only_a_config(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    shutil.copyfile(repository / "recipes" / "configs" / "llama3.3_70b" / "config.json", config)
    assert stepkto("convert", config, "--dry-run", "--tensor", 8, "--pipeline", 8) == 0
    said = capsys.readouterr().out
    assert "70,553,706,496 parameters, 141.11 GB in bfloat16" in said
    # an independent count of true shards (see test_planning_shards.py), in bytes of bfloat16
    assert "stage 0: layers 0 to 9: 1,201,045,504 parameters, 2,402,091,008 bytes" in said
    assert "stage 1: layers 10 to 19: 1,069,711,360 parameters, 2,139,422,720 bytes" in said
    assert (
        "    <- model.layers.{0..79}.self_attn.k_proj.weight [1024, 8192]: rows 1024 to 1151, ... in 8 runs of 128\n"
    ) in said
    assert stepkto("convert", config, "--dry-run", "--tensor", 3, "--pipeline", 7) == 2
    said = capsys.readouterr().err
    for size in ("attention heads (64)", "key-value heads (8)", "feed-forward size (28672)", "layers (80)"):
        assert f"does not divide the model's {size}; choose one of 1, 2, 4" in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_dry_run_of_a_mixture_of_experts(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = repository / "recipes" / "configs" / "mixtral_8x22b"
    assert stepkto("convert", config, "--dry-run", "--tensor", 8, "--pipeline", 4, "--expert", 8) == 0
    said = capsys.readouterr().out
    hidden, ffn, heads, groups, width, layers = 6144, 16384, 48, 8, 128, 14
    attention = (heads + 2 * groups) * width * hidden // 8 + heads * width * hidden // 8
    per_layer = attention + 3 * ffn * hidden + 8 * hidden + 2 * hidden  # one expert, the router, two norms
    assert f"stage 1: layers 14 to 27: {layers * per_layer:,} parameters, {2 * layers * per_layer:,} bytes" in said
    name = "model.layers.{0..55}.block_sparse_moe.experts.{0..7}.w3.weight [16384, 6144]: rows 16384 to 32767"
    assert f"    <- {name}\n" in said
    assert "every rank holds all" not in said
    # --expert is not needed for --tensor: then each rank holds all eight experts, and is told how to share them out
    assert stepkto("convert", config, "--dry-run", "--tensor", 8, "--pipeline", 4) == 0
    said = capsys.readouterr().out
    whole = layers * (per_layer + 7 * 3 * ffn * hidden)
    assert f"stage 1: layers 14 to 27: {whole:,} parameters, {2 * whole:,} bytes" in said
    assert (
        "every rank holds all 8 experts of its layers: --tensor does not split them; --expert (one of 2, 4, 8)" in said
    )
    assert stepkto("convert", config, "--dry-run", "--expert", 3) == 2
    assert "--expert = 3 does not divide the model's experts (8); choose one of 1, 2, 4, 8" in capsys.readouterr().err


def test_a_file_that_shrinks_during_the_reading(models: dict[str, Path], tmp_path: Path) -> None:
    """It passed the check at the beginning: an error that names it, no crash of the process, as a mapping would."""
    folder = copy(models["megatron"], tmp_path / "megatron")
    reader = CheckpointReader(folder)
    assert reader.check(["output_layer.weight"] if "output_layer.weight" in reader.shapes() else reader.shapes()) == []
    (folder / DATA_FILE).write_bytes(b"")
    out = torch.empty(64, dtype=torch.float32).view(torch.uint8).numpy()
    with Files() as files, pytest.raises(OSError, match="ends at byte"):
        reader.read_rows(files, "decoder.final_layernorm.weight", (), 0, 64, out)
