"""One LoRA adapter on disk, in the format that peft and vLLM share.

    adapter_config.json            rank, alpha, which layers
    adapter_model.safetensors      base_model.model.<layer>.lora_A.weight (r, in), …lora_B.weight (out, r)

A config is read like a model's: a key that changes the mathematics and is not handled is an error.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from em.errors import UserError
from em.files import ADAPTER_WEIGHTS, check, read_json, write_atomic, write_json

CONFIG = "adapter_config.json"

READ = {
    "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type", "r", "target_modules",
    "use_rslora",
}  # fmt: skip
# Recorded by peft, but without effect on what a trained adapter computes.
IDLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
FIELDS = {"peft_type": str, "target_modules": str | list[str], "r": int, "lora_alpha": float}
OPTIONAL = {"layers_to_transform": int | list[int] | None, "use_rslora": bool | None}
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
    ends = {layer.rpartition(".")[2] for layer in factors}
    everywhere = factors.keys() == {layer for layer in layers if _named(layer, ends)}
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
        "target_modules": sorted(ends if everywhere else factors),
        "modules_to_save": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors[_key(layer, "A")] = A.detach().cpu().contiguous()
        tensors[_key(layer, "B")] = B.detach().cpu().contiguous()
    write_json(folder / CONFIG, config)
    write_atomic(
        folder / ADAPTER_WEIGHTS, lambda path: path.write_bytes(save(tensors, metadata={"format": "pt"}))
    )


def read(
    folder: str | Path, sizes: dict[str, tuple[int, int]]
) -> tuple[Shape, dict[str, tuple[Tensor, Tensor]]]:
    """The adapter in `folder` as (shape, {layer: (A, B)}), for a model whose layers have `sizes` (in, out).

    Raises UserError for a missing or broken file, for anything but plain LoRA, for a key or shape that does
    not fit the model, and for weights that are no finite floating-point numbers.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    shape, targeted = _shape(config, path), _targets(config, path)
    path = Path(folder) / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    factors = {}
    for layer in sizes:
        if targeted(layer):
            n_in, n_out = sizes[layer]
            A = _take(tensors, _key(layer, "A"), (shape.rank, n_in), path)
            B = _take(tensors, _key(layer, "B"), (n_out, shape.rank), path)
            factors[layer] = A, B
    if tensors or not factors:
        stray = min(tensors, default="target_modules")
        raise UserError(f"{path}: {stray} fits no layer that carries adapters here; is it for another model?")
    return shape, factors


def _key(layer: str, letter: str) -> str:
    return f"base_model.model.{layer}.lora_{letter}.weight"


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


def _named(layer: str, ends) -> bool:
    return any(layer == end or layer.endswith(f".{end}") for end in ends)


def _targets(config: dict, path: Path) -> Callable[[str], bool]:
    """Whether peft would put the adapter on a layer."""
    targets, blocks = config["target_modules"], config.get("layers_to_transform")
    if isinstance(targets, str):  # a regular expression; peft writes "all-linear" out as a list
        try:
            matches = re.compile(targets).fullmatch
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: target_modules is no regular expression ({error})") from error
    else:
        matches = functools.partial(_named, ends=targets)

    def targeted(layer: str) -> bool:
        block = next((int(part) for part in layer.split(".") if part.isdigit()), None)
        inside = blocks is None or block in ([blocks] if isinstance(blocks, int) else blocks)
        return inside and bool(matches(layer))

    return targeted


def _shape(config: dict, path: Path) -> Shape:
    """The shape that a config describes, if it describes plain LoRA and nothing besides."""
    if config.get("peft_type") != "LORA" or not config.get("target_modules"):
        raise UserError(f"{path} does not describe a LoRA adapter (peft_type, target_modules)")
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
