"""Rotary position embedding (RoPE) with the scalings that real checkpoints ask for.

Half-split layout: channel i of a head turns with channel i + D/2, as in every Hugging Face checkpoint of the
families covered. Angles, sines and the turn itself are fp32 whatever the model's dtype. Frequencies are
not module buffers: they would be rounded by `model.to(bfloat16)` and left empty by meta-device construction.
They are a pure function of (Rope, head size, device), cached.
"""

import dataclasses
import functools
import math

import torch

from em.errors import UserError
from em.files import check

_KNOWN = {
    "rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
    "mscale_all_dim",
}  # fmt: skip

_TYPES = dict.fromkeys(_KNOWN - {"rope_type", "type", "truncate"}, float | None)
_TYPES |= {"rope_type": str | None, "type": str | None, "truncate": bool | None}


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding. Two layers that share it share its table."""

    theta: float = 10_000.0
    kind: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0
    original_length: int = 0  # context of pretraining, tokens (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    amplitude: float = 1.0  # multiplies cos and sin (yarn's attention factor)

    @classmethod
    def from_hf(
        cls, parameters: dict, theta: float, max_positions: int, source: str = "config.json"
    ) -> "Rope":
        """From one `rope_parameters` / `rope_scaling` entry of a config; `theta` where the entry has none.

        Raises UserError on an unknown rope type, an unknown key that is set, or a number that is missing.
        """
        check(parameters, source, optional=_TYPES)
        given = {key: value for key, value in parameters.items() if value is not None}
        kind = given.get("rope_type", given.get("type", "default"))
        unknown = {key: value for key, value in given.items() if key not in _KNOWN and value is not False}
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise UserError(
                f"{source}: rope type {kind!r} is not supported (default, linear, llama3, yarn are)"
            )
        if unknown:
            raise UserError(f"{source}: rope parameters {unknown} are not supported with rope type {kind!r}")
        if given.get("partial_rotary_factor", 1) != 1:
            raise UserError(
                f"{source}: partial_rotary_factor {given['partial_rotary_factor']} is not supported"
            )

        def number(key: str, default: float | None = None) -> float:
            value = given.get(key, default)
            if value is None or value <= 0:
                raise UserError(f"{source}: rope type {kind!r} needs a positive {key}, not {value!r}")
            return value

        rope = cls(theta=float(number("rope_theta", theta)), kind=kind)
        if rope.theta <= 1:
            raise UserError(f"{source}: rope_theta {rope.theta} must be above 1")
        if kind == "default":
            return rope
        original = int(number("original_max_position_embeddings", max_positions))
        if kind == "linear":
            return dataclasses.replace(rope, factor=number("factor"))
        if kind == "llama3":
            low, high = number("low_freq_factor"), number("high_freq_factor")
            if low >= high:
                raise UserError(f"{source}: low_freq_factor {low} must be below high_freq_factor {high}")
            return dataclasses.replace(
                rope,
                factor=number("factor"),
                original_length=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        factor = number("factor", max_positions / original)
        scale, scale_all = given.get("mscale"), given.get("mscale_all_dim")

        def amplitude(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

        inferred = amplitude(scale) / amplitude(scale_all) if scale and scale_all else amplitude(1.0)
        return dataclasses.replace(
            rope, factor=factor, original_length=original, truncate=bool(given.get("truncate", True)),
            beta_fast=number("beta_fast", 32.0), beta_slow=number("beta_slow", 1.0),
            amplitude=number("attention_factor", inferred),
        )  # fmt: skip

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians a position, (D/2,), fastest first; fp32 throughout, as the checkpoints were trained."""
        plain = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            turns = self.original_length * plain / (2 * math.pi)  # full turns within the pretraining context
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            return torch.lerp(plain / self.factor, plain, keep.clamp(0, 1))
        if self.kind == "yarn":

            def channel(turns: float) -> float:  # the channel that makes `turns` in the pretraining context
                return (
                    head_dim
                    * math.log(self.original_length / (turns * 2 * math.pi))
                    / (2 * math.log(self.theta))
                )

            low, high = channel(self.beta_fast), channel(self.beta_slow)
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            high += 0.001 if high == low else 0
            interpolate = ((torch.arange(head_dim // 2) - low) / (high - low)).clamp(0, 1)
            return torch.lerp(plain, plain / self.factor, interpolate)
        return plain

    def table(self, positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines for `rotate`: positions (B, T) → two fp32 (B, T, 1, D)."""
        angles = positions[..., None, None] * _frequencies(self, head_dim, positions.device)  # (B, T, 1, D)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.amplitude == 1 else (cos * self.amplitude, sin * self.amplitude)


@functools.lru_cache(maxsize=64)
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> torch.Tensor:
    """(D,), those of the first half negative: their sines are the signed ones, their cosines as they were."""
    frequencies = rope.frequencies(head_dim)
    return torch.cat((-frequencies, frequencies)).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads of x (B, T, H, D) by a `Rope.table`; fp32 inside, x's dtype outside."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
