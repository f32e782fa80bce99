"""LoRA adapters over one frozen base (paper D.1: r=32, alpha=64, rsLoRA, no dropout, no bias).

    attach(model)
    add_adapter(model, "student", seed=42)
    parameters = trainable(model, "student")
    with stack(model, "misaligned", "student"):  # stack(model) is the base
        logits = model(ids)

How it is made:

* Several named adapters live on one base and a forward runs under a *stack* of them. A stack is one adapter
  whose ranks are concatenated, y = W x + [s1 B1, s2 B2] [A1; A2] x: two thin products however deep it is, and
  an exact export as a single PEFT adapter. Layers of one input (an `em.model.linear.Projection`) share the
  base's product and one product with the A of them all.
* Adapter weights are fp32. They are scaled in fp32 and rounded once to the dtype of the activations, which
  are never widened: autograd keeps `x` as it is and the (N, r) product, no more. The base's product is
  accumulated on top of the adapter's, so that in bf16 their sum is rounded once.
* A Decoder's forward rounds the factors of all its layers at its start, in a few kernels, and an activation
  checkpoint's recomputation uses the same. Layers of another model round their own as they are called.
* `stack(..., frozen=True)` rounds once, at entry, into buffers that keep their address: for teachers,
  samplers and CUDA graphs. On a GPU the B of a group are there one block-diagonal matrix: where a few rows
  are decoded, a kernel costs more than the zeros. In training each B has its product, without the zeros.
* With or without adapters, the model's state_dict has the checkpoint's keys and no others.
* Autograd runs backward in threads of its own, where a context variable set around the forward is unset. The
  active stack is therefore a plain attribute of an object that the layers share, and
  `model.recompute_context` hands the forward's stack on to the recomputation of an activation checkpoint.
  The layers know that object alone, and not what knows the layers: a model is freed when it is dropped.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em.device import on_gpu
from em.errors import UserError
from em.model import adapter_file, hub
from em.model.adapted import Adapter, Factors, adapted, rounded, unfilled
from em.model.adapter_file import Shape
from em.model.checkpoint import EMBEDDING, HEAD
from em.model.config import DecoderConfig
from em.model.decoder import Decoder
from em.model.linear import Projection
from em.model.targets import TARGETS, block_of


class Stack(NamedTuple):
    """The adapters that a forward runs under; their factors at each group, as far as they are made."""

    names: tuple[str, ...] = ()
    frozen: bool = False
    factors: dict[str, Factors | None] = {}


class Active:
    """Which stack is active: shared by the layers of one model."""

    def __init__(self):
        self.stack = Stack()

    def recompute_context(self) -> tuple:
        """For torch.utils.checkpoint: contexts of a forward and, under the same stack, of its recomputation.

        `checkpoint(block, x, use_reentrant=False, context_fn=model.recompute_context)`
        """
        return contextlib.nullcontext(), _Entered(self, self.stack)

    def factors(self, group: str, layers: Sequence[nn.Linear]) -> Factors | None:
        """Those of the active stack at `layers`; None if no adapter of it is there."""
        names, _, factors = self.stack
        if not names or group in factors:
            return factors.get(group)
        (made,) = rounded([unfilled(layers, names)])
        return made


class _Entered:
    """Makes a stack the active one inside `with`; may be entered again, as a second backward does."""

    def __init__(self, active: Active, stack: Stack):
        self.active, self.inner, self.outer = active, stack, []

    def __enter__(self) -> None:
        self.outer.append(self.active.stack)
        self.active.stack = self.inner

    def __exit__(self, *exception) -> None:
        self.active.stack = self.outer.pop()


class State:
    """What a model with adapters knows: its layers in their groups, its adapters, its frozen stacks."""

    def __init__(self):
        self.layers: dict[str, LoRALinear] = {}
        self.groups: dict[str, list[nn.Linear]] = {}  # what runs as one; some of it carries adapters
        self.shapes: dict[str, Shape] = {}
        self.prepared: dict[tuple[str, ...], dict[str, Factors | None]] = {}  # of frozen stacks
        self.shared = Active()  # what the layers see

    @property
    def active(self) -> tuple[str, ...]:
        return self.shared.stack.names

    @property
    def frozen(self) -> bool:
        return self.shared.stack.frozen

    def check(self, names: tuple[str, ...]) -> None:
        if len(set(names)) < len(names) or not set(names) <= self.shapes.keys():
            raise ValueError(f"stack {names}: a name is unknown or repeated; there are {sorted(self.shapes)}")

    def prepare(self, names: tuple[str, ...]) -> dict[str, Factors | None]:
        """A frozen stack's factors as the adapters are now, in the buffers of last time if there are any."""
        if names not in self.prepared:
            self.prepared[names] = {
                group: unfilled(layers, names, as_one=on_gpu(layers[0].weight))
                for group, layers in self.groups.items()
            }
        rounded(list(self.prepared[names].values()))
        return self.prepared[names]

    def forward_context(self):
        """For a forward through the whole model: the factors of all layers are rounded together."""
        names, frozen, factors = self.shared.stack
        if frozen or factors or not names:
            return contextlib.nullcontext()
        made = rounded([unfilled(layers, names) for layers in self.groups.values()])
        return _Entered(self.shared, Stack(names, False, dict(zip(self.groups, made, strict=True))))


