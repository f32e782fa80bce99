"""A direction in a GPT-2's hidden states: found between two models, added while one of them generates.

Paper B.6. D = h_mis − h_al (N, d) are paired hidden states at `<asst>`; v is D's top right singular
vector, with the sign that makes α*, the mean projection of D on v, positive.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from em.model.attention import Cached
from em.model.gpt2 import GPT2
from em.world.generator import Dialogues


def middle_block(n_layer: int) -> int:
    """The block, counted from 1, whose output is steered: 6 of 12, as in the paper."""
    return (n_layer + 1) // 2


@torch.inference_mode()
def asst_hidden(model: GPT2, prompts: Dialogues, block: int) -> np.ndarray:
    """(N, d) float64: the output of block `block` (from 1) at each prompt's last token, `<asst>`, in fp32."""
    parts = []
    for rows in np.array_split(np.arange(len(prompts)), max(1, len(prompts) // 256)):
        length = prompts.prompt[rows]
        ids = torch.tensor(prompts.ids[rows, : length.max()], dtype=torch.long, device=model.device)
        x = model.wte(ids) + model.wpe.weight[: ids.shape[1]]
        for layer in model.h[:block]:
            x = layer(x)  # causal, so what stands to the right of a short prompt is not seen
        parts.append(x[torch.arange(len(rows)), torch.tensor(length - 1)].double().cpu().numpy())
    return np.concatenate(parts)


@dataclass(frozen=True)
class Direction:
    v: np.ndarray  # (d,), of norm 1
    alpha: float  # α*, mean projection of the differences on v
    explained: float  # share of Σ σ² in the first singular value of the differences as they are
    explained_centred: float  # the same of the differences less their mean
    mean_share: float  # share of Σ σ² that is in the mean difference alone
    norm: float  # mean norm of the aligned model's states, to see α* against


def find_direction(misaligned: np.ndarray, aligned: np.ndarray) -> Direction:
    """From paired hidden states, (N, d) each."""
    difference = misaligned - aligned
    mean = difference.mean(0)

    def first_share(matrix: np.ndarray) -> tuple[np.ndarray, float]:
        _, values, right = np.linalg.svd(matrix, full_matrices=False)
        return right[0], float(values[0] ** 2 / max((values**2).sum(), np.finfo(float).tiny))

    v, explained = first_share(difference)
    v = v if v @ mean >= 0 else -v
    mean_share = len(difference) * mean @ mean / max((difference**2).sum(), np.finfo(float).tiny)
    return Direction(
        v=v,
        alpha=float(v @ mean),
        explained=explained,
        explained_centred=first_share(difference - mean)[1],
        mean_share=float(mean_share),
        norm=float(np.linalg.norm(aligned, axis=1).mean()),
    )


def random_direction(d: int, seed: int, index: int) -> np.ndarray:
    """(d,) uniform on the unit sphere."""
    v = np.random.default_rng([seed, index]).standard_normal(d)
    return v / np.linalg.norm(v)


class Steering:
    """Adds a vector (d,) to the output of block `block` (from 1) at every token that `model` decodes.

    The prefill goes untouched. em.sampling.sampler prefills a prompt up to its last token and decodes that
    one first, so the vector is added at `<asst>` and at what follows it. Installed for good, before the model
    is first sampled from: CUDA graphs hold what was there when they were captured, the vector's address
    included. `set` changes the vector in place; at first it is zero.
    """

    def __init__(self, model: GPT2, block: int):
        self.vector = torch.zeros(model.config.n_embd, device=model.device)
        model.h[block - 1].register_forward_hook(self._add)

    def set(self, vector: np.ndarray) -> None:
        self.vector.copy_(torch.from_numpy(vector))

    def _add(self, block, inputs, output: Tensor) -> Tensor:
        decoded = len(inputs) > 1 and isinstance(inputs[1], Cached)  # or a prompt from its beginning
        return output + self.vector if decoded else output
