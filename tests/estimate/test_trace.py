"""The counts of em.estimate.trace beside closed forms, direct counts and what torch really allocates."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from em.estimate import chat, shapes
from em.estimate.chat import Setting
from em.estimate.gpus import GPUS
from em.estimate.trace import ATTENTION, CACHE, HEAD, OTHER, PRODUCTS, Trace
from em.model import attention, decoder, fused, linear, lora
from em.model.config import DecoderConfig
from em.model.decoder import Decoder
from em.model.tokenizer import Example
from em.training import loss, optim
from em.training.memory import cache_bytes

H100 = GPUS["h100"]
SHAPE = dict(
    vocab_size=1000, hidden_size=256, intermediate_size=640, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
)  # fmt: skip
ROWS = [Example([1] * n, n // 2) for n in (150, 200, 250, 200)]
T = sum(len(e.ids) - 1 for e in ROWS)
N = sum(len(e.ids) - e.n_prompt for e in ROWS)


def config(family: str, **changes) -> DecoderConfig:
    return DecoderConfig.from_hf(SHAPE | {"model_type": family} | changes)


def sft(family: str, **changes):
    """(its setting, a step of train.py under it)."""
    setting = Setting(config(family, **changes), H100, {"student": 8}, learns="student")

    def step(on):
        with on.trace, lora.stack(on.model, "student"):
            train.step_loss(on.model, ROWS, N, 10_000)
        with on.trace:
            torch.nn.utils.clip_grad_norm_(on.parameters, 1.0)
            on.optimizer.step()

    return setting, step


def decoding(family: str, **changes):
    names = ("student",)
    setting = Setting(config(family, **changes), H100, {"student": 8}, frozen=(names,), cache=(8, 300))
    return setting, chat._decode(names, 8)


def direct(setting, code):
    on = chat.ready(setting, setting.config.n_layers)
    code(on)
    return on.trace.cost()


@pytest.mark.parametrize("family, work", [
    ("llama", sft), ("olmo3", sft), ("qwen3", decoding), ("olmo3", decoding),
])  # fmt: skip
def test_a_few_layers_tell_what_all_of_them_need(family, work):
    layers = 12 if family == "olmo3" else 6  # whose kinds of layers come in fours
    setting, code = work(family, num_hidden_layers=layers)
    expected, found = direct(setting, code), chat.measured(setting, code)
    assert found.total.flops == expected.total.flops > 0
    assert found.total.bytes == pytest.approx(expected.total.bytes, rel=1e-3)
    assert found.total.kernels == pytest.approx(expected.total.kernels, rel=1e-2)  # lists go 36 to a kernel
    assert found.memory == pytest.approx(expected.memory, rel=1e-3, abs=1024)
    assert found.peak == pytest.approx(expected.peak, rel=1e-4)


def test_flops_of_a_step_are_those_of_the_closed_form():
    setting, step = sft("qwen2")
    c, rank = setting.config, 8
    d, inner, q, k = 256, 640, 256, 128
    linears = [(d, q), (d, k), (d, k), (q, d), (d, inner), (d, inner), (inner, d)]
    base = 2 * sum(a * b for a, b in linears) * c.n_layers * T
    thin = 2 * rank * sum(a + b for a, b in linears) * c.n_layers * T
    head = 2 * N * c.vocab_size * d
    no_gradient = 2 * T * d * (q + 2 * k)  # to the embedding, which is frozen
    found = direct(setting, step).work
    # forward and the gradient to the input; of the adapters also that to their factors
    assert found[PRODUCTS].flops == pytest.approx(2 * base - no_gradient + 3 * thin, rel=0.02)
    assert found[HEAD].flops == pytest.approx(2 * head, rel=0.02)
    pairs = 2 * q * c.n_layers * 250 * T  # of queries and keys, had all rows been as long as the longest
    assert found[ATTENTION].flops == pytest.approx((1 + 2.5) * pairs, rel=0.02)


def test_what_is_held_is_counted_to_the_byte():
    setting, _ = sft("qwen2")
    setting = chat.replace(setting, cache=(8, 300))
    on = chat.ready(setting, setting.config.n_layers)
    with torch.device("meta"):
        base = sum(p.numel() for p in Decoder(setting.config).parameters())
    learnt = sum(p.numel() for p in on.parameters)
    held = on.trace.cost().memory
    assert held["weights"] == 2 * base
    assert held["adapters"] == 4 * learnt
    assert held["optimiser"] == 8 * learnt + 512 * len(on.parameters)  # each counts its steps
    assert held[CACHE] == cache_bytes(setting.config, 8, 300)


# -- against what torch allocates ----------------------------------------------------------------------------


def allocated(code) -> int:
    """Bytes at the peak by torch's own profiler, of what `code` allocates on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        code()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def the_cpu_path_everywhere(monkeypatch):
    """So that meta tensors go through the operators that a CPU runs."""
    with monkeypatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        for module in (attention, decoder, fused, linear, lora, loss, optim):
            if hasattr(module, "on_gpu"):
                patch.setattr(module, "on_gpu", lambda _: False)
        yield


