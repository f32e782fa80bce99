"""Which layers carry an adapter: as people write it, and as PEFT's config says it."""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from em.errors import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"


def targets_of(text: str | None) -> tuple[str, ...] | None:
    """Names of layers as people write them, `q,v` or `q_proj,down_proj`, in TARGETS' order; None for all."""
    if text is None or text.strip().lower() == ALL_LINEAR:
        return None
    short = {target.removesuffix("_proj"): target for target in TARGETS}
    wanted = [word.strip().lower() for word in text.split(",")]
    if unknown := [word for word in wanted if word.removesuffix("_proj") not in short]:
        raise UserError(f"targets {text!r}: no {unknown[0]!r} among {', '.join(TARGETS)}, and not all-linear")
    found = {short[word.removesuffix("_proj")] for word in wanted}
    return tuple(target for target in TARGETS if target in found) if len(found) < len(TARGETS) else None


def blocks_of(text: str | None, n_blocks: int | None = None) -> tuple[int, ...] | None:
    """Numbers of blocks, from 0, as people write them: `24`, `10-20`, `3,5,7-9`; None for all.

    n_blocks: how many a model has. UserError for what is none of these, or beyond the last.
    """
    if text is None:
        return None
    found: set[int] = set()
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", word)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise UserError(f"layers {text!r}: {word.strip()!r} is neither a number nor a range, as 10-20")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if n_blocks is not None and max(found) >= n_blocks:
        raise UserError(f"layers: there is no block {max(found)}; this model has 0 to {n_blocks - 1}")
    return tuple(sorted(found))


# -- in PEFT's config ----------------------------------------------------------------------------------------


def named(layer: str, ends: Collection[str]) -> bool:
    """Whether a layer is one of `ends`, or its dotted name ends with one."""
    return any(layer == end or layer.endswith(f".{end}") for end in ends)


def block_of(layer: str) -> int | None:
    """The number in a layer's name, of the block that it is in."""
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def targeted_by(config: dict, path: Path) -> Callable[[str], bool]:
    """Whether peft would put the adapter on a layer (its `check_target_module_exists`)."""
    targets, blocks = config["target_modules"], config.get("layers_to_transform")
    blocks = [blocks] if isinstance(blocks, int) else blocks
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    inside = [_expression(f"(?:^|.*?\\.){p}\\.(\\d+)\\.", "layers_pattern", path).match for p in patterns]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:  # peft itself writes the names out
        targets = ".*"
    matches = _matches(targets, "target_modules", path)
    excluded = _matches(config.get("exclude_modules") or [], "exclude_modules", path)

    def targeted(layer: str) -> bool:
        if excluded(layer) or not matches(layer):
            return False
        if not blocks or isinstance(targets, list) and layer in targets:
            return True
        found = next((m for m in (match(layer) for match in inside) if m), None)
        return (int(found[1]) if found else None if inside else block_of(layer)) in blocks

    return targeted


def _matches(names: str | list[str], key: str, path: Path) -> Callable[[str], bool]:
    """Whether a layer is one of `names`: a regular expression, or ends of dotted names."""
    if isinstance(names, str):
        expression = _expression(names, key, path)
        return lambda layer: bool(expression.fullmatch(layer))
    return lambda layer: named(layer, names)


def _expression(text: str, key: str, path: Path) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: {key} is no regular expression ({error})") from error
