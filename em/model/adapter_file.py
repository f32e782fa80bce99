"""One LoRA adapter on disk, in the format that peft and vLLM share.

    adapter_config.json            rank, alpha, which layers
    adapter_model.safetensors      base_model.model.<layer>.lora_A.weight (r, in), …lora_B.weight (out, r)

A config is read like a model's: a key that changes the mathematics and is not handled is an error. Weights of
the base that other trainers save beside an adapter (embeddings, the head) are compared with the base's, and
passed over where they are equal.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from em.errors import UserError
from em.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check, read_json, write_atomic, write_json
from em.model.targets import block_of, named, targeted_by

READ = {
    "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "modules_to_save", "peft_type", "r", "target_modules", "use_rslora",
}  # fmt: skip
# Recorded by peft, but without effect on what a trained adapter computes.
IDLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
FIELDS = {"peft_type": str, "target_modules": str | list[str], "r": int, "lora_alpha": float}
OPTIONAL = {"layers_to_transform": int | list[int] | None, "use_rslora": bool | None}
OPTIONAL |= dict.fromkeys(("exclude_modules", "layers_pattern"), str | list[str] | None)
OPTIONAL |= {"modules_to_save": list[str] | None}
LARGEST_ALPHA = 1e6
PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base weights


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers that every layer of an adapter shares."""

    rank: int
    alpha: float
    rslora: bool = True

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def write(
    folder: str | Path,
    shape: Shape,
    factors: dict[str, tuple[Tensor, Tensor]],
    layers: set[str],
    base_model_name: str | None,
) -> None:
    """Write an adapter; the weights last, so that their presence means it is whole.

    factors: A (r, in) and B (out, r), unscaled, by layer. layers: all that could carry an adapter.
    """
    folder = Path(folder)
    ends, blocks = {layer.rpartition(".")[2] for layer in factors}, {block_of(layer) for layer in factors}
    alike = {layer for layer in layers if named(layer, ends)}
    inside = {layer for layer in alike if block_of(layer) in blocks}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "use_rslora": shape.rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(ends if factors.keys() == inside else factors),
        "modules_to_save": None,
        "layers_to_transform": sorted(blocks) if factors.keys() == inside < alike else None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors[_key(layer, "A")] = A.detach().cpu().contiguous()
        tensors[_key(layer, "B")] = B.detach().cpu().contiguous()
    write_json(folder / ADAPTER_CONFIG, config)
    write_atomic(
        folder / ADAPTER_WEIGHTS, lambda path: path.write_bytes(save(tensors, metadata={"format": "pt"}))
    )


