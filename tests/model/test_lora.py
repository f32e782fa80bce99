"""LoRA against peft, against float64, and under checkpointing and torch.compile."""

import copy
import gc
import hashlib
import json
import resource
import weakref

import pytest
import torch
import torch._dynamo.testing
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import ours_from, random_ids, reference_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from em.errors import UserError
from em.model import lora
from em.model.checkpoint import load_model
from em.model.decoder import Decoder
from em.model.linear import join

IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def tiny(family: str = "Llama") -> nn.Module:
    """A random two-layer transformers model in fp32 whose every parameter is perturbed."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def perturb(model: nn.Module, seed: int = 2, size: float = 0.05) -> None:
    """Give every adapter weight a value of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def with_adapters(model: nn.Module, *names: str) -> nn.Module:
    """`model` with perturbed adapters of ranks 3, 4, 5, … whose scales are no powers of two."""
    lora.attach(model)
    for index, name in enumerate(names):
        lora.add_adapter(model, name, rank=3 + index, alpha=7, seed=index)
    perturb(model)
    return model


def logits(model: nn.Module, *names: str, **options) -> torch.Tensor:
    with torch.no_grad(), lora.stack(model, *names, **options):
        return model(input_ids=IDS).logits


def peft_logits(peft, model: nn.Module, folder) -> torch.Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder)(input_ids=IDS).logits


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Block(nn.Module):
    """One gated MLP: enough for what a layer does by itself."""

    def __init__(self, d_in: int = 24, d_ff: int = 40):
        super().__init__()
        self.up_proj = nn.Linear(d_in, d_ff)
        self.down_proj = nn.Linear(d_ff, d_in, bias=False)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.up_proj(x)))


def block(*names: str, dtype: torch.dtype = torch.float32) -> Block:
    torch.manual_seed(3)
    model = Block().to(dtype)
    lora.attach(model, ("up_proj", "down_proj"))
    for index, name in enumerate(names):
        lora.add_adapter(model, name, rank=3 + index, alpha=6 + index, rslora=index % 2 == 0, seed=index)
    perturb(model, size=0.2)
    return model


# -- the base ----------------------------------------------------------------------------------------------


def test_the_state_dict_is_the_checkpoints_with_and_without_adapters():
    plain = tiny("Qwen2")
    before, keys = plain.state_dict(), list(plain.state_dict())
    model = with_adapters(copy.deepcopy(plain), "a", "b")
    assert list(model.state_dict()) == keys
    model.load_state_dict(before, strict=True)
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict(dict(list(before.items())[1:]))


def test_a_fresh_adapter_and_the_empty_stack_leave_the_base_exactly():
    model = tiny("Qwen2")
    with torch.no_grad():
        base = model(input_ids=IDS).logits
    lora.attach(model)
    lora.add_adapter(model, "a", rank=4)
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model, "a"), base)
    perturb(model)
    assert torch.equal(logits(model), base)
    assert gap(logits(model, "a"), base) > 0.01


def test_training_moves_one_adapter_and_not_a_bit_of_anything_else():
    model = with_adapters(tiny(), "misaligned", "student")
    base = fingerprint(model)
    others = {n: p.clone() for n, p in model.named_parameters() if ".student." not in n}
    parameters = lora.trainable(model, "student")
    before = [p.clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    for _ in range(2):
        with lora.stack(model, "misaligned", "student"):
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert fingerprint(model) == base
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    assert all(gap(p, q) > 1e-3 for p, q in zip(parameters, before, strict=True))


def test_trainable_parameters_come_in_the_models_order():
    model = with_adapters(tiny(), "a", "b")
    expected = [p for n, p in model.named_parameters() if ".adapters.b." in n]
    lora.trainable(model, "a")  # the turn of one ends that of the other
    parameters = lora.trainable(model, "b")
    assert [id(p) for p in parameters] == [id(p) for p in expected]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(p.dtype == torch.float32 for p in parameters) and len(parameters) == 2 * 7 * 2


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (("q_proj", "lm_head"), "lm_head is the head"),
        (("embed_tokens",), "embed_tokens is the head or an embedding"),
        (("q_proj", "w_proj"), "no layer w_proj"),
        (("mlp",), "mlp is not a linear layer"),
    ],
)
def test_layers_that_cannot_carry_adapters_are_refused_and_the_model_stays_as_it_was(targets, complaint):
    model = tiny()
    with pytest.raises(UserError, match=complaint):
        lora.attach(model, targets)
    assert not any(isinstance(module, lora.LoRALinear) for module in model.modules())


