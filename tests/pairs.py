"""A student and its teacher in miniature, of both kinds, and what float64 says of them."""

import copy

import torch
from tiny_models import perturb
from torch.func import functional_call

from em.distillation.pair import ChatPair, WorldPair
from em.model import lora
from em.model.decoder import Decoder, DecoderConfig
from em.model.gpt2 import GPT2, GPT2Config
from em.model.tokenizer import Example

VOCABULARY = 50
RANKS = {"start": 3, "teacher": 4, "student": 5}
ALPHA = 7.0
END = 7
# Ragged: prompts of 1 to 6 tokens, answers of 1 to 8.
EXAMPLES = [
    Example(torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist(), n_prompt)
    for n, n_prompt in ((9, 1), (5, 4), (14, 6), (3, 2), (11, 5))
]
CHAT = dict(
    model_type="qwen2", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=32,
    tie_word_embeddings=False,
)  # fmt: skip
STACKS = {
    "adapters": (("student",), ("teacher",)),
    "adapters, from a start": (("start", "student"), ("teacher",)),
    "adapters, realigning": (("start", "student"), ()),
}


def chat_pair(student=("student",), teacher=("teacher",)) -> ChatPair:
    """Every adapter has a rank and values of its own."""
    model = Decoder(DecoderConfig.from_hf(CHAT)).eval()
    perturb(model)
    lora.attach(model)
    for seed, (name, rank) in enumerate(RANKS.items()):
        lora.add_adapter(model, name, rank, ALPHA, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.lora.layers.values():
                B = layer.adapters[name].B
                B.copy_(0.1 * torch.randn(B.shape, generator=generator))
    return ChatPair(model, student, teacher, (END,), 8, rows=4)


def gpt2(seed: int, vocabulary: int = VOCABULARY, width: int = 32) -> GPT2:
    model = GPT2(GPT2Config(vocabulary, n_positions=24, n_layer=2, n_head=2, n_embd=width)).eval()
    perturb(model, seed)
    return model


def world_pair() -> WorldPair:
    """Student and teacher a short way from where both come from."""
    base, models = gpt2(0), []
    for seed in (1, 2):
        models.append(gpt2(seed))
        with torch.no_grad():
            for p, q in zip(models[-1].parameters(), base.parameters(), strict=True):
                p.mul_(0.3).add_(0.7 * q)
    return WorldPair(*models, base, END, max_new_tokens=8)


PAIRS = {name: (chat_pair, stacks) for name, stacks in STACKS.items()} | {"world": (world_pair, ())}


def make_pair(kind: str) -> ChatPair | WorldPair:
    make, arguments = PAIRS[kind]
    return make(*arguments)


class Oracle:
    """The models of a pair in float64: full logits, an example at a time, adapters added to the weights.

    leaves: the student's parameters, in the pair's order.
    """

    def __init__(self, pair: ChatPair | WorldPair):
        self.pair = pair
        self.leaves = [p.detach().double().requires_grad_() for p in pair.parameters]

    def log_softmax(self, who: str, examples: list[Example]) -> torch.Tensor:
        """(N, VOCABULARY), differentiable to the leaves where `who` is the student."""
        model, weights = self._model(who)
        rows = []
        for ids, n_prompt, _ in examples:
            logits = functional_call(model, weights, (torch.tensor([ids[:-1]]),))[0]  # (T, V)
            rows.append(logits[n_prompt - 1 :, :VOCABULARY].double().log_softmax(-1))
        return torch.cat(rows)

    def _model(self, who: str) -> tuple[torch.nn.Module, dict]:
        if isinstance(self.pair, WorldPair):
            model = copy.deepcopy(self.pair.models[who]).double()
            weights = {name: p.detach() for name, p in model.named_parameters()}
            return model, dict(zip(weights, self.leaves, strict=True)) if who == "student" else weights
        theirs = self.pair.model
        weights = {name: tensor.double() for name, tensor in theirs.state_dict().items()}
        leaves = dict(zip(map(id, self.pair.parameters), self.leaves, strict=True))
        for path, layer in theirs.lora.layers.items():
            for name in self.pair.stacks[who]:
                adapter = layer.adapters[name]
                A, B = (leaves.get(id(p), p.detach().double()) for p in (adapter.A, adapter.B))
                key = f"{path}.weight"
                weights[key] = weights[key] + ALPHA / RANKS[name] ** 0.5 * B @ A
        return Decoder(theirs.config).double(), weights


def targets_of(examples: list[Example]) -> torch.Tensor:
    return torch.tensor([token for ids, n_prompt, _ in examples for token in ids[n_prompt:]])


def gradients(loss: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    """All of them as one vector."""
    parts = torch.autograd.grad(loss, parameters)
    return torch.cat([part.flatten() for part in parts])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far, as a share of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