def read(
    folder: str | Path, sizes: dict[str, tuple[int, int]], base: Mapping[str, Tensor] | None
) -> tuple[Shape, dict[str, tuple[Tensor, Tensor]]]:
    """The adapter in `folder` as (shape, {layer: (A, B)}), for a model whose layers have `sizes` (in, out).

    base: the model's weights by name, without adapters, or None, and then weights of the base in the file are
    not looked at. Raises UserError for a missing or broken file, for anything but plain LoRA, for a key or
    shape that does not fit the model, for weights of the base that are not `base`'s, and for weights that are
    no finite floating-point numbers.
    """
    path = Path(folder) / ADAPTER_CONFIG
    config = read_json(path)
    shape, targeted = _shape(config, path), targeted_by(config, path)
    path = Path(folder) / ADAPTER_WEIGHTS
    try:
        tensors = _unnamed(load_file(path), path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    factors = {}
    for layer in sizes:
        if targeted(layer):
            n_in, n_out = sizes[layer]
            A = _take(tensors, _key(layer, "A"), (shape.rank, n_in), path)
            B = _take(tensors, _key(layer, "B"), (n_out, shape.rank), path)
            factors[layer] = A, B
    saved = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    if stray := min(tensors.keys() - saved.keys(), default=None if factors else "target_modules"):
        on_ends = any(f".{name}." in stray for name in ENDS)
        why = ": it is on an embedding or the head" if on_ends else "; is it for another model?"
        raise UserError(f"{path}: {stray} fits no layer that carries adapters here{why}")
    if base is not None:
        _compare(saved, base, config.get("modules_to_save") or [], path)
    return shape, factors


PREFIX = "base_model.model."
ENDS = ("embed_tokens", "wte", "lm_head", "unembed_tokens")  # what trainers call embedding and head
_FACTOR = re.compile(r"(.+\.lora_[AB])\.([^.]+)\.weight")


def _key(layer: str, letter: str) -> str:
    return f"{PREFIX}{layer}.lora_{letter}.weight"


def _unnamed(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same without an adapter's name in the keys, as peft has it in memory: `….lora_A.default.weight`."""
    names = {match[2] for match in map(_FACTOR.fullmatch, tensors) if match}
    if not names:
        return tensors
    if len(names) > 1:
        raise UserError(f"{path} holds several adapters ({', '.join(sorted(names))}); save one by itself")
    return {_FACTOR.sub(r"\1.weight", key): tensor for key, tensor in tensors.items()}


def _compare(saved: dict[str, Tensor], base: Mapping[str, Tensor], modules: list[str], path: Path) -> None:
    """UserError where weights saved beside an adapter are not the base's, compared in the coarser dtype."""
    for key, tensor in sorted(saved.items()):
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
        name = re.sub(r"\.modules_to_save\.([^.]+)\.", ".", name)
        if name not in base:
            raise UserError(f"{path}: {key} is no weight of this model; is the adapter for another one?")
        own = base[name]
        dtype = min(tensor.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
        tensor = tensor.to(own.device)
        if tensor.shape != own.shape or not torch.equal(tensor.to(dtype), own.to(dtype)):
            raise UserError(
                f"{path}: it carries a {name} that is not the base's (trained beside the adapter, or of "
                "another base), and only plain LoRA is supported"
            )
    for module in modules:
        if not any(f".{module}." in f".{key}" for key in saved):
            raise UserError(f"{path} lacks {module}, which modules_to_save names; it is not whole")


def _take(tensors: dict[str, Tensor], key: str, size: tuple[int, int], path: Path) -> Tensor:
    if key not in tensors:
        raise UserError(f"{path} lacks {key}; it is not whole or belongs to another model")
    tensor = tensors.pop(key)
    found = tuple(tensor.shape)
    if found != size:
        raise UserError(f"{path}: {key} is {found} where {size} is needed; is it for another model?")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: {key} holds {tensor.dtype}, not floating-point numbers; export it again")
    if not tensor.float().isfinite().all():  # fp32, as it will be used
        raise UserError(f"{path}: {key} holds NaN or infinite numbers; the run that made it went wrong")
    return tensor


def _shape(config: dict, path: Path) -> Shape:
    """The shape that a config describes, if it describes plain LoRA and nothing besides."""
    key = "target_modules" if config.get("peft_type") == "LORA" else "peft_type"
    if key == "peft_type" or not config.get(key):
        raise UserError(f"{path} does not describe a LoRA adapter: its {key} is {config.get(key)!r:.40}")
    check(config, path, FIELDS, OPTIONAL)
    for key in sorted(config.keys() - READ - IDLE):
        if config[key] not in (None, False, "none", {}, []):
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported, only plain LoRA is")
    init = config.get("init_lora_weights")
    if init not in PLAIN_INIT:
        raise UserError(f"{path}: init_lora_weights = {init!r} changes the base; convert it in peft")
    rank, alpha = config["r"], config["lora_alpha"]
    if rank < 1 or not 0 < alpha <= LARGEST_ALPHA:
        raise UserError(
            f"{path}: r = {rank} should be at least 1, lora_alpha = {alpha} above 0 and at most "
            f"{LARGEST_ALPHA:.0f}"
        )
    return Shape(rank, alpha, bool(config.get("use_rslora")))
