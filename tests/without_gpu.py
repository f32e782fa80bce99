"""A GPU's path without a GPU: tensors that have a device and no values, and a watch on what they are put to.

`fake_cuda()` makes tensors on `cuda`, for inference. Autograd asks the CUDA runtime for its streams, so a
training step runs on `meta`, whose tensors take the GPU's path as well (em.device). Both have shapes alone:
what would read a value raises. All that stands for the CUDA runtime is here.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from em.model import lora, rope
from em.model.decoder import Decoder, DecoderConfig
from em.model.gpt2 import GPT2, GPT2Config

aten = torch.ops.aten

# -- models ------------------------------------------------------------------------------------------------

CHAT = dict(
    vocab_size=1000, hidden_size=512, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2,
    head_dim=128, rms_norm_eps=1e-6, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
CHATS = ("llama", "qwen2", "qwen3", "olmo3")
FAMILIES = (*CHATS, "gpt2")


def model_of(family: str, n_layers: int = 2, adapters: tuple[str, ...] = ()):
    """On `meta`: GPT-2 in fp32, or a chat model in bf16, frozen, with `adapters` of rank 32."""
    with torch.device("meta"):
        if family == "gpt2":
            return GPT2(GPT2Config(514, n_layer=n_layers)).eval()
        kinds = {"layer_types": ["sliding_attention", "full_attention"] * (n_layers // 2)}
        config = (
            CHAT | dict(model_type=family, num_hidden_layers=n_layers) | (kinds if family == "olmo3" else {})
        )
        model = Decoder(DecoderConfig.from_hf(config)).to(torch.bfloat16).eval()
        lora.attach(model)
        for name in adapters:
            lora.add_adapter(model, name)
    return model


# -- fake CUDA tensors -------------------------------------------------------------------------------------


def _viewed(x, index) -> tuple[torch.Tensor, list]:
    """x[index] up to the tensors of index, which come second, one for each dimension or None."""
    index = index if isinstance(index, tuple) else (index,)
    missing = x.dim() - sum(i is not None and i is not Ellipsis for i in index)
    tensors: list[torch.Tensor | None] = []
    for i in index:
        dim = len(tensors)
        if i is Ellipsis:
            tensors += [None] * missing
        elif i is None:
            x = aten.unsqueeze(x, dim)
            tensors.append(None)
        elif isinstance(i, slice):
            x = aten.slice(x, dim, i.start, i.stop, i.step or 1)
            tensors.append(None)
        elif isinstance(i, torch.Tensor):
            tensors.append(i)
        else:
            x = aten.select(x, dim, i)
    return x, tensors


def _get(x, index):
    x, tensors = _viewed(x, index)
    return x if all(i is None for i in tensors) else aten.index(x, tensors)


def _set(x, index, value):
    x, tensors = _viewed(x, index)
    if not isinstance(value, torch.Tensor):
        value = aten.scalar_tensor(value, dtype=x.dtype, device=x.device)
    if all(i is None for i in tensors):
        aten.copy_(x, value)
    else:
        aten.index_put_(x, tensors, value)


def _pinned(x):
    x = x.clone()
    x.pinned = True  # for `Watch`
    return x


class _NoRuntime(TorchFunctionMode):
    """As operators, the methods that a torch without CUDA refuses to CUDA tensors, fake or not."""

    OPERATORS = {
        torch.Tensor.__getitem__: _get,
        torch.Tensor.__setitem__: _set,
        torch.Tensor.__invert__: aten.bitwise_not,
        torch.Tensor.copy_: aten.copy_,
        torch.Tensor.pin_memory: _pinned,
        torch.Tensor.split: aten.split,  # with a size or with sizes
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.OPERATORS.get(function, function)(*args, **(kwargs or {}))


class _RealHost(TorchDispatchMode):
    """What is on the CPU keeps its values; `mode` alone would make it fake before it is on the device."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fake = [isinstance(x, FakeTensor) for x in given]
        if not any(fake) and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return function(*args, **kwargs | ({"pin_memory": False} if "pin_memory" in kwargs else {}))
        if not all(fake):
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        return function(*args, **kwargs)

    def _faked(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.mode.from_tensor(x)


@contextlib.contextmanager
def fake_cuda(model):
    """`model`, from `meta`, on `cuda`. Inside, without gradients, all that is made there is fake."""
    runtime = {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda: True,
        "torch.cuda.Event": mock.Mock,
    }
    with contextlib.ExitStack() as stack:
        rope._frequencies.cache_clear()  # real ones may be there, and fake ones must not stay
        stack.callback(rope._frequencies.cache_clear)
        for name, stub in runtime.items():
            stack.enter_context(mock.patch(name, stub))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_RealHost(stack.enter_context(FakeTensorMode())))
        stack.enter_context(_NoRuntime())
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        if isinstance(model, Decoder):
            model._join()
        yield model


# -- what a GPU is asked to do -----------------------------------------------------------------------------

FREE = {"detach", "lift_fresh", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
KERNELS = {"draw": 2, "_flash_attention_backward": 4}  # every other operator that is no view has one
WHOLE = {"scaled_dot_product_attention"}  # not taken apart into the operators that it is made of
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """What the device, `cuda` or `meta`, is asked to do.

    operators: name → calls, views left out. waits: operators for which the host waits for the device.
    mixed: operators with operands in both memories.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.operators: Counter[str] = Counter()
        self.waits, self.mixed = [], []

    @property
    def kernels(self) -> int:
        return sum(KERNELS.get(name.split("::")[1], 1) * n for name, n in self.operators.items())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = function._schema.name.split("::")
        if namespace == "prim":
            return function(*args, **kwargs)
        if name not in WHOLE:  # in inference mode autograd has not taken it apart
            with self:
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = function(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in given + made}
        if self.device not in places:
            return out
        if name in ("_to_copy", "copy_") and len(places) > 1:
            self._crossing(name, args, kwargs, given, made[0])
            return out
        # a number on the CPU is an argument of the kernel
        if len({x.device.type for x in given if x.dim()}) > 1:
            self.mixed.append(name)
        if name in READS or (name.startswith("index") and _selects_by_truth(args)):
            self.waits.append(name)
        if not function.is_view and name not in FREE:
            self.operators[f"{namespace}::{name}"] += 1
        return out

    def _crossing(self, name, args, kwargs, given, made) -> None:
        """A copy between the memories: without a wait from and to pinned memory only."""
        behind = kwargs.get("non_blocking", name == "copy_" and args[2:] == (True,))
        if made.device.type == "cpu":
            self.waits += [] if behind else ["read"]
        elif self.device == "cuda" and not (behind and hasattr(given[-1], "pinned")):
            self.waits.append("upload")  # on meta nothing is pinned


def _selects_by_truth(args) -> bool:
    """Whether an index is a mask, whose true elements the host must count; filling by a mask is no such."""
    indices = args[1] if isinstance(args[1], (list, tuple)) else ()
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not (len(args) > 2 and args[2].numel() == 1)