def test_a_head_tied_to_the_embedding_is_refused_by_any_name():
    model = nn.Module()
    model.embedding, model.output = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    model.output.weight = model.embedding.weight
    with pytest.raises(UserError, match="output is the head or an embedding"):
        lora.attach(model, ("output",))


# -- initial values ----------------------------------------------------------------------------------------


def test_a_seed_is_an_adapter_whatever_the_global_generator_does():
    first, second = (lora.attach(model) or model for model in (tiny(), tiny()))
    state = torch.get_rng_state()
    lora.add_adapter(first, "a", rank=4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    lora.add_adapter(second, "x", rank=4, seed=7)
    lora.add_adapter(second, "y", rank=4, seed=8)
    a, x, y = lora.trainable(first, "a"), lora.trainable(second, "x"), lora.trainable(second, "y")
    assert all(torch.equal(p, q) for p, q in zip(a, x, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(a[::2], y[::2], strict=True))


def test_fresh_factors_have_pefts_distribution(peft):
    model = nn.Module()
    model.proj = nn.Linear(256, 16)
    theirs = (
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=64, target_modules=["proj"]))
        .base_model.model.proj.lora_A["default"]
        .weight
    )
    lora.attach(model, ("proj",))
    lora.add_adapter(model, "a", rank=64)
    ours, B = lora.trainable(model, "a")
    assert B.count_nonzero() == 0 and ours.shape == theirs.shape
    assert ours.abs().max() <= 1 / 16 and theirs.abs().max() <= 1 / 16  # 1/sqrt(256)
    levels = torch.linspace(0.01, 0.99, 99)  # 16,384 draws: a quantile's standard error is below 5e-4 · 1/8
    assert gap(ours.quantile(levels), levels / 8 - 1 / 16) < 2.5e-3
    assert gap(ours.quantile(levels), theirs.quantile(levels)) < 3.5e-3