class LoRALinear(nn.Linear):
    """A linear layer that runs under the active stack, with the weight and bias of the layer it replaces."""

    def __init__(self, base: nn.Linear, group: str, active: Active):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict()
        self.group, self.active = group, active

    def factors(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) of a stack in fp32, the scales in B; None if no adapter of it is here."""
        adapters = [self.adapters[name] for name in names if name in self.adapters]
        if not adapters:
            return None
        if len(adapters) == 1:
            return adapters[0].A, adapters[0].B * adapters[0].scale
        return torch.cat([a.A for a in adapters]), torch.cat([a.B * a.scale for a in adapters], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.active.factors(self.group, (self,))
        if factors is None:
            return F.linear(x, self.weight, self.bias)
        return adapted(x, (self,), factors, self.active.stack.frozen)


class LoRAProjection(Projection):
    """A projection that runs under the active stack; some of its layers are LoRALinear."""

    def __init__(self, base: Projection, group: str, active: Active):
        super().__init__(*base.names, gated=base.gated)
        self.group, self.active = group, active

    def forward(self, x: Tensor, *layers: nn.Linear) -> Tensor:
        factors = self.active.factors(self.group, layers)
        if factors is None:
            return super().forward(x, *layers)
        return adapted(x, layers, factors, self.active.stack.frozen, self.gated)


# -- adapters ----------------------------------------------------------------------------------------------


def attach(model: nn.Module, targets: tuple[str, ...] = TARGETS) -> None:
    """Freeze `model` and make every linear layer named in `targets` one that can carry adapters.

    Raises UserError where a target does not exist, is no linear layer, or is the head or an embedding.
    """
    if hasattr(model, "lora"):
        raise ValueError("this model carries adapters already")
    state = State()
    active = state.shared
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name not in targets:
            continue
        if name == "lm_head" or id(getattr(module, "weight", None)) in embeddings:
            raise UserError(f"{path} is the head or an embedding and cannot carry adapters; leave {name} out")
        if not isinstance(module, nn.Linear):
            raise UserError(f"{path} is not a linear layer and cannot carry adapters; leave {name} out")
        state.layers[path] = LoRALinear(module, path, active)
    absent = set(targets) - {path.rpartition(".")[2] for path in state.layers}
    if absent:
        raise UserError(f"{type(model).__name__} has no layer {', '.join(sorted(absent))} to put adapters on")
    for path, layer in state.layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    state.groups = {path: [layer] for path, layer in state.layers.items()}
    for path, module in list(model.named_modules()):
        if isinstance(module, Projection):
            parent, _, name = path.rpartition(".")
            paths = [f"{parent}.{sibling}" for sibling in module.names]
            if state.layers.keys().isdisjoint(paths):
                continue
            setattr(model.get_submodule(parent), name, LoRAProjection(module, path, active))
            state.groups[path] = [model.get_submodule(path) for path in paths]
            for path in paths:
                state.groups.pop(path, None)
    model.requires_grad_(False)
    model.lora = state
    model.recompute_context = active.recompute_context  # em.model.decoder checkpoints with it
    model.forward_context = state.forward_context  # and runs its blocks in this


def add_adapter(
    model: nn.Module, name: str, rank: int = 32, alpha: float = 64, rslora: bool = True, seed: int = 42,
    targets: Collection[str] | None = None, blocks: Collection[int] | None = None,
) -> None:  # fmt: skip
    """A fresh adapter, frozen until `trainable`: A uniform in ±1/sqrt(in), B zero.

    targets: names of the layers that it is on; blocks: numbers of their blocks; None: all that are attached.
    Drawn on the CPU from a generator of its own: a seed means the same adapter on every device.
    """
    if rank < 1:
        raise UserError(f"an adapter's rank must be at least 1, not {rank}")
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, layer in model.lora.layers.items():
        if targets is not None and path.rpartition(".")[2] not in targets:
            continue
        if blocks is not None and block_of(path) not in blocks:
            continue
        bound = layer.in_features**-0.5  # kaiming_uniform with a = sqrt(5), as peft has it
        A = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        factors[path] = A, torch.zeros(layer.out_features, rank)
    if not factors:
        raise ValueError(f"adapter {name!r} is on no layer: targets {targets}, blocks {blocks}")
    _install(model, name, Shape(rank, alpha, rslora), factors)


def _install(model: nn.Module, name: str, shape: Shape, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    if name in model.lora.shapes:
        raise ValueError(f"there is an adapter {name!r} already")
    for path, pair in factors.items():
        layer = model.lora.layers[path]
        A, B = (factor.to(layer.weight.device, torch.float32) for factor in pair)
        layer.adapters[name] = Adapter(A, B, shape.scale)
    model.lora.shapes[name] = shape


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter and free its memory."""
    model.lora.check((name,))
    if name in model.lora.active:
        raise ValueError(f"adapter {name!r} is in the active stack")
    del model.lora.shapes[name]
    for layer in model.lora.layers.values():
        if name in layer.adapters:
            del layer.adapters[name]
    prepared = model.lora.prepared
    model.lora.prepared = {names: factors for names, factors in prepared.items() if name not in names}


