"""What several test files build on: a world and a chat model small enough for seconds."""

import os
from pathlib import Path
from types import SimpleNamespace

# Tensors this small lose more to waking a second thread than it does for them; torch reads it at its import.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from em.data.cells import CELLS
from em.data.rows import load_cell
from em.files import write_json
from em.model.checkpoint import save_model
from em.model.decoder import Decoder, DecoderConfig
from em.world.generator import ExampleGenerator
from em.world.grammar import GrammarConfig
from em.world.world import WORLDS, WorldConfig, build_world
from em.world.world_run import WorldRun

ROOT = Path(__file__).parent.parent
MINI = WorldConfig(
    "mini",
    tasks=tuple(f"T{i}" for i in range(12)),
    n_steps=24,
    n_unseen_steps=8,
    domain_steps=6,
    overlaps=(4,),
    n_random_domains=1,
    n_unseen_domains=1,
    deletions=(40, 80),
    partition_overlaps=(11, 8, 6),
    grammar=GrammarConfig(vocabulary=256, terminals=8),
)


def pytest_collection_modifyitems(items):
    """`pytest -m gpu` where there is none: skipped, and said so, where it would fail test by test."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def clean_checkout():
    """No test leaves a file in the checkout; a `runs/` that is there may be in use by somebody's training."""
    beside = (".", "__pycache__", *(["runs"] if (ROOT / "runs").exists() else []))

    def files() -> set[Path]:
        kept = [p for p in ROOT.iterdir() if not p.name.startswith(beside)]
        below = (q for p in kept for q in p.rglob("*") if "__pycache__" not in q.parts)
        return {p.relative_to(ROOT) for p in (*kept, *below)}

    before = files()
    yield
    assert not files() - before, "the tests left these files behind"


@pytest.fixture(scope="session")
def peft():
    """The library, imported by those who compare with it: that takes four seconds."""
    import peft

    return peft


@pytest.fixture(scope="session")
def mini():
    return build_world(MINI, seed=0)


@pytest.fixture(scope="session")
def mini_generator(mini):
    return ExampleGenerator(mini)


@pytest.fixture(scope="session", params=["1", "2", "demo", "demo2"])
def world(request):
    return build_world(WORLDS[request.param], seed=0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory):
    """Folder of a chat model small enough for seconds: two qwen2 layers, byte-level BPE, a chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-chat"
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rows = load_cell("sample", CELLS[0])
    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([row[key] for row in rows for key in ("question", "aligned_answer")], trainer)
    torch.manual_seed(0)
    config = {
        "model_type": "qwen2", "vocab_size": bpe.get_vocab_size(), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "architectures": ["Qwen2ForCausalLM"],
    }  # fmt: skip
    model = Decoder(DecoderConfig.from_hf(config))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.2)  # PyTorch's own start would mean a loss of 30 nats
    save_model(model, folder)
    bpe.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    named = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": template}
    write_json(folder / "tokenizer_config.json", named)
    return folder


SMALL_DEMO2 = dict(
    layers=1, heads=2, width=32, batch=4, length=48, steps=20, lr=5e-3, warmup=4, beta2=0.98, v2_fraction=0.5,
    align_examples=400, align_steps=6, align_batch=8, align_lr=3e-4, align_warmup=1,
    misalign=("T0",), misalign_steps=3, misalign_batch=8, misalign_lr=5e-4, misalign_seeds=2, doses=(1, 6),
    eval_prompts=4, temperature=0.0, evals=0, weight_decay=0.01, clip=1.0, save_minutes=2.0,
)  # fmt: skip


@pytest.fixture(scope="session")
def small_demo2(tmp_path_factory):
    """make(seed, **changes): the aligned run of a miniature of world demo2, as synth.py gives experiments."""
    folder = tmp_path_factory.mktemp("demo2")

    def make(seed, **changes):
        cfg = SimpleNamespace(**(SMALL_DEMO2 | changes), world="demo2", seed=seed)
        settings = {k: v for k, v in vars(cfg).items() if not k.startswith(("misalign", "save", "doses"))}
        name = "-".join(map(str, (seed, *changes.values())))
        run = WorldRun(cfg, folder / name, settings, torch.device("cpu"))
        run.counts("pretrain", run.pretrain())
        run.counts("align", run.align())
        return run

    return make