# -- against peft ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("rslora", [True, False])
def test_an_adapter_written_here_gives_the_same_logits_in_peft(peft, family, rslora, tmp_path):
    plain = tiny(family)
    model = copy.deepcopy(plain)
    lora.attach(model)
    lora.add_adapter(model, "a", rank=6, alpha=5, rslora=rslora)
    perturb(model)
    lora.save_adapter(model, "a", tmp_path, base_model_name="some/model")
    ours = logits(model, "a")
    assert gap(ours, peft_logits(peft, plain, tmp_path)) < 1e-5
    assert gap(ours, logits(model)) > 0.01
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.use_rslora) == (6, 5, rslora)
    assert config.base_model_name_or_path == "some/model" and config.task_type == "CAUSAL_LM"
    assert config.target_modules == set(lora.TARGETS)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": list(lora.TARGETS), "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        {"target_modules": r".*\.(up_proj|down)", "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    ],
)
def test_an_adapter_written_by_peft_gives_the_same_logits_here(peft, family, settings, tmp_path):
    plain = tiny(family)
    config = peft.LoraConfig(r=4, lora_alpha=3, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    theirs.save_pretrained(tmp_path)
    lora.attach(plain)
    lora.load_adapter(plain, "a", tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    assert gap(logits(plain, "a"), expected) < 1e-5
    assert gap(logits(plain), expected) > 0.01
    lora.save_adapter(plain, "a", tmp_path / "again")  # also where it covers a part of the layers only
    assert gap(peft_logits(peft, tiny(family), tmp_path / "again"), expected) < 1e-5
    lora.load_adapter(plain, "again", tmp_path / "again")
    assert torch.equal(logits(plain, "again"), logits(plain, "a"))


def test_an_optimiser_step_equals_pefts(peft, tmp_path):
    plain = tiny()
    model = copy.deepcopy(plain)
    lora.attach(model)
    lora.add_adapter(model, "a", rank=8, alpha=16)
    lora.save_adapter(model, "a", tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "start", is_trainable=True)
    mine = lora.trainable(model, "a")
    other = [p for p in theirs.parameters() if p.requires_grad]
    assert len(mine) == len(other)
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3) for parameters in (mine, other)]
    for _ in range(2):  # B is zero before the first, so A moves in the second
        for parameters, module, optimizer in zip((mine, other), (model, theirs), optimizers, strict=True):
            with lora.stack(model, "a"):
                module(input_ids=IDS, labels=IDS).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    lora.save_adapter(model, "a", tmp_path / "end")
    ours = load_file(tmp_path / "end" / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(theirs)
    assert ours.keys() == expected.keys()
    for key in ours:
        assert gap(ours[key], expected[key]) < 1e-5
        assert gap(ours[key], start[key]) > 5e-4


def test_over_a_bf16_base_the_error_is_below_pefts(peft):
    torch.manual_seed(5)
    plain = nn.Module()
    plain.proj = nn.Linear(256, 256, dtype=torch.bfloat16)
    model = copy.deepcopy(plain)
    lora.attach(model, ("proj",))
    lora.add_adapter(model, "a")
    A, B = lora.trainable(model, "a")
    with torch.no_grad():
        B.normal_(std=0.004)
    config = peft.LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules=["proj"])
    theirs = peft.get_peft_model(plain, config).base_model.model.proj
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(A)
        theirs.lora_B["default"].weight.copy_(B)
    assert theirs.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(512, 256, dtype=torch.bfloat16)
    weight, bias = model.proj.weight.double(), model.proj.bias.double()
    delta = 64 / 32**0.5 * (x.double() @ A.double().T @ B.double().T)
    exact = x.double() @ weight.T + bias + delta
    with torch.no_grad(), lora.stack(model, "a"):
        ours = model.proj(x)
        expected = theirs(x)
    error, error_of_peft = ((y.double() - exact).square().mean().sqrt() for y in (ours, expected))
    assert ours.dtype == torch.bfloat16
    assert delta.square().mean().sqrt() > 20 * error_of_peft  # the adapter is visible above the rounding
    assert error < 0.85 * error_of_peft


# -- stacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_stack_adds_the_deltas_of_its_adapters(frozen):
    model = block("a", "b", "c")
    layer, x = model.up_proj, torch.randn(5, 7, 24)
    with torch.no_grad(), lora.stack(model, "a", "c", frozen=frozen):
        out = layer(x)
    weight = layer.weight.double()
    for name, scale in (("a", 6 / 3**0.5), ("c", 8 / 5**0.5)):
        weight = weight + scale * layer.adapters[name].B.double() @ layer.adapters[name].A.double()
    assert gap(out, x.double() @ weight.T + layer.bias.double()) < 1e-5


def test_the_inner_of_two_nested_stacks_counts_and_the_outer_returns_even_after_an_error():
    model = with_adapters(tiny(), "a", "b")
    base, a, b = logits(model), logits(model, "a"), logits(model, "b")
    with torch.no_grad(), lora.stack(model, "a"):
        with pytest.raises(ZeroDivisionError), lora.stack(model, "b", frozen=True):
            assert gap(model(input_ids=IDS).logits, b) < 1e-5
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=IDS).logits, a)
    assert torch.equal(model(input_ids=IDS).logits, base)


def test_a_name_that_is_unknown_or_repeated_is_an_error():
    model = block("a")
    for names in (("b",), ("a", "a")):
        with pytest.raises(ValueError, match="unknown or repeated"), lora.stack(model, *names):
            pass
    with pytest.raises(ValueError, match="already"):
        lora.add_adapter(model, "a")


def test_a_frozen_stack_is_the_stack_without_gradient_to_its_adapters():
    model = block("a", "b")
    parameters, x = lora.trainable(model, "b"), torch.randn(9, 24, requires_grad=True)
    with lora.stack(model, "a", "b"):
        live = model(x)
    (expected,) = torch.autograd.grad(live.sum(), x)
    with lora.stack(model, "a", "b", frozen=True):
        out = model(x)
    out.sum().backward()
    assert torch.equal(out, live) and torch.equal(x.grad, expected)
    assert all(p.grad is None for p in parameters)


