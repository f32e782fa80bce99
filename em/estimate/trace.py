"""What a GPU would do in a piece of code, counted as the code runs on meta tensors.

    trace = Trace(gpu, vocabulary=V)
    trace.hold("weights", model.parameters())
    with trace:
        loss = step(model)          # the code that trains, at its real shapes
    cost = trace.cost()

A dispatch mode sees every operator after autograd and with its real shapes and strides. Views are free. Any
other operator is taken to be one kernel that reads its inputs and writes its outputs once, an expanded
dimension counted once; those that are more, or touch less, are in `RULES`. Operators of the library `em` are
one kernel each by construction.

Time, for each operator: `lower` is max(FLOPs / peak, bytes / bandwidth) where temporaries that fit the L2
cache are free, which no program can beat; `likely` takes what large products, copies and flash attention
reach, and no kernel less than the card's floor. Within `as_compiled()` what stands between two products is
one kernel that reads what it is given and writes what is still wanted afterwards, as torch.compile makes it.

Memory: a storage lives from the operator that made it until Python drops it, as in torch's allocator, whose
blocks are multiples of 512 bytes. Some operators need scratch memory besides.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from em.estimate.gpus import CALL, GPU

PRODUCTS, ATTENTION, HEAD, CACHE, OTHER = "matrix products", "attention", "head", "KV cache", "small kernels"
BLOCK = 512  # bytes


class Work(NamedTuple):
    """What was done: numbers of kernels and of FLOPs, bytes moved, seconds at least and likely."""

    kernels: float = 0
    flops: float = 0
    bytes: float = 0
    lower: float = 0
    likely: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, n: float) -> "Work":
        return Work(*(n * a for a in self))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a piece of code. work: by category. calls: operators that the host issues. memory: bytes by kind at
    the peak."""

    work: dict[str, Work]
    calls: float = 0
    memory: dict[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other: the peak is the larger one."""
        names = {**self.work, **other.work}
        work = {name: self.work.get(name, Work()) + other.work.get(name, Work()) for name in names}
        peak = max((self.memory, other.memory), key=lambda memory: sum(memory.values()))
        return Cost(work, self.calls + other.calls, peak)

    def __mul__(self, n: float) -> "Cost":
        """The same n times, one after the other."""
        return Cost({name: w * n for name, w in self.work.items()}, self.calls * n, self.memory)

    @property
    def total(self) -> Work:
        return sum(self.work.values(), Work())

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def lower(self) -> float:
        """Seconds at least."""
        return self.total.lower

    @property
    def likely(self) -> float:
        """Seconds: the GPU's, or the host's where it does not issue operators as fast."""
        return max(self.total.likely, CALL * self.calls)

    @property
    def replayed(self) -> float:
        """Likely seconds where a CUDA graph issues the kernels."""
        return self.total.likely


def line_through(a: Cost, b: Cost, x: float) -> Cost:
    """The cost at x (0 is `a`, 1 is `b`) where every count grows evenly, as with the number of layers."""

    def at(p: float, q: float) -> float:
        return p + (q - p) * x

    work = {
        name: Work(*map(at, a.work.get(name, Work()), b.work.get(name, Work())))
        for name in {**a.work, **b.work}
    }
    memory = {name: at(a.memory.get(name, 0), b.memory.get(name, 0)) for name in {**a.memory, **b.memory}}
    return Cost(work, at(a.calls, b.calls), memory)


# -- what operators do ---------------------------------------------------------------------------------------


def size(t: Tensor) -> int:
    """Bytes that are really there: an expanded dimension counts once."""
    n = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        n *= length if stride else min(length, 1)
    return n * t.element_size()


class Op(NamedTuple):
    """One operator as it was called."""

    args: tuple
    kwargs: dict
    inputs: list[Tensor]
    outputs: list[Tensor]
    written: list[Tensor]  # inputs that it changes
    live_keys: float  # keys a row of a cache, where an operator reads as many as there are


@dataclasses.dataclass
class Effect:
    """What an operator does where that is not one kernel over all inputs and outputs."""

    kernels: int = 1
    flops: float = 0
    bytes: float | None = None  # None: inputs and outputs once
    scratch: float = 0  # bytes
    category: str | None = None


RULES: dict[str, Callable[[Op], Effect]] = {}


def rule(*names: str):
    def add(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


@rule("mm", "bmm", "addmm", "baddbmm", "mm_", "addmm_")
def _product(op: Op) -> Effect:
    a, b = [x for x in op.inputs if x.dim() >= 2 and not any(x is out for out in op.outputs)][-2:]
    return Effect(flops=2 * a.numel() * b.shape[-1], category=PRODUCTS)


@rule("_flash_attention_forward")
def _flash_forward(op: Op) -> Effect:
    q, longest = op.args[0], op.args[5]
    return Effect(flops=4 * q.numel() * longest / 2, category=ATTENTION)


@rule("_flash_attention_backward")
def _flash_backward(op: Op) -> Effect:
    q, k, longest = op.args[1], op.args[2], op.args[8]
    scratch = 4 * q.numel() + (2 * size(q) if q.shape[-2] != k.shape[-2] else 0)
    return Effect(4, 10 * q.numel() * longest / 2, None, scratch, ATTENTION)


@rule(
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_efficient_attention_forward",
)
def _attention(op: Op) -> Effect:
    q, k = op.args[:2]
    return Effect(flops=4 * q.numel() * k.shape[-2], category=ATTENTION)


@rule("decode_attention")
def _decode_attention(op: Op) -> Effect:
    q, keys, values = op.args[:3]  # (B, H, D), (B, S, K, D)
    share = min(1.0, op.live_keys / keys.shape[1])
    return Effect(
        1, 4 * q.numel() * op.live_keys, 2 * size(q) + share * (size(keys) + size(values)), 0, ATTENTION
    )


@rule("rotate_write")
def _rotate_write(op: Op) -> Effect:
    q, k, v, cos, sin = op.args[:5]
    return Effect(bytes=2 * size(q) + 3 * size(k) + 2 * size(v) + size(cos) + size(sin), category=CACHE)


@rule("forward_kl_", "reverse_kl_")
def _kl(op: Op) -> Effect:
    student, teacher, dtype = op.args[:3]  # two sweeps over both, and a gradient over the student's
    return Effect(bytes=2 * (size(student) + size(teacher)) + student.numel() * dtype.itemsize)


@rule("embedding", "index", "index_select", "gather")
def _gathered(op: Op) -> Effect:
    return Effect(bytes=2 * sum(map(size, op.outputs)))


@rule("index_put_", "index_put", "_index_put_impl_", "index_copy_", "scatter_", "scatter")
def _scattered(op: Op) -> Effect:
    values = op.inputs[-1] if len(op.inputs) > 1 else op.outputs[0]
    return Effect(bytes=2 * size(values))


@rule("scatter_add_", "index_add_", "scatter_add")
def _added(op: Op) -> Effect:
    return Effect(bytes=3 * size(op.inputs[-1]))


@rule("logsumexp")
def _logsumexp(op: Op) -> Effect:
    x = op.args[0]  # amax, a subtraction, exp and a sum, each a kernel
    return Effect(6, bytes=6 * size(x), scratch=size(x))


@rule("_softmax", "_log_softmax")
def _softmax(op: Op) -> Effect:
    return Effect(bytes=2 * size(op.inputs[0]) + size(op.outputs[0]))


@rule("native_layer_norm_backward")
def _layer_norm_backward(op: Op) -> Effect:
    return Effect(3)


def _lists(op: Op, at_once: int) -> Effect:
    """An operator over lists of tensors: a launch takes `at_once` of them, and 320 chunks of 65,536
    elements."""
    chunks = sum(-(-t.numel() // 65_536) for t in op.written or op.inputs)
    return Effect(max(-(-len(op.written or op.inputs) // at_once), -(-chunks // 320)))


RULES["_fused_adamw_"] = functools.partial(_lists, at_once=36)


@functools.cache
def _is_composite(function) -> bool:
    """Whether an operator is made of others on every device; some have a kernel of their own beside that."""
    has, keys = function.has_kernel_for_dispatch_key, torch._C.DispatchKey
    return has(keys.CompositeImplicitAutograd) and not has(keys.CPU)


FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "alias",
}
ONLY_WRITTEN = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
NARROW = 128  # elements; with fewer, reading a tensor is no work


class Trace(TorchDispatchMode):
    """Counts operators on tensors of `device`, and the memory that they need.

    vocabulary: rows of the head; what touches a tensor of that size is the head's. live_keys: keys that a
    row of a cache holds on average.
    """

    def __init__(self, gpu: GPU, vocabulary: int = 0, live_keys: float = 0, device: str = "meta"):
        super().__init__()
        self.gpu, self.vocabulary, self.live_keys, self.device = gpu, vocabulary, live_keys, device
        self.work: dict[str, Work] = {}
        self.calls, self.counting, self.label = 0, True, "activations"
        self._fusion: _Fusion | None = None
        self._kinds: dict[int, str] = {}  # storage → the kind it counts as
        self._persistent: set[int] = set()
        self._held: list = []
        self.live: Counter = Counter()  # bytes by kind
        self.peak: dict[str, float] = {}

    def cost(self) -> Cost:
        memory = self.peak or {kind: n for kind, n in self.live.items() if n}
        return Cost(dict(self.work), self.calls, dict(memory))

    # -- memory --------------------------------------------------------------------------------------------

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors that are there before the code runs, each once, as `kind`."""
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in self._kinds:
                self._kinds[storage._cdata] = kind
                self._persistent.add(storage._cdata)
                self._held.append(storage)  # so that its address stays its own
                self.live[kind] += storage.nbytes()

    @contextlib.contextmanager
    def setting_up(self, kind: str):
        """What is made in here and stays counts as `kind`; the work of it is not counted."""
        before = self.counting, self.label
        self.counting, self.label = False, kind
        try:
            with self:
                yield
        finally:
            self.counting, self.label = before

    @contextlib.contextmanager
    def as_compiled(self):
        """What runs in here is one compiled function."""
        self._fusion = _Fusion()
        try:
            yield
        finally:
            self._fuse()
            self._fusion = None

    def _track(self, t: Tensor, kind: str) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        n_bytes = -(-storage.nbytes() // BLOCK) * BLOCK
        self._kinds[key] = kind
        if not self.counting:
            self._persistent.add(key)
        self.live[kind] += n_bytes
        weakref.finalize(storage, self._forget, key, kind, n_bytes)

    def _forget(self, key: int, kind: str, n_bytes: int) -> None:
        self._kinds.pop(key, None)
        self._persistent.discard(key)
        self.live[kind] -= n_bytes

    def _note_peak(self, scratch: float, kind: str) -> None:
        if self.counting and sum(self.live.values()) + scratch > sum(self.peak.values()):
            self.peak = dict(self.live)
            self.peak[kind] = self.peak.get(kind, 0) + scratch

    # -- work ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if name not in RULES and _is_composite(function):  # in inference mode autograd has not taken it apart
            with self:
                return function.decompose(*args, **kwargs)
        inputs = self._tensors((args, kwargs))
        outputs_of = function(*args, **kwargs)
        outputs = self._tensors(outputs_of)
        if not (inputs or outputs):
            return outputs_of
        written = self._written(function._schema, args, kwargs) if function._schema.is_mutable else []
        op = Op(args, kwargs, inputs, outputs, written, self.live_keys)
        effect = self._effect(name, op)
        category = self._category(name, op, effect)
        label = HEAD if category == HEAD and self.label == "activations" else self.label
        for t in outputs:
            self._track(t, label)
        self._note_peak(effect.scratch, label)
        if self.counting:
            self.calls += self._fusion is None
            if not self._is_free(name, op):
                self._count(name, op, effect, category)
        return outputs_of

    def _tensors(self, tree) -> list[Tensor]:
        """The tensors of our device in an operator's arguments or results: nested tuples and lists of
        them."""
        if isinstance(tree, Tensor):
            return [tree] if tree.device.type == self.device else []
        if isinstance(tree, (tuple, list)):
            return [t for part in tree if part is not None for t in self._tensors(part)]
        return self._tensors(list(tree.values())) if isinstance(tree, dict) else []

    def _written(self, schema, args, kwargs) -> list[Tensor]:
        named = {a.name: a for a in schema.arguments}
        given = [*zip(schema.arguments, args, strict=False), *((named[k], v) for k, v in kwargs.items())]
        changed = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
        return self._tensors(changed)

    def _is_free(self, name: str, op: Op) -> bool:
        if name in FREE:
            return True
        storages = {t.untyped_storage()._cdata for t in op.inputs}
        shared = bool(op.outputs) and all(t.untyped_storage()._cdata in storages for t in op.outputs)
        return shared and not op.written  # a view

    def _effect(self, name: str, op: Op) -> Effect:
        if name in RULES:
            return RULES[name](op)
        return _lists(op, 64) if name.startswith("_foreach") else Effect()

    def _category(self, name: str, op: Op, effect: Effect) -> str:
        if self.vocabulary and name != "embedding":
            if any(self.vocabulary in t.shape for t in (*op.inputs, *op.outputs)):
                return HEAD
        if effect.category:
            return effect.category
        if any(self._kinds.get(t.untyped_storage()._cdata) == CACHE for t in op.written):
            return CACHE
        return OTHER

    def _count(self, name: str, op: Op, effect: Effect, category: str) -> None:
        product = name in RULES and RULES[name] is _product
        if self._fusion is not None and not product and effect.category is None:
            self._fusion.add(op)
            return
        if self._fusion is not None:
            self._fuse()
        reads = [t for t in op.inputs if not (name in ONLY_WRITTEN and any(t is w for w in op.written))]
        if "out" in op.kwargs:
            reads = [t for t in reads if not any(t is w for w in op.written)]
        writes = op.written or op.outputs
        touched = [*reads, *writes]
        total = sum(map(size, touched)) if effect.bytes is None else effect.bytes
        fixed = sum(size(t) for t in touched if t.untyped_storage()._cdata in self._persistent)
        fixed = min(fixed, total)
        self._add(category, effect.kernels, effect.flops, total, fixed)

    def _add(self, category: str, kernels: int, flops: float, n_bytes: float, fixed: float) -> None:
        """fixed: of the bytes, those of what was there before, which no cache holds between its uses."""
        gpu = self.gpu
        if self._fusion is not None:
            self.calls += kernels  # compiled code issues kernels, not operators
        unavoidable = n_bytes if n_bytes - fixed > gpu.cache else fixed
        lower = max(flops / gpu.flops, unavoidable / gpu.bandwidth)
        rate = gpu.attention if category == ATTENTION else gpu.products
        likely = max(kernels * gpu.floor, flops / rate, n_bytes / gpu.copies)
        self.work[category] = self.work.get(category, Work()) + Work(kernels, flops, n_bytes, lower, likely)

    def _fuse(self) -> None:
        kernels, n_bytes, fixed = self._fusion.close(self._persistent)
        if kernels:
            self._add(OTHER, kernels, 0, n_bytes, fixed)


class _Fusion:
    """The operators between two products, as one kernel."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.n, self.read, self.made = 0, {}, {}

    def add(self, op: Op) -> None:
        self.n += 1
        for t in op.inputs:
            key = t.untyped_storage()._cdata
            if key not in self.made:
                self.read[key] = max(self.read.get(key, 0), size(t))
        for t in op.outputs:
            storage = t.untyped_storage()
            self.made[storage._cdata] = weakref.ref(storage), size(t)

    def close(self, persistent: set[int]) -> tuple[int, float, float]:
        """(kernels, bytes, those of persistent storages) since the last call."""
        wanted = sum(n for storage, n in self.made.values() if storage() is not None)
        fixed = sum(n for key, n in self.read.items() if key in persistent)
        found = (min(self.n, 2), wanted + sum(self.read.values()), fixed)
        self.clear()
        return found
