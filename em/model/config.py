"""What a checkpoint's config.json says about a decoder, checked.

Four families are read: llama (Llama 3.x, SmolLM2), qwen2 (Qwen2, Qwen2.5), qwen3, olmo3. Every key of a
config is either read here, known not to touch the mathematics (`_HARMLESS`), or refused: a key nobody knows
passes only if its value is null, false, zero or empty, which by convention means "off". Absent keys take the
family's defaults in transformers.
"""

import dataclasses

from em.errors import UserError
from em.files import check
from em.model.rope import Rope

_DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6},
    "qwen2": {"rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500_000.0},
}
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_READ = {
    *_REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "tie_word_embeddings",
    "layer_types", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
}  # fmt: skip
_READ_BY = {
    "llama": {"attention_bias", "mlp_bias"},
    "qwen2": {"use_sliding_window", "sliding_window", "max_window_layers"},
    "qwen3": {"use_sliding_window", "sliding_window", "max_window_layers", "attention_bias"},
    "olmo3": {"sliding_window", "attention_bias"},
}
_HARMLESS = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp",
    "is_llama_config", "id2label", "label2id", "problem_type", "return_dict", "tokenizer_class",
    "task_specific_params", "transformers.js_config", "unsloth_fixed", "unsloth_version", "max_length",
    "temperature", "top_k", "top_p", "do_sample", "repetition_penalty",
}  # fmt: skip