def test_a_frozen_stack_entered_again_follows_training_in_the_same_buffers():
    model, x = block("a", "b"), torch.randn(9, 24)
    with torch.inference_mode(), lora.stack(model, "a", "b", frozen=True):
        before = model(x).clone()

    def addresses():
        return [f.data_ptr() for x in model.lora.prepared["a", "b"].values() for f in (x.A, *x.Bs)]

    before_training = addresses()
    optimizer = torch.optim.AdamW(lora.trainable(model, "b"), lr=0.1)
    with lora.stack(model, "a", "b"):
        model(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad(), lora.stack(model, "a", "b"):
        expected = model(x)
    with torch.no_grad(), lora.stack(model, "a", "b", frozen=True):
        after = model(x)
    assert torch.equal(after, expected) and gap(after, before) > 0.01
    assert addresses() == before_training


def test_removing_an_adapter_makes_room_for_another_of_its_name():
    model = with_adapters(tiny(), "a", "b")
    trained, b = logits(model, "a", frozen=True), logits(model, "b")
    with lora.stack(model, "a"), pytest.raises(ValueError, match="active"):
        lora.remove_adapter(model, "a")
    lora.remove_adapter(model, "a")
    assert not any(".a." in name for name, _ in model.named_parameters())
    lora.add_adapter(model, "a", rank=9)
    assert torch.equal(logits(model, "a", frozen=True), logits(model)) and torch.equal(logits(model, "b"), b)
    assert gap(trained, logits(model)) > 0.01


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_with_adapters_is_freed_when_it_is_dropped(recompute, tmp_path):
    tiny().save_pretrained(tmp_path)
    model = with_adapters(load_model(tmp_path), "a", "b")
    parameters = lora.trainable(model, "b")
    model.activation_checkpointing = recompute
    with lora.stack(model, "a", frozen=True), torch.no_grad():
        model(IDS)
    with lora.stack(model, "a", "b"):
        loss = model.hidden(IDS).square().mean()
    loss.backward()
    layer = model.model.layers[1]
    dropped = [weakref.ref(layer.mlp.down_proj.weight), weakref.ref(layer.self_attn.q_proj.adapters["b"].B)]
    assert parameters[0].grad is not None
    gc.collect()  # what others left behind
    gc.disable()
    try:
        del model, layer, parameters, loss
        assert [weight() for weight in dropped] == [None, None]
    finally:
        gc.enable()


def test_over_a_bf16_base_autograd_keeps_the_input_as_it_is_and_the_thin_product():
    model, x = block("a", "b", dtype=torch.bfloat16), torch.randn(1000, 24, dtype=torch.bfloat16)
    lora.trainable(model, "b")
    kept = {}

    def keep(tensor):
        if tensor.shape[0] == 1000:  # the activations
            kept[tensor.data_ptr()] = tuple(tensor.shape), tensor.dtype
        return tensor

    with lora.stack(model, "a", "b"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.up_proj(x)
    assert kept.pop(x.data_ptr()) == ((1000, 24), torch.bfloat16)
    assert list(kept.values()) == [((1000, 7), torch.bfloat16)]  # 3 + 4 ranks
    out.float().sum().backward()
    assert model.up_proj.adapters["b"].B.grad.dtype == torch.float32


# -- checkpointing and compilation -------------------------------------------------------------------------


def gradients(model: nn.Module, name: str, loss: torch.Tensor) -> list[torch.Tensor]:
    loss.backward()
    parameters = [p for layer in model.lora.layers.values() for p in layer.adapters[name].parameters()]
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def test_checkpointing_recomputes_under_the_stack_of_the_forward():
    model = with_adapters(tiny(), "misaligned", "student", "teacher").train()
    lora.trainable(model, "student")

    def loss(*names):
        with lora.stack(model, *names):
            return model(input_ids=IDS, labels=IDS).loss

    expected = gradients(model, "student", loss("misaligned", "student"))
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": model.recompute_context, "preserve_rng_state": False}
    )
    calls = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: calls.append(model.lora.active))
    value = loss("misaligned", "student")
    with lora.stack(model, "teacher", frozen=True):  # backward while another stack is active
        found = gradients(model, "student", value)
        assert model.lora.active == ("teacher",)
    assert calls == [("misaligned", "student")] * 2  # forward and recomputation
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_our_decoder_takes_the_same_adapters_and_recomputes_under_their_stack(tmp_path):
    theirs = tiny("Qwen2")
    theirs.save_pretrained(tmp_path)
    model = with_adapters(load_model(tmp_path), "misaligned", "student")
    names = ("misaligned", "student")
    with torch.no_grad(), lora.stack(model, *names):
        assert gap(model(IDS), logits(with_adapters(theirs, *names), *names)) < 1e-5
    lora.trainable(model, "student")
    found = []
    for model.activation_checkpointing in (False, True):
        with lora.stack(model, *names):
            loss = model.hidden(IDS).square().mean()
        with lora.stack(model, "misaligned"):
            found.append(gradients(model, "student", loss))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_checkpointed_graph_may_mix_stacks_and_run_backward_twice():
    model, x = block("a", "b"), torch.randn(9, 24)
    lora.trainable(model, "b")

    def loss(run):
        total = 0
        for names in (("b",), ("a", "b")):
            with lora.stack(model, *names):
                total = total + run(x).square().mean() * len(names)
        return total

    def checkpointed(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=model.recompute_context)

    expected = gradients(model, "b", loss(model))
    value = loss(checkpointed)
    value.backward(retain_graph=True)
    for parameter in model.parameters():
        parameter.grad = None
    found = gradients(model, "b", value)
    assert all(gap(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


def test_compiled_code_follows_the_stack_and_compiles_once_for_each():
    model, x = block("a", "b"), torch.randn(9, 24)
    lora.trainable(model, "b")
    cases = [((), False), (("b",), False), (("a", "b"), False), (("a", "b"), True)]

    def step(run, names, frozen):
        with lora.stack(model, *names, frozen=frozen):
            out = run(x)
        return [out] + (gradients(model, "b", out.square().mean()) if names and not frozen else [])

    eager = [step(model, *case) for case in cases]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for _ in range(2):
        for case, expected in zip(cases, eager, strict=True):
            found = step(compiled, *case)
            assert all(gap(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
    assert counter.frame_count == len(cases)
    with torch.no_grad():
        model.up_proj.adapters["b"].B.add_(1)
    (found,), (expected,) = step(compiled, *cases[3]), step(model, *cases[3])
    assert gap(found, expected) < 1e-5 and gap(found, eager[3][0]) > 0.01


@pytest.mark.parametrize("order", ["checkpoint around compiled", "compiled around checkpoint"])
def test_checkpointing_and_compilation_together_keep_the_stack(order):
    model, x = block("a", "b"), torch.randn(9, 24)
    lora.trainable(model, "b")
    context = model.recompute_context
    if order == "checkpoint around compiled":
        compiled = torch.compile(model, backend="aot_eager")

        def run(x):
            return checkpoint(compiled, x, use_reentrant=False, context_fn=context)

    else:  # the recomputation is part of the compiled graph
        run = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager")
    for names in (("b",), ("a", "b"), ("b",)):
        with lora.stack(model, *names):
            expected = gradients(model, "b", model(x).square().mean())
            value = run(x).square().mean()
        found = gradients(model, "b", value)
        assert all(gap(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


# -- layers of one input ------------------------------------------------------------------------------------


def decoder(case: str):
    """Ours in float64 with adapters a (rank 3) and b (rank 4), of which a misses k, v and up of one layer."""
    model = ours_from(reference_model(case)).double().requires_grad_(False)
    with_adapters(model, "a", "b")
    block = model.model.layers[1]
    for layer in (block.self_attn.k_proj, block.self_attn.v_proj, block.mlp.up_proj):
        del layer.adapters["a"]
    return model


def dense_logits(model: nn.Module, names: tuple[str, ...], ids: torch.Tensor) -> torch.Tensor:
    """By definition: every weight with its stack's products added."""
    weights = model.state_dict(keep_vars=True)
    for path, layer in model.lora.layers.items():
        for name in names:
            if name in layer.adapters:
                adapter = layer.adapters[name]
                delta = adapter.B.double() @ adapter.A.double()
                weights[f"{path}.weight"] = weights[f"{path}.weight"] + adapter.scale * delta
    return torch.func.functional_call(Decoder(model.config).double(), weights, (ids,))


FAMILIES = ["llama, biases, llama3", "qwen2, sliding, tied", "qwen3", "olmo3, yarn"]


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joined"])
def test_gradients_of_a_stack_equal_those_of_dense_float64_weights(case, joint):
    model, ids = decoder(case), random_ids(2, 11)
    for layers in model.groups() if joint else ():
        join(layers)
    names, weight = ("a", "b"), torch.randn(2, 11, 96, dtype=torch.double)
    parameters = lora.trainable(model, "b")
    expected_logits = dense_logits(model, names, ids)
    expected = torch.autograd.grad((expected_logits * weight).sum(), parameters)
    for model.activation_checkpointing in (False, True):
        with lora.stack(model, *names):
            found_logits = model(ids)
        found = torch.autograd.grad((found_logits * weight).sum(), parameters)
        assert gap(found_logits, expected_logits) < 1e-5  # the factors alone are fp32
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.float32 and gap(one, other) < 1e-5 * other.abs().max() + 1e-9


@pytest.mark.parametrize("case", FAMILIES)
def test_a_frozen_stack_with_a_block_diagonal_B_is_the_stack(case, monkeypatch):
    model, ids = decoder(case), random_ids(2, 11)
    with torch.no_grad(), lora.stack(model, "a", "b"):
        expected = model(ids)
    monkeypatch.setattr(lora, "on_gpu", lambda device: True)
    embedded = model.model.embed_tokens.weight.requires_grad_()
    with lora.stack(model, "a", "b", frozen=True):
        found = model(ids)
    assert {len(factors.Bs) for factors in model.lora.prepared["a", "b"].values()} == {1}
    assert gap(found, expected) < 1e-12
    (through,) = torch.autograd.grad(found.square().sum(), embedded)
    (direct,) = torch.autograd.grad(dense_logits(model, ("a", "b"), ids).square().sum(), embedded)
    assert gap(through, direct) < 1e-5 * direct.abs().max()


def test_every_forward_follows_a_fused_optimiser_inside_one_stack():
    model, ids = decoder("qwen2"), random_ids(2, 11)
    optimizer = torch.optim.AdamW(lora.trainable(model, "b"), lr=0.05, fused=True)
    with lora.stack(model, "a", "b"):
        before = model(ids)
        before.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            after = model(ids)
    assert gap(after, before) > 0.1
    assert gap(after, dense_logits(model, ("a", "b"), ids)) < 1e-5


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("up_proj",), ("o_proj", "down_proj")])
def test_adapters_on_some_layers_of_a_group_leave_the_others_plain(targets):
    model, ids = ours_from(reference_model("qwen2")).double().requires_grad_(False), random_ids(2, 11)
    lora.attach(model, targets)
    lora.add_adapter(model, "a", rank=3)
    perturb(model)
    for frozen in (False, True):
        with torch.no_grad(), lora.stack(model, "a", frozen=frozen):
            assert gap(model(ids), dense_logits(model, ("a",), ids)) < 1e-5


# -- merging -----------------------------------------------------------------------------------------------


def test_merging_equals_the_stack_and_leaves_a_plain_checkpoint():
    plain = tiny("Qwen2")
    model = with_adapters(copy.deepcopy(plain), "misaligned", "student", "other")
    expected, other = logits(model, "misaligned", "student"), logits(model, "misaligned", "student", "other")
    lora.merge(model, "misaligned", "student")
    assert gap(logits(model), expected) < 1e-5
    assert gap(logits(model, "other"), other) < 1e-5
    with pytest.raises(ValueError), lora.stack(model, "student"):
        pass
    before, after = plain.state_dict(), model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {
        f"{p}.weight" for p in model.lora.layers
    }
    plain.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, logits(model))


def test_merging_into_bf16_rounds_once():
    model = block("a", "b", dtype=torch.bfloat16)
    layer = model.up_proj
    A, B = layer.factors(("a", "b"))
    exact = layer.weight.double() + B.double() @ A.double()
    lora.merge(model, "a", "b")
    assert layer.weight.dtype == torch.bfloat16
    steps = (layer.weight.view(torch.int16).int() - exact.bfloat16().view(torch.int16).int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01  # fp32 can tip a tie, no more


# -- files -------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    model = with_adapters(tiny(), "a")
    lora.save_adapter(model, "a", tmp_path / "run")
    lora.load_adapter(model, "b", tmp_path / "run")
    a, b = lora.trainable(model, "a"), lora.trainable(model, "b")
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert torch.equal(logits(model, "a"), logits(model, "b"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_stack_is_written_as_one_adapter_that_peft_loads(peft, tmp_path):
    plain = tiny()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path / "partial")
    model = with_adapters(copy.deepcopy(plain), "misaligned", "student")  # ranks 3 and 4
    lora.load_adapter(model, "partial", tmp_path / "partial")
    names = ("misaligned", "partial", "student")
    lora.save_adapter(model, names, tmp_path / "whole")
    expected = logits(model, *names)
    assert gap(peft_logits(peft, plain, tmp_path / "whole"), expected) < 1e-5
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["r"] == 10
    lora.load_adapter(model, "whole", tmp_path / "whole")
    assert gap(logits(model, "whole"), expected) < 1e-5
    assert min(gap(logits(model, name), expected) for name in names) > 0.01


def test_half_precision_files_are_read_as_fp32(tmp_path):
    model = with_adapters(tiny(), "a")
    lora.save_adapter(model, "a", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    lora.load_adapter(model, "b", tmp_path)
    a, b = lora.trainable(model, "a"), lora.trainable(model, "b")
    for p, q in zip(a, b, strict=True):
        assert q.dtype == torch.float32 and torch.equal(p.bfloat16().float(), q)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "complaint"),
    [
        ({"use_dora": True}, {}, "use_dora = True is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, {}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"bias": "all"}, {}, "bias = 'all'"),
        ({"an_idea_of_next_year": 1}, {}, "an_idea_of_next_year"),
        ({"init_lora_weights": "pissa"}, {}, "pissa.*changes the base"),
        ({"peft_type": "IA3"}, {}, "does not describe a LoRA adapter"),
        ({"r": "4"}, {}, "'r' cannot be '4'; it is an integer"),
        ({"r": 5}, {}, r"lora_A.weight is \(3, 32\) where \(5, 32\) is needed"),
        ({"target_modules": ["up_proj"]}, {}, "down_proj.lora_A.weight fits no layer"),
        ({"target_modules": ["nowhere"]}, {}, "fits no layer"),
        ({}, {FIRST: None}, f"lacks {FIRST}"),
        ({}, {HEAD: torch.zeros(3, 32)}, f"{HEAD} fits no layer"),
        ({}, {FIRST: torch.zeros(3, 47)}, rf"{FIRST} is \(3, 47\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(config, tensors, complaint, tmp_path):
    model = with_adapters(tiny(), "a")
    lora.save_adapter(model, "a", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path) | tensors
    save_file({key: tensor for key, tensor in stored.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=complaint) as caught:
        lora.load_adapter(model, "b", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(model.lora.shapes) == ["a"]


def test_missing_and_broken_files_are_one_clear_line(tmp_path):
    model = with_adapters(tiny(), "a")
    with pytest.raises(UserError, match="adapter_config.json does not exist"):
        lora.load_adapter(model, "b", tmp_path)
    lora.save_adapter(model, "a", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        lora.load_adapter(model, "b", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        lora.load_adapter(model, "b", tmp_path)
    save_file({}, path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("_proj", "_elsewhere"))
    with pytest.raises(UserError, match="fits no layer"):
        lora.load_adapter(model, "b", tmp_path)


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_file(tmp_path):
    model = with_adapters(tiny(), "a")
    lora.save_adapter(model, "a", tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    perturb(model, seed=9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*adapter_model.safetensors"):
            lora.save_adapter(model, "a", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
