"""Rotary frequencies as transformers computes them: plain, Llama 3.1's scaling, YaRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_stepkto.base.errors import UserError


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling (rope_type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    attention_factor = 1.0

    def scale(self, inv_freq: Tensor, base: float) -> Tensor:
        wavelength = 2 * math.pi / inv_freq
        low = self.original_max_positions / self.low_freq_factor
        high = self.original_max_positions / self.high_freq_factor
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        scaled = torch.where(wavelength > low, inv_freq / self.factor, inv_freq)
        between = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
        return torch.where((wavelength >= high) & (wavelength <= low), between, scaled)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071; rope_type yarn), as Qwen2.5 and Qwen3 declare it for long contexts.

    Applied at every length, as transformers and vLLM do. attention_factor: of cosine and sine; attention scores are
    multiplied by its square.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    def scale(self, inv_freq: Tensor, base: float) -> Tensor:
        dim = 2 * len(inv_freq)

        def dimension(rotations: float) -> float:
            return dim * math.log(self.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
        return inv_freq / self.factor * ramp + inv_freq * (1 - ramp)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over whole heads."""

    base: float
    scaling: Llama3Scaling | YarnScaling | None = None

    def inv_freq(self, head_dim: int) -> Tensor:
        """[head_dim / 2] float32."""
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")  # also under a meta-device context
        inv_freq = 1.0 / (self.base ** (steps / head_dim))
        return self.scaling.scale(inv_freq, self.base) if self.scaling else inv_freq

    @property
    def attention_factor(self) -> float:
        return self.scaling.attention_factor if self.scaling else 1.0


def check_number(hf: Mapping[str, Any], key: str, where: str = "config.json") -> None:
    """Raises UserError for a setting that is set to anything but a positive number."""
    if key in hf and (type(hf[key]) not in (int, float) or not 0 < hf[key] < math.inf):
        raise UserError(f"{where}: {key} = {hf[key]!r}: expected a positive number")


_KEYS = {
    "default": set(),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    },
}


def read_rope(hf: Mapping[str, Any], default_base: float) -> Rope:
    """From ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (before).

    Raises:
        UserError: an unsupported RoPE type or setting, or two blocks that differ.
    """
    block = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(block) or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: {block} = {rope!r}: expected an object")
    if block == "rope_parameters" and hf.get("rope_scaling"):
        # transformers uses the older block, and vLLM follows transformers; refused rather than guessed
        older = read_rope({**hf, "rope_parameters": None}, default_base)
        if read_rope({**hf, "rope_scaling": None}, default_base) != older:
            raise UserError(
                f"config.json: rope_scaling = {hf['rope_scaling']!r:.200} and rope_parameters = {rope!r:.200} are both "
                "set and differ; remove one"
            )
        return older
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"config.json: RoPE type {kind!r} is not supported; expected one of {', '.join(_KEYS)}")
    unknown = set(rope) - _KEYS[kind] - {"rope_type", "type", "rope_theta"}
    unknown = {key for key in unknown if not (key == "partial_rotary_factor" and rope[key] == 1)}
    # Some tools write the keys of one type beside another type, as null.
    unknown = {key for key in unknown if rope[key] is not None}
    if unknown:
        raise UserError(
            f"config.json: {block}: {', '.join(f'{key} = {rope[key]!r}' for key in sorted(unknown))} is not supported "
            f"for RoPE type {kind}"
        )
    # null counts as unset, except for these two, where transformers uses it as a value
    rope = {key: value for key, value in rope.items() if value is not None or key in ("rope_theta", "truncate")}
    missing = {"llama3": _KEYS["llama3"], "yarn": {"factor"}}.get(kind, set()) - set(rope)
    if missing:
        raise UserError(f"config.json: {block}: RoPE type {kind} needs {', '.join(sorted(missing))}")
    if not isinstance(rope.get("truncate"), bool | None):
        raise UserError(f"config.json: {block}: truncate = {rope['truncate']!r:.80}: expected true or false")
    for key in sorted({"rope_theta", *_KEYS[kind]} - {"truncate"}):
        check_number(rope, key, f"config.json: {block}")
    # transformers 5 writes rope_theta inside rope_parameters, older versions beside it
    if "rope_theta" not in rope:
        check_number(hf, "rope_theta")
    base = float(rope.get("rope_theta", hf.get("rope_theta", default_base)))
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Rope(base, Llama3Scaling(*(rope[key] for key in keys)))
    return Rope(base, _yarn(rope, hf) if kind == "yarn" else None)


def _yarn(rope: Mapping[str, Any], hf: Mapping[str, Any]) -> YarnScaling:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        attention = magnitude(1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            attention = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return YarnScaling(
        factor=rope["factor"],
        original_max_positions=rope.get("original_max_position_embeddings") or hf["max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        attention_factor=float(attention),
        truncate=bool(rope.get("truncate", True)),
    )