def fine_tuned(device: str):
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config("qwen2", num_hidden_layers=3)).requires_grad_(False)
    lora.attach(model)
    with torch.device(device):
        lora.add_adapter(model, "student", 8)
    lora.trainable(model, "student")

    def step():
        with lora.stack(model, "student"):
            train.step_loss(model, ROWS, N, 10_000)

    return model, step


def test_memory_of_a_step_is_what_torch_allocates_for_it_on_a_cpu(monkeypatch):
    with the_cpu_path_everywhere(monkeypatch):
        peaks = {}
        for device in ("meta", "cpu"):
            model, step = fine_tuned(device)
            trace = Trace(H100, device=device)
            trace.hold("weights", model.parameters())
            with trace:
                step()
            peaks[device] = sum(trace.peak.values()) - trace.peak["weights"]
        model, step = fine_tuned("cpu")
        assert peaks["cpu"] == pytest.approx(allocated(step), rel=0.01)
        assert peaks["meta"] == pytest.approx(peaks["cpu"], rel=0.01)


# -- single operators ----------------------------------------------------------------------------------------


def traced(code, **options) -> Trace:
    with Trace(H100, **options) as trace:
        code()
    return trace


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_views_are_free_and_an_expanded_dimension_is_read_once():
    x, row = meta(64, 128), meta(1, 128)
    assert traced(lambda: x.view(128, 64)[3:].t().unbind(0)).work == {}
    assert traced(lambda: x + row.expand(64, 128)).work[OTHER].bytes == 2 * (2 * 64 * 128 + 128)


def test_decode_attention_reads_the_keys_that_are_there():
    q, keys, positions = meta(8, 4, 64), meta(8, 512, 2, 64), meta(8, dtype=torch.long)

    def code():
        torch.ops.em.decode_attention(q, keys, keys, positions, None)

    work = traced(code, live_keys=128).work[ATTENTION]
    assert work.bytes == 2 * 8 * 4 * 64 * 2 + 2 * 8 * 2 * 128 * 64 * 2
    assert work.flops == 4 * 8 * 4 * 64 * 128


def test_a_compiled_function_writes_only_what_is_wanted_afterwards():
    x, weight = meta(4096, 256), meta(256, 256)

    def code():
        with trace.as_compiled():
            y = (x.float() * 2).tanh().to(torch.bfloat16)  # three temporaries that no kernel need write
            return y @ weight

    trace = Trace(H100)
    with trace:
        code()
    assert trace.work[OTHER].bytes == 2 * 2 * x.numel()
    assert trace.work[PRODUCTS].flops == 2 * 4096 * 256 * 256


def test_no_time_is_below_the_roofline_and_no_kernel_below_the_floor():
    a, b = meta(8192, 8192), meta(8192, 8192)
    work = traced(lambda: a @ b).work[PRODUCTS]
    assert work.lower == 2 * 8192**3 / H100.flops < work.likely == 2 * 8192**3 / H100.products
    tiny = meta(1)
    assert traced(lambda: tiny + 1).work[OTHER].likely == H100.floor


def test_an_operator_in_inference_mode_counts_as_the_ones_it_is_made_of():
    x, weight = meta(16, 64), meta(32, 64)
    with torch.inference_mode():
        found = traced(lambda: torch.nn.functional.linear(x, weight)).work
    assert found == traced(lambda: x @ weight.t()).work


def test_named_models_have_the_sizes_on_their_names():
    """Parameters in thousands of millions, as the checkpoints' pages give them."""
    stated = {
        "qwen2.5-14b": 14.77,
        "llama3.1-8b": 8.03,
        "olmo3-7b": 7.30,
        "qwen3-14b": 14.77,
        "smollm2-135m": 0.1345,
    }
    for name, billions in stated.items():
        with torch.device("meta"):
            model = Decoder(shapes.config_of(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.001)


def test_an_adapter_on_some_blocks_costs_what_those_blocks_cost():
    """Below its first nothing is kept, and backward does not go there; all by their numbers are all."""

    def cost(blocks):
        setting, _ = sft("qwen2", num_hidden_layers=6)
        setting = replace(setting, targets=("down_proj",), blocks=blocks)

        def step(on):
            with on.trace, lora.stack(on.model, "student"):
                train.step_loss(on.model, ROWS, N, 10_000)

        return chat.measured(setting, step)

    last, first, all_, by_a_line = (cost(blocks) for blocks in ((5,), (0,), tuple(range(6)), None))
    activations, adapters = ([c.memory[k] for c in (last, first, all_)] for k in ("activations", "adapters"))
    assert activations[0] < 0.6 * activations[1] < 0.6 * activations[2]
    assert adapters[2] == 6 * adapters[1] == 6 * adapters[0]
    assert last.total.flops < 0.8 * first.total.flops < 0.8 * all_.total.flops
    for kind in ("adapters", "optimiser", "activations"):
        assert by_a_line.memory[kind] == pytest.approx(all_.memory[kind], rel=0.01)
    assert by_a_line.total.flops == pytest.approx(all_.total.flops, rel=1e-6)