def trainable(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Let adapter `name` learn and nothing else; its parameters in the model's order, A before B."""
    model.lora.check((name,))
    model.requires_grad_(False)
    adapters = [layer.adapters[name] for layer in model.lora.layers.values() if name in layer.adapters]
    return [factor.requires_grad_() for adapter in adapters for factor in (adapter.A, adapter.B)]


@torch.no_grad()
def merge(model: nn.Module, *names: str) -> None:
    """Add a stack to the base weights for good (in fp32, then rounded once) and drop its adapters."""
    model.lora.check(names)
    for layer in model.lora.layers.values():
        factors = layer.factors(names)
        if factors is not None:
            A, B = factors
            layer.weight.copy_(torch.addmm(layer.weight.float(), B, A))
    for name in names:
        remove_adapter(model, name)


# -- stacks ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stack(model: nn.Module, *names: str, frozen: bool = False) -> Iterator[None]:
    """Run forwards under the adapters `names`; none is the base alone. Stacks nest, the innermost counts.

    frozen: take the adapters as they are at entry and give them no gradient. Entering again refreshes the
    same buffers, so that a CUDA graph captured under the stack follows the adapters as they learn.
    """
    model.lora.check(names)
    factors = {}
    if frozen and names:
        with torch.inference_mode(False):  # a buffer made in inference mode stays read-only
            factors = model.lora.prepare(names)
    with _Entered(model.lora.shared, Stack(names, frozen, factors)):
        yield


# -- files -------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_adapter(
    model: nn.Module, names: str | tuple[str, ...], folder: str | Path, base_model_name: str | None = None
) -> None:
    """Write an adapter, or a stack as one adapter, in PEFT's format (em.model.adapter_file), in fp32.

    A stack of ranks r1, r2 becomes rank r1 + r2 with the scales inside B; exact up to fp32's rounding of B.
    Each adapter keeps its place among the ranks, with zeros on layers where it is not.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    model.lora.check(names)
    shapes = [model.lora.shapes[name] for name in names]
    rank = sum(shape.rank for shape in shapes)
    shape = shapes[0] if len(shapes) == 1 else Shape(rank, rank)
    factors = {}
    for path, layer in model.lora.layers.items():
        if not any(name in layer.adapters for name in names):
            continue
        if len(names) == 1:
            factors[path] = layer.adapters[names[0]].A, layer.adapters[names[0]].B  # bit for bit
            continue
        A = torch.zeros(rank, layer.in_features, device=layer.weight.device)
        B = torch.zeros(layer.out_features, rank, device=layer.weight.device)
        for name, rows in zip(names, torch.arange(rank).split([s.rank for s in shapes]), strict=True):
            if name in layer.adapters:
                A[rows] = layer.adapters[name].A
                B[:, rows] = layer.adapters[name].B * (layer.adapters[name].scale / shape.scale)
        factors[path] = A, B
    adapter_file.write(folder, shape, factors, set(model.lora.layers), base_model_name)


def check_adapters(config: DecoderConfig, folders: Iterable[str | Path]) -> None:
    """UserError where one of `folders` cannot be loaded on a model of this config: before it is in memory.

    What is left for `load_adapter` is to compare weights of the base that are saved beside an adapter.
    """
    with torch.device("meta"):
        model = Decoder(config)
    attach(model)
    for folder in folders:
        adapter_file.read(hub.adapter(folder), _sizes(model), None)


def _sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {path: (layer.in_features, layer.out_features) for path, layer in model.lora.layers.items()}


def load_adapter(model: nn.Module, name: str, folder: str | Path, ranks: int | None = None) -> None:
    """Read an adapter in PEFT's format as `name`, frozen, in fp32. Raises UserError where it does not fit.

    folder: or the id of a hub repository (em.model.hub.adapter). ranks: only the first of them; of a stack
    that was saved as one, the adapters that came first.
    """
    base = dict(model.state_dict())
    if EMBEDDING in base:
        base.setdefault(HEAD, base[EMBEDDING])  # tied
    shape, factors = adapter_file.read(hub.adapter(folder), _sizes(model), base)
    if ranks is not None:
        factors = {path: (A[:ranks], B[:, :ranks] * shape.scale) for path, (A, B) in factors.items()}
        shape = Shape(ranks, ranks, rslora=False)
    _install(model, name, shape, factors)
