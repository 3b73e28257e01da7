"""First check of a Hugging Face folder, by every command that reads one: are its small files consistent?

Other libraries allocate by the numbers of config.json and fail on unexpected ones with messages of their own. This
module works for any architecture; ``architectures/`` knows what the settings of supported ones mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import MAX_JSON_BYTES, read_json_object

CONFIG = "config.json"
# Every library reads these; each holds a JSON object.
_OBJECTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
# The largest values accepted: well above any model, small enough to compute with.
LIMITS = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 32,
    "num_local_experts": 1 << 14,
    "num_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
}
_POSITIVE = {"num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"}
MAX_EXPERTS = 1 << 16  # layers x experts
# One setting under an old and a new name.
_TWO_NAMES = (("torch_dtype", "dtype"), ("num_local_experts", "num_experts"))
_ROPE_BLOCKS = ("rope_scaling", "rope_parameters")


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json and check that its sizes are usable numbers and that no setting has two values.

    Raises:
        UserError: names every fault.
    """
    path = directory / CONFIG
    config = read_json_object(path)
    inner = config.get("text_config")  # of a multimodal model
    if faults := [*_faults(config), *(_faults(inner) if isinstance(inner, dict) else ())]:
        raise UserError(f"{path}: " + "; ".join(faults))
    return config


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        yield f"architectures = {named!r:.80}: expected a list of names"
    for key, limit in LIMITS.items():
        least = 1 if key in _POSITIVE else 0
        values = config.get(key)
        # some architectures give a size for every layer
        for value in values if isinstance(values, list) and values else [values]:
            if value is not None and (type(value) is not int or not least <= value <= limit):
                yield f"{key} = {value!r:.80}: expected a whole number, {least} to {limit}"
                break
    layers = config.get("num_hidden_layers")
    experts = config.get("num_local_experts") or config.get("num_experts")
    if type(layers) is int and type(experts) is int and layers * experts > MAX_EXPERTS:
        yield f"{layers} layers of {experts} experts each: expected at most {MAX_EXPERTS} experts in all"
    for key in ("torch_dtype", "dtype"):
        value = config.get(key)
        if value is not None and not isinstance(value, str):
            yield f"{key} = {value!r:.80}: expected the name of a dtype, such as bfloat16"
    for old, new in _TWO_NAMES:
        yield from _differing(old, config.get(old), new, config.get(new))
    yield from _rope_faults(config)


def _rope_faults(config: Mapping[str, Any]) -> Iterator[str]:
    blocks: list[dict[str, Any]] = []
    for name in _ROPE_BLOCKS:
        block = config.get(name)
        if not isinstance(block, dict) or not block:
            continue
        kind, other = block.get("rope_type"), block.get("type")
        yield from _differing(f"{name}.rope_type", kind, f"{name}.type", other)
        for key in ("rope_theta", "partial_rotary_factor"):
            yield from _differing(key, config.get(key), f"{name}.{key}", block.get(key))
        rest = {key: value for key, value in block.items() if key != "type"}
        blocks.append({**rest, "rope_type": other if kind is None else kind})
    if len(blocks) == 2:
        for key in sorted(set(blocks[0]) & set(blocks[1])):
            yield from _differing(f"rope_scaling.{key}", blocks[0][key], f"rope_parameters.{key}", blocks[1][key])


def _differing(one: str, first: Any, other: str, second: Any) -> Iterator[str]:
    """One setting in two places: libraries differ in which one they use. null counts as absent."""
    if first is not None and second is not None and first != second:
        yield f"{one} = {first!r:.80} and {other} = {second!r:.80} differ; remove the wrong one"


def end_tokens(directory: Path) -> set[int]:
    """Ids of the tokens that end a response, from config.json and generation_config.json.

    Raises:
        UserError: eos_token_id is neither a token id nor a list of them.
    """
    found: set[int] = set()
    for name in (CONFIG, "generation_config.json"):
        if not (path := directory / name).exists():
            continue
        value = read_json_object(path).get("eos_token_id")
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise UserError(f"{path}: eos_token_id = {value!r:.80}: expected a token id, or a list of them")
        found.update(tokens)
    return found


def check_small_files(directory: Path) -> None:
    """Raises UserError for a tokenizer or generation settings file that is not a JSON object."""
    for name in _OBJECTS:
        if (path := directory / name).exists():
            read_json_object(path)


def read_small_file(path: Path) -> bytes:
    """Read a file that is copied with a model. Raises UserError where it is far too large for one."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise UserError(
            f"{path}: expected at most {MAX_JSON_BYTES >> 20} MiB, got {size >> 20} MiB; move it out of the folder"
        )
    return path.read_bytes()
