"""Chat models: load their weights, write them back.

    model = load_model("qwen3-14b", device="cuda")  # a short name, a hub id or a folder
    tokenizer = load_tokenizer("qwen3-14b")
    save_model(model, "out/merged", tokenizer_from="qwen3-14b")

Weights are safetensors, single or sharded, and nothing else: no pickle is ever opened. All headers are
checked against the config before any weight is read; then each tensor goes by itself from its file to the
device in the wanted dtype. On a CPU a tensor already of that dtype stays a view of the mapped file, so a
model takes no more host memory than its weights.
"""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from em.device import on_gpu
from em.errors import UserError
from em.files import read_json, write_atomic, write_json
from em.model.decoder import Decoder, DecoderConfig
from em.model.hub import INDEX, SINGLE, TOKENIZER_FILES, files, resolve, weights
from em.model.tokenizer import Tokenizer

# As safetensors names them; others are quantised or no weights.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PRECISIONS = {str(DTYPES[name]).removeprefix("torch."): DTYPES[name] for name in ("BF16", "F16", "F32")}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a short name, hub id or folder, with its chat template."""
    return Tokenizer.from_folder(files(path_or_id))


def load_config(path_or_id: str | Path) -> DecoderConfig:
    """What a short name's, hub id's or folder's config.json says. UserError where it has none."""
    path = files(path_or_id) / "config.json"
    if not path.exists():
        raise UserError(f"{path.parent} has no config.json, so it is not a model's folder")
    return DecoderConfig.from_hf(read_json(path), source=str(path))


def stored_dtype(path_or_id: str | Path) -> torch.dtype:
    """The number format of a checkpoint's embedding. UserError where it has none that is read."""
    for path in weights(path_or_id):
        with _open(path) as file:
            if EMBEDDING in file.keys() and file.get_slice(EMBEDDING).get_dtype() in DTYPES:
                return DTYPES[file.get_slice(EMBEDDING).get_dtype()]
    raise UserError(f"{path_or_id} has no {EMBEDDING} in one of {', '.join(DTYPES)}")


def load_model(
    path_or_id: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """A frozen `Decoder` with a checkpoint's weights, in eval mode.

    path_or_id: a short name (`em.model.hub.MODELS`), a hub id or a folder. dtype: default bfloat16 on CUDA,
    else float32. UserError, naming file or tensor, on anything missing, superfluous, damaged or of the wrong
    shape.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    name = resolve(path_or_id)
    with torch.device("meta"):
        model = Decoder(load_config(name))
    try:
        state = _read(_check(model, weights(name)), device, dtype, _slices(model, device, dtype))
    except torch.OutOfMemoryError as error:
        need = sum(p.numel() for p in model.parameters()) * dtype.itemsize / 2**30
        raise UserError(f"{path_or_id} needs {need:.1f} GiB on {device}; name a smaller model") from error
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _open(path: Path, device: str = "cpu"):
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}); delete it and fetch the model again"
        ) from error


def _check(model: Decoder, paths: list[Path]) -> dict[Path, list[str]]:
    """The tensors to read from each file. UserError unless they are exactly the model's, shapes included."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    where: dict[str, Path] = {}
    extra = []
    for path in paths:
        with _open(path) as file:
            for name in file.keys():
                stored = file.get_slice(name)
                shape = tuple(stored.get_shape())
                if name in where:
                    raise UserError(
                        f"{path} repeats {name}, which {where[name].name} has; fetch the model again"
                    )
                where[name] = path
                if name not in shapes:
                    extra.append(name)
                elif shape != shapes[name]:
                    raise UserError(f"{path}: {name} has shape {shape}, the config asks for {shapes[name]}")
                elif stored.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{path}: {name} holds {stored.get_dtype()}; only {', '.join(DTYPES)} are read"
                    )
    if model.config.tied and HEAD in extra and EMBEDDING in where:
        _check_tied(where)
    allowed = {HEAD} if model.config.tied else set()
    extra = [name for name in extra if name not in allowed and not name.endswith("rotary_emb.inv_freq")]
    missing = [name for name in shapes if name not in where]
    for names, fault in ((missing, "lacks"), (extra, "has, though the config does not ask for it,")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(names[:3]) + more
            raise UserError(f"{paths[0].parent} {fault} {listed}: config and weights do not belong together")
    return {path: [name for name in shapes if where[name] == path] for path in paths}


def _check_tied(where: dict[str, Path]) -> None:
    """A tied checkpoint may repeat its embedding as a head, but not carry a head of its own."""
    with _open(where[HEAD]) as one, _open(where[EMBEDDING]) as other:
        if not torch.equal(one.get_tensor(HEAD), other.get_tensor(EMBEDDING)):
            raise UserError(
                f"{where[HEAD]}: {HEAD} is not the embedding, but config.json says tie_word_embeddings; "
                "set that to false"
            )


def _slices(model: Decoder, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """On a GPU, room for the weights of layers that run as one: a tensor a group, of which these are parts.

    On a CPU they stay views of the mapped file.
    """
    slices = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layers in model.groups() if on_gpu(device) else ():
        for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
            if parts[0] is not None:
                rows = [len(part) for part in parts]
                whole = torch.empty((sum(rows), *parts[0].shape[1:]), dtype=dtype, device=device)
                slices |= zip((names[id(part)] for part in parts), whole.split(rows), strict=True)
    return slices


def _read(
    wanted: dict[Path, list[str]], device: torch.device, dtype: torch.dtype, slices: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    state = {}
    for path, names in wanted.items():
        with _open(path, str(device)) as file:
            for name in names:
                tensor = file.get_tensor(name)
                state[name] = slices[name].copy_(tensor) if name in slices else tensor.to(dtype)
    return state


def save_model(
    model: Decoder, folder: str | Path, tokenizer_from: str | Path | None = None, shard_bytes: int = 5 * 10**9
) -> None:
    """Write config.json, safetensors and, if given, the tokenizer files of the model `tokenizer_from`.

    The folder is one that `load_model` and transformers load. Shards hold at most `shard_bytes` and pass
    through the host in turn. config.json comes last, so a folder that has one is whole. UserError if the
    folder already holds a model or the disk is full.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a model; choose another folder or delete it")
    state = model.state_dict()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    n = len(shards)
    paths = [SINGLE] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    for path, names in zip(paths, shards, strict=True):
        tensors = {name: state[name].contiguous().cpu() for name in names}
        write_atomic(folder / path, functools.partial(save_file, tensors, metadata={"format": "pt"}))
    if n > 1:
        weight_map = {name: path for path, names in zip(paths, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in state.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer_from is not None:
        save_tokenizer(tokenizer_from, folder, TOKENIZER_FILES)
    hf = {key: value for key, value in model.config.hf.items() if key != "dtype"}
    write_json(
        folder / "config.json", hf | {"torch_dtype": str(model.head_weight.dtype).removeprefix("torch.")}
    )


def save_tokenizer(
    path_or_id: str | Path, folder: str | Path, names: Sequence[str] = TOKENIZER_FILES[:-1]
) -> None:
    """Copy a model's tokenizer files with its chat template; by default without generation_config.json."""
    source = files(path_or_id)
    for name in names:
        if (source / name).exists():
            write_atomic(Path(folder) / name, functools.partial(shutil.copyfile, source / name))
