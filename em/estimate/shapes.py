"""A model's shape without its weights and without a network: what a dry run knows of it.

shapes.json has of each named model what decides cost, as its config.json states it.
"""

import dataclasses
from pathlib import Path

from em.errors import UserError
from em.files import read_json
from em.model import hub
from em.model.config import DecoderConfig

NAMED = Path(__file__).parent / "shapes.json"


def config_of(name: str) -> DecoderConfig:
    """The config of a folder that holds config.json, of a named model, or of one in the hub's cache.

    UserError where none of these is at hand.
    """
    folder = Path(name).expanduser()
    named = read_json(NAMED)
    short = hub.canonical(name) if hub.canonical(name) in named else None
    if folder.is_dir() and (short is None or (folder / "config.json").exists()):
        path = folder / "config.json"
        if not path.exists():
            raise UserError(f"{folder} has no config.json, so it is not a model's folder")
    elif short is not None:
        return DecoderConfig.from_hf(named[short], source=f"{NAMED}, {short}")
    else:
        path = hub.cached(hub.resolve(name), "config.json")
        if path is None:
            raise UserError(
                f"config.json of {name} is not at hand and a dry run asks no network: "
                f"name a folder that holds it, or one of {', '.join(named)}"
            )
    return DecoderConfig.from_hf(read_json(path), source=str(path))


def with_layers(config: DecoderConfig, n: int) -> DecoderConfig:
    """The same model with its first `n` layers only."""
    return dataclasses.replace(config, n_layers=n, windows=config.windows[:n], ropes=config.ropes[:n])


def period(config: DecoderConfig) -> int:
    """After how many layers, 2 at least, their kinds begin again; 2 where they never do."""
    kinds = list(zip(config.windows, config.ropes, strict=True))
    for n in range(2, config.n_layers // 2 + 1):
        if kinds[n:] == kinds[:-n]:
            return n
    return 2