_TYPES = {
    "model_type": str | None, "hidden_act": str | None, "layer_types": list[str] | None,
    "rope_scaling": dict | None, "rope_parameters": dict | None, "rope_theta": float | None,
    "partial_rotary_factor": float | None, "rms_norm_eps": float | None, "max_window_layers": int | None,
    "tie_word_embeddings": bool | None, "attention_bias": bool | None, "mlp_bias": bool | None,
    "use_sliding_window": bool | None, "eos_token_id": int | list[int] | None,
}  # fmt: skip
_MOST_LAYERS, _LARGEST = 1000, 2**24  # more are a slip, and would take hours and memory to be found out


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape and mathematics; sizes in channels. `hf` is the config.json it came from."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tied: bool  # the head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: str | None  # None | "head" (each head by itself) | "full" (all heads together)
    post_norm: bool  # normalise what a block adds (Olmo 3) instead of what it reads
    windows: tuple[int | None, ...]  # per layer: positions a query sees, its own included; None: all
    ropes: tuple[Rope, ...]  # per layer
    hf: dict = dataclasses.field(repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: dict, source: str = "config.json") -> "DecoderConfig":
        """From a parsed config.json. `source` names the file in errors.

        Raises UserError on an unknown model_type, rope type or activation, a missing or contradictory size,
        and on any other key that is set and might change the mathematics.
        """
        check(hf, source, optional=_TYPES)
        family = hf.get("model_type")
        if family not in _DEFAULTS:
            known = ", ".join(_DEFAULTS)
            raise UserError(f"{source}: model_type {family!r} is not supported; the decoder covers {known}")
        if hf.get("quantization_config"):
            raise UserError(f"{source}: quantised checkpoints are not supported; name the unquantised model")
        for key, value in hf.items():
            if value and key not in _READ | _READ_BY[family] | _HARMLESS and not key.startswith("_"):
                raise UserError(
                    f"{source}: {key} = {value!r} is not supported for {family}; "
                    "delete the key if it does not change the mathematics"
                )
        given = {key: value for key, value in (_DEFAULTS[family] | hf).items() if value is not None}
        counts = [
            *_REQUIRED,
            *(key for key in ("num_key_value_heads", "head_dim", "sliding_window") if key in given),
        ]
        wrong = [key for key in counts if type(given.get(key)) is not int or not 1 <= given[key] <= _LARGEST]
        if wrong or given["num_hidden_layers"] > _MOST_LAYERS:
            raise UserError(
                f"{source}: {', '.join(wrong or ['num_hidden_layers'])} must be given as positive integers, "
                f"{_MOST_LAYERS} layers and {_LARGEST} of anything else at most"
            )
        if not 0 < given.get("rms_norm_eps", 0) < 1:
            raise UserError(f"{source}: rms_norm_eps must be a number such as 1e-06")
        if given.get("hidden_act", "silu") != "silu":
            raise UserError(f"{source}: hidden_act {given['hidden_act']!r} is not supported (silu is)")
        if given.get("partial_rotary_factor", 1) != 1:
            raise UserError(
                f"{source}: partial_rotary_factor {given['partial_rotary_factor']} is not supported"
            )

        n_heads = given["num_attention_heads"]
        n_kv_heads = given.get("num_key_value_heads", n_heads)
        head_dim = given.get("head_dim", given["hidden_size"] // n_heads)
        if n_heads % n_kv_heads or head_dim % 2 or not 0 < n_heads * head_dim <= _LARGEST:
            raise UserError(
                f"{source}: {n_heads} heads of size {head_dim} over {n_kv_heads} key heads do not fit"
            )
        layer_types = _layer_types(family, given, source)
        windows = tuple(
            given["sliding_window"] if kind == "sliding_attention" else None for kind in layer_types
        )
        ropes = _ropes(family, given, source)
        bias = bool(given.get("attention_bias", False))
        return cls(
            model_type=family,
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            n_layers=given["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            norm_eps=given["rms_norm_eps"],
            max_positions=given["max_position_embeddings"],
            tied=bool(given.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=bool(given.get("mlp_bias", False)),
            qk_norm={"qwen3": "head", "olmo3": "full"}.get(family),
            post_norm=family == "olmo3",
            windows=windows,
            ropes=tuple(ropes[kind] for kind in layer_types),
            hf=hf,
        )


def _layer_types(family: str, given: dict, source: str) -> list[str]:
    """`full_attention` or `sliding_attention` for each layer."""
    n = given["num_hidden_layers"]
    if family == "olmo3":  # every fourth layer is full
        default = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(n)]
    elif given.get("use_sliding_window") and "max_window_layers" in given:
        default = [
            "sliding_attention" if i >= given["max_window_layers"] else "full_attention" for i in range(n)
        ]
    else:
        default = ["full_attention"] * n
    layer_types = given.get("layer_types", default)
    if len(layer_types) != n or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{source}: layer_types must name full_attention or sliding_attention for each of the {n} layers"
        )
    windowed = family == "olmo3" or given.get("use_sliding_window", False)
    if "sliding_attention" in layer_types and not (windowed and "sliding_window" in given):
        raise UserError(f"{source}: layer_types asks for sliding_attention but no sliding window is in use")
    return layer_types


def _ropes(family: str, given: dict, source: str) -> dict[str, Rope]:
    """The rotary embedding of each layer type, from `rope_parameters` (transformers 5) or the older pair
    `rope_theta` and `rope_scaling`; where a config has both, they must agree.

    Olmo 3 scales full-attention layers only. An older Olmo 3 config has one `rope_theta` for both types of
    layers; transformers 5.23 drops it for sliding layers unless it is 500,000, which every release uses.
    """
    theta, longest = given.get("rope_theta", 10_000.0), given["max_position_embeddings"]
    found = []

    def flat(parameters: dict) -> dict[str, Rope]:
        scaled = Rope.from_hf(parameters, theta, longest, source)
        plain = Rope(theta=scaled.theta) if family == "olmo3" else scaled
        return {"full_attention": scaled, "sliding_attention": plain}

    parameters = given.get("rope_parameters")
    if parameters and any(isinstance(value, dict) for value in parameters.values()):
        if set(parameters) - {"full_attention", "sliding_attention"}:
            raise UserError(
                f"{source}: rope_parameters must be keyed by full_attention and sliding_attention only"
            )
        kinds = ("full_attention", "sliding_attention")
        check(parameters, source, optional=dict.fromkeys(kinds, dict | None))
        found.append(
            {kind: Rope.from_hf(parameters.get(kind) or {}, theta, longest, source) for kind in kinds}
        )
    elif parameters:
        found.append(flat(parameters))
    if given.get("rope_scaling") or not found:
        found.append(flat(given.get("rope_scaling") or {}))
    if found[0] != found[-1]:
        raise UserError(f"{source}: rope_parameters and rope_scaling contradict each other; delete one")
    return found[0]
