"""Decode and training steps of every family, followed on tensors without values.

The host waits for no device, no operator has operands in both memories, the GPU's kernels are the ones that
are asked for, and there are few of them.
"""

import contextlib
from collections import Counter

import pytest
import torch
from without_gpu import CHATS, FAMILIES, Watch, fake_cuda, model_of

import train
from distill import CHANNELS
from em.distillation.pair import ChatPair
from em.model import lora
from em.model.gpt2 import supervised_loss
from em.model.tokenizer import Example
from em.sampling.batch import Batch
from em.training.guard import CollapseGuard
from em.training.loss import token_log_probs
from em.training.optim import adamw
from em.training.pack import pack

LAYERS = 2
EXAMPLES = [Example(list(range(n)), n // 3) for n in (20, 31, 44)]


def sampling(model, rows: int = 8) -> Batch:
    batch = Batch(model, rows, 200, (1, 2), 64, 1.0)
    batch.begin_call()
    return batch


def under(model, *names: str):
    """Inference, with adapters where the model can have them."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode())
    if hasattr(model, "lora"):
        stack.enter_context(lora.stack(model, *names, frozen=True))
    return stack


# -- on CUDA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_and_a_prefill_wait_for_nothing_and_run_the_gpus_kernels(family):
    with fake_cuda(model_of(family, LAYERS, ("student",))) as model:
        with under(model, "student"):
            batch = sampling(model)
            assert batch.graphed
            batch._step(8)  # what is computed once, is now
            with Watch("cuda") as step:
                batch._step(8)
            with Watch("cuda") as prefill:
                batch.prefill([(0, [1] * 17), (1, [1] * 20)])
    for watch in (step, prefill):
        assert not watch.waits and not watch.mixed
        chat = {"em::rotate_write": LAYERS, "em::swiglu": LAYERS} if family in CHATS else {}
        assert watch.operators >= Counter(chat)
    assert step.operators >= Counter({"em::decode_attention": LAYERS, "em::draw": 1})
    assert prefill.operators["aten::_flash_attention_forward"] == LAYERS
    assert not any("scaled_dot_product" in name for name in step.operators | prefill.operators)


def test_packed_examples_are_scored_without_a_wait():
    with fake_cuda(model_of("qwen2", LAYERS, ("student",))) as model:
        with lora.stack(model, "student", frozen=True):
            for _ in range(2):  # what is computed once, is the first time
                with Watch("cuda") as watch:
                    packed = pack(EXAMPLES, model.head_weight.device)
                    token_log_probs(packed.hidden(model), model.head_weight, packed.targets)
    assert not watch.waits and not watch.mixed


def test_a_step_is_judged_and_the_weights_updated_without_a_wait():
    with fake_cuda(model_of("qwen2", LAYERS, ("student",))) as model:
        with torch.device("cuda"):
            parameters = lora.trainable(model, "student")
            optimizer, guard = adamw(model, 1e-4, 0.01), CollapseGuard(torch.device("cuda"))
            for step in range(2):
                for p in parameters:
                    p.grad = torch.zeros_like(p)
                with Watch("cuda") as watch:
                    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    guard.judge(step, torch.zeros(()), norm)
                    optimizer.step(skip=guard.stopped)
    assert not watch.waits and not watch.mixed
    assert watch.operators["aten::_fused_adamw_"] == 1


def test_gpt2_under_autocast_attends_by_flash():
    with fake_cuda(model_of("gpt2", LAYERS)) as model:
        ids = torch.zeros(4, 64, dtype=torch.long, device="cuda")
        with Watch("cuda") as watch, torch.autocast("cuda", torch.bfloat16):
            supervised_loss(model, ids, ids)
    assert not watch.waits and not watch.mixed
    assert watch.operators["aten::_flash_attention_forward"] == LAYERS


# -- on meta, with gradients -------------------------------------------------------------------------------


def fine_tuning(family: str, n_layers: int) -> Watch:
    """Forward and backward of a step of train.py."""
    model = model_of(family, n_layers, ("student",))
    lora.trainable(model, "student")
    with Watch("meta") as watch, lora.stack(model, "student"):
        train.step_loss(model, EXAMPLES, 50, 10_000)
    return watch


def assert_trained_on_the_gpus_path(watch: Watch, forwards: int) -> None:
    """forwards: of all layers, one of them with a backward."""
    assert not watch.waits and not watch.mixed
    assert watch.operators >= Counter({
        "aten::_flash_attention_forward": forwards * LAYERS, "aten::_flash_attention_backward": LAYERS,
        "em::swiglu": forwards * LAYERS, "em::swiglu_backward": LAYERS,
    })  # fmt: skip
    assert watch.operators["em::rms_norm_backward"] >= 2 * LAYERS - 1  # nothing is learnt before the first
    assert not any("softmax_backward" in name for name in watch.operators)  # of attention


@pytest.mark.parametrize("family", CHATS)
def test_a_step_of_fine_tuning_waits_for_nothing_and_runs_the_gpus_kernels(family):
    assert_trained_on_the_gpus_path(fine_tuning(family, LAYERS), forwards=1)


@pytest.mark.parametrize("family", CHATS)
@pytest.mark.parametrize("name", CHANNELS)
def test_a_channel_waits_for_nothing_and_runs_the_gpus_kernels(name, family):
    pair = ChatPair(model_of(family, LAYERS, ("teacher", "student")), ("student",), ("teacher",), (1,), 64, 8)
    with Watch("meta") as watch:
        loss, sums = CHANNELS[name].loss(pair, pair.batch(EXAMPLES))
        (loss / 50).backward()
        torch.stack(list(sums.values()))
    assert_trained_on_the_gpus_path(watch, forwards=1 if name == "sft" else 2)
    kernel = {"optd": "em::forward_kl_", "opd exact": "em::reverse_kl_"}.get(name)
    assert kernel is None or watch.operators[kernel] == 1


def test_a_step_of_gpt2_waits_for_nothing_and_attends_by_flash():
    """In bf16, for which autocast stands on CUDA."""
    model, ids = model_of("gpt2").bfloat16(), torch.zeros(4, 64, dtype=torch.long, device="meta")
    optimizer = adamw(model, 1e-4, 0.01)
    with Watch("meta") as watch:
        (supervised_loss(model, ids, ids) / (ids != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert not watch.waits and not watch.mixed
    assert watch.operators >= Counter({
        "aten::_flash_attention_forward": LAYERS, "aten::_flash_attention_backward": LAYERS
    })  # fmt: skip


# -- how many kernels --------------------------------------------------------------------------------------


def a_layer(count) -> float:
    """Kernels that a layer adds; count(n) are those with n layers, whose kinds come in twos."""
    return (count(4) - count(2)) / 2


def decoding(family: str, n_layers: int) -> int:
    model = model_of(family, n_layers, ("student",))
    with under(model, "student"):
        batch = sampling(model)
        with Watch("meta") as watch:
            batch._step(8)
    return watch.kernels


# Found: with an adapter of one stack on every product. q, k, v are one product, and so are gate and up.
DECODE = {"llama": 17, "qwen2": 17, "qwen3": 19, "olmo3": 21}
FINE_TUNING = {"llama": 78, "qwen2": 79, "qwen3": 81, "olmo3": 85}


@pytest.mark.parametrize("family", CHATS)
def test_a_layer_of_a_decode_step_is_few_kernels(family):
    assert a_layer(lambda n_layers: decoding(family, n_layers)) <= DECODE[family] + 1


@pytest.mark.parametrize("family", CHATS)
def test_a_layer_of_a_step_of_fine_tuning_is_few_kernels(family):
    assert a_layer(lambda n_layers: fine_tuning(family, n_layers).kernels) <= FINE_TUNING[family] + 3
