"""The sampler against full forwards without a cache, row by row, for both model families."""

import functools
import weakref

import pytest
import torch
from goodness_of_fit import chi_squared
from sampled import sample
from tiny_models import ours_from, reference_model
from torch._subclasses.fake_tensor import FakeTensorMode

import em.sampling.batch
import em.sampling.cpu_linear
from em.errors import UserError
from em.model import lora
from em.model.gpt2 import GPT2, GPT2Config
from em.sampling.batch import Batch
from em.sampling.sampler import Sampler

STOPS = (7, 30)
LENGTHS = (3, 11, 7, 1, 11, 20, 2)


@functools.cache
def gpt2(vocab_size: int = 50) -> GPT2:
    torch.manual_seed(3)
    model = GPT2(GPT2Config(vocab_size=vocab_size, n_positions=56, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)).mul_(3)
    return model.requires_grad_(False)


@functools.cache
def decoder(case: str):
    return ours_from(reference_model(case)).requires_grad_(False)


MODELS = {
    "gpt2": gpt2,
    "llama": functools.partial(decoder, "llama, tied, own head size, linear"),
    "qwen2, sliding": functools.partial(decoder, "qwen2, sliding, tied"),
    "olmo3": functools.partial(decoder, "olmo3, yarn"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(params=["packed", "plain"])
def packing(request, monkeypatch):
    """Both ways of multiplying on a CPU."""
    if request.param == "plain":
        monkeypatch.setattr(em.sampling.cpu_linear, "_can_reorder", lambda weight: False)


def prompts(seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 49, (n,), generator=generator).tolist() for n in LENGTHS]


def full_log_probs(model, prompt, ids, temperature=1.0):
    """Log-probabilities (T, V) of the tokens that follow `prompt`, without a cache, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1, : model.config.vocab_size]
    return (logits.double() / temperature).log_softmax(-1)


def texts(rollouts):
    return [(r.prompt_index, r.sample, r.ids, r.finished) for r in rollouts]


# -- cached decoding equals the full forward -------------------------------------------------------------


def test_greedy_sampling_of_a_ragged_batch_equals_the_uncached_argmax_row_by_row(model, packing):
    unstopped = sample(model, prompts(), (), 30, temperature=0)
    stops = (unstopped[1].ids[4], unstopped[5].ids[12])  # so that lengths differ
    rollouts = sample(model, prompts(), stops, 30, temperature=0, rows=4)
    assert len({len(r.ids) for r in rollouts}) > 2
    for rollout, prompt in zip(rollouts, prompts(), strict=True):
        expected = []
        while len(expected) < 30 and not (expected and expected[-1] in stops):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + expected]))[0, -1, : model.config.vocab_size]
            expected.append(int(logits.argmax()))
        assert rollout.ids == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_log_probs_are_those_of_a_full_forward(model, temperature, packing):
    rollouts = sample(model, prompts(), STOPS, 30, n=2, temperature=temperature, rows=5, log_probs=True)
    for r in rollouts:
        expected = full_log_probs(model, prompts()[r.prompt_index], r.ids, temperature or 1.0)
        expected = expected.gather(1, torch.tensor(r.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(r.log_probs).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_frequencies_match_the_softmax(model, temperature):
    """Of the first token and, given the likeliest first one, of the second."""
    n, prompt = 10_000, [4, 8, 15]
    V = model.config.vocab_size
    rollouts = sample(model, [prompt], (), 2, n=n, temperature=temperature, rows=4096)
    pairs = torch.tensor([r.ids for r in rollouts])
    first = full_log_probs(model, prompt, [0], temperature)[0].exp()
    assert abs(chi_squared(torch.bincount(pairs[:, 0], minlength=V), n * first)) < 5
    given = int(first.argmax())
    second = pairs[pairs[:, 0] == given, 1]
    expected = full_log_probs(model, prompt, [given, 0], temperature)[1].exp() * len(second)
    assert len(second) > 200 and abs(chi_squared(torch.bincount(second, minlength=V), expected)) < 5


# -- same seed, same text ------------------------------------------------------------------------------


def test_the_text_does_not_depend_on_the_batch_size_or_on_who_else_is_asked(model):
    whole = sample(model, prompts(), STOPS, 12, n=3, seed=9, rows=100)
    assert len({len(r.ids) for r in whole}) > 1  # rows end at different times
    for rows in (1, 3):
        assert texts(sample(model, prompts(), STOPS, 12, n=3, seed=9, rows=rows)) == texts(whole)
    part = [5, 0, 3]
    again = sample(model, [prompts()[i] for i in part], STOPS, 12, n=[1, 3, 2], seed=9, indices=part, rows=2)
    by_name = {(r.prompt_index, r.sample): r.ids for r in whole}
    assert [(r.prompt_index, r.sample) for r in again] == [(5, 0), (0, 0), (0, 1), (0, 2), (3, 0), (3, 1)]
    assert all(r.ids == by_name[r.prompt_index, r.sample] for r in again)


def test_a_shorter_limit_gives_the_beginning_of_the_same_text(model):
    long, short = (sample(model, prompts(), STOPS, limit, seed=1) for limit in (25, 6))
    assert [r.ids[:6] for r in long] == [r.ids for r in short]


def test_seeds_prompts_and_samples_are_independent():
    """The first tokens of one prompt asked again and again, compared pairwise."""
    model, n = gpt2(), 3000
    ask = functools.partial(sample, model, [[4, 8, 15]] * n, (), 1, rows=4096)
    one, two = ask(n=2, seed=0), ask(seed=1)
    p = full_log_probs(model, [4, 8, 15], [0])[0].exp()
    a, b, c = (torch.tensor([r.ids[0] for r in rs]) for rs in (one[0::2], one[1::2], two))
    agree = float((p**2).sum())  # how often two independent draws do
    for x, y in ((a, b), (a, c), (a, a.roll(1)), (a, b.roll(1))):
        assert abs((x == y).double().mean() - agree) < 5 * (agree * (1 - agree) / n) ** 0.5
    assert abs(chi_squared(torch.bincount(torch.cat((a, b, c)), minlength=50), 3 * n * p)) < 5


# -- what a rollout holds --------------------------------------------------------------------------------


def test_rollouts_end_with_the_first_stop_token_or_are_cut_at_the_limit_and_say_which():
    rollouts = sample(gpt2(), prompts(), STOPS, 20, n=8, temperature=1.5)
    assert {r.finished for r in rollouts} == {True, False}
    for r in rollouts:
        assert not set(r.ids[:-1]) & set(STOPS)
        assert (r.ids[-1] in STOPS) if r.finished else (len(r.ids) == 20 and r.ids[-1] not in STOPS)
    assert {r.ids[-1] for r in rollouts if r.finished} == set(STOPS)


def test_a_stop_token_in_the_last_place_counts_as_finished():
    long = next(r for r in sample(gpt2(), prompts(), STOPS, 20, n=8) if r.finished and len(r.ids) > 2)
    n = len(long.ids)
    again = sample(gpt2(), prompts(), STOPS, n, n=8)
    assert next(r for r in again if r[:2] == long[:2]) == long


def test_rollouts_come_in_the_order_of_the_prompts_and_the_stream_yields_each_once():
    sampler = Sampler(gpt2(), STOPS, 20, rows=3)
    counts = [2, 0, 1, 3, 1, 0, 2]
    rollouts = sampler(prompts(), n=counts)
    expected = [(i, s) for i, n in enumerate(counts) for s in range(n)]
    assert [(r.prompt_index, r.sample) for r in rollouts] == expected
    streamed = list(sampler.stream(prompts(), n=counts))
    assert sorted(streamed, key=lambda r: r[:2]) == rollouts and streamed != rollouts
    assert sampler([]) == [] and sampler(prompts(), n=0) == []


def test_padded_vocabulary_rows_are_never_sampled():
    """Rows 50–63 pad the embedding; make them by far the likeliest."""
    rigged = GPT2(gpt2().config).eval()
    rigged.load_state_dict(gpt2().state_dict())
    with torch.no_grad():
        rigged.wte.weight[50:] = rigged.ln_f.bias + 100 * rigged.ln_f.weight
        assert rigged(torch.ones(1, 2, dtype=torch.long))[0, -1].argmax() >= 50
    for temperature in (0.0, 1.0):
        for r in sample(rigged, [[1, 1]] * 64, (), 4, temperature=temperature):
            assert max(r.ids) < 50


# -- how the batch is used -------------------------------------------------------------------------------


def recorded(monkeypatch) -> dict:
    """What the batch is made to do: prompts prefilled, and rows computed a step."""
    log = {"prefilled": [], "rows": []}
    prefill, step = Batch.prefill, Batch._step

    def watched_prefill(self, pairs):
        log["prefilled"] += [ids for _, ids in pairs]
        prefill(self, pairs)

    def watched_step(self, n):
        log["rows"].append(n)
        step(self, n)

    monkeypatch.setattr(Batch, "prefill", watched_prefill)
    monkeypatch.setattr(Batch, "_step", watched_step)
    return log


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_a_prompt_is_prefilled_once_whatever_n_and_however_its_samples_are_admitted(monkeypatch, rows):
    log = recorded(monkeypatch)
    sample(gpt2(), prompts(), STOPS, 20, n=4, rows=rows)
    assert sorted(log["prefilled"]) == sorted(prompt[:-1] for prompt in prompts())


def test_no_row_is_computed_for_nothing(monkeypatch):
    """A place is given on at once and the batch shrinks at the end, so rows computed = tokens sampled."""
    log = recorded(monkeypatch)
    rollouts = sample(gpt2(), prompts(), STOPS, 20, n=4, rows=6)
    assert sum(log["rows"]) == sum(len(r.ids) for r in rollouts)
    assert max(log["rows"]) == 6 and log["rows"][-1] < 6


def test_samples_of_one_prefill_equal_those_of_prefills_of_their_own(model):
    together = sample(model, prompts(), STOPS, 25, n=3, seed=4, log_probs=True)
    for r in together[::5]:
        counts = [0] * len(LENGTHS)
        counts[r.prompt_index] = r.sample + 1
        alone = sample(model, prompts(), STOPS, 25, n=counts, seed=4, log_probs=True, rows=1)[-1]
        assert alone.ids == r.ids
        assert alone.log_probs == pytest.approx(r.log_probs, abs=1e-4)


def test_a_second_call_keeps_the_cache_and_a_longer_prompt_enlarges_it():
    sampler = Sampler(gpt2(), STOPS, 10, rows=4)
    first = sampler(prompts())
    cache = sampler._batch.cache
    assert sampler(prompts()[:2]) == first[:2] and sampler(prompts()) == first
    assert sampler._batch.cache is cache
    longer = [*prompts(), prompts()[5] + prompts()[1] + prompts()[4]]
    sampler = Sampler(decoder("qwen2, sliding, tied"), STOPS, 22, rows=4)
    sampler(prompts())
    assert sampler._batch.cache.capacity == 64
    assert texts(sampler(longer)) == texts(sample(sampler.model, longer, STOPS, 22))


def test_a_stream_left_early_does_not_disturb_the_next_call():
    sampler = Sampler(gpt2(), STOPS, 20, rows=3)
    expected = sampler(prompts(), n=2)
    next(sampler.stream(prompts(7), n=3))
    assert sampler(prompts(), n=2) == expected


# -- adapters, training ----------------------------------------------------------------------------------


def with_adapters():
    model = ours_from(reference_model("qwen2, sliding, tied"))
    lora.attach(model)
    generator = torch.Generator().manual_seed(0)
    for name in ("teacher", "student"):
        lora.add_adapter(model, name, rank=4, alpha=8)
        with torch.no_grad():
            for p in lora.trainable(model, name):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def test_under_a_stack_the_text_is_that_of_the_merged_weights(packing):
    model = with_adapters()
    sampler = Sampler(model, STOPS, 25, temperature=0, rows=4)
    base = sampler(prompts())
    found = {}
    for names in (("student",), ("teacher", "student"), ("student",)):
        with lora.stack(model, *names, frozen=True):
            found[names] = sampler(prompts())
    assert sampler(prompts()) == base
    assert len({str(texts(r)) for r in (base, *found.values())}) == 3
    for names, rollouts in found.items():
        merged = with_adapters()
        lora.merge(merged, *names)
        assert texts(sample(merged, prompts(), STOPS, 25, temperature=0)) == texts(rollouts)


def test_a_stack_must_be_frozen_and_stay_active():
    model = with_adapters()
    with lora.stack(model, "student"), pytest.raises(ValueError, match="frozen"):
        sample(model, prompts(), STOPS, 5)
    with lora.stack(model, "student", frozen=True):
        stream = Sampler(model, STOPS, 5, rows=1).stream(prompts())
        next(stream)
    with pytest.raises(ValueError, match="no longer active"):
        next(stream)


def test_a_sampler_follows_its_model_as_it_learns(packing):
    """Full fine-tuning changes weights in place, an adapter's training its factors."""
    model = GPT2(gpt2().config)
    model.load_state_dict(gpt2().state_dict())
    adapted = with_adapters()
    lora.trainable(adapted, "student")
    for m, names in ((model, ()), (adapted, ("student",))):
        sampler = Sampler(m, STOPS, 20, temperature=0)
        frozen = functools.partial(lora.stack, m, *names, frozen=True) if names else torch.no_grad
        with frozen():
            before = sampler(prompts())
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1, fused=True)
        with lora.stack(m, *names) if names else torch.enable_grad():
            m(torch.tensor(prompts()[1:2])).logsumexp(-1).sum().backward()
        optimizer.step()
        with frozen():
            after = sampler(prompts())
            assert texts(after) == texts(sample(m, prompts(), STOPS, 20, temperature=0)) != texts(before)


def test_the_caller_can_train_between_two_rollouts():
    model = with_adapters()
    parameters = lora.trainable(model, "student")
    with lora.stack(model, "teacher", frozen=True):
        stream = Sampler(model, STOPS, 10, rows=2).stream(prompts())
        next(stream)
        with lora.stack(model, "student"):
            model(torch.tensor(prompts()[1:2])).sum().backward()
        next(stream)
    assert all(p.grad is not None for p in parameters)


# -- what goes wrong -------------------------------------------------------------------------------------


def test_a_prompt_without_room_is_one_clear_line():
    sample(gpt2(), [[1] * 27], STOPS, 30)  # 56 positions: the last token is not fed back
    with pytest.raises(UserError, match="prompt 3 has 28 tokens.*--max-new-tokens") as error:
        sample(gpt2(), [[1] * 28], STOPS, 30, indices=[3])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="empty"):
        sample(gpt2(), [[]], STOPS, 30)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")])
def test_out_of_memory_names_the_knob_and_leaves_the_sampler_usable(monkeypatch, kind):
    sampler = Sampler(gpt2(), STOPS, 10)
    expected = sampler(prompts())

    def fail(*_):
        raise kind

    with monkeypatch.context() as patch, pytest.raises(UserError, match="lower --rows"):
        patch.setattr(Batch, "prefill", fail)
        sampler(prompts())
    assert sampler._batch is None  # its memory is given back
    assert sampler(prompts()) == expected

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="else"):
        kind = RuntimeError("something else")
        patch.setattr(Batch, "prefill", fail)
        sampler(prompts())


# -- CUDA graphs: their logic here, themselves on a GPU --------------------------------------------------


def test_a_step_reads_no_value_on_the_host(model, monkeypatch):
    """Which is what allows its capture. Fake tensors have no values to read."""
    monkeypatch.setattr(em.sampling.cpu_linear, "_can_reorder", lambda weight: False)
    Sampler(model, STOPS, 10)(prompts())  # what is computed once, is now
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        batch = Batch(model, 4, 40, STOPS, 10, 1.0)
        batch.begin_call()
        batch.cache.n_rows = 3
        batch._step(3)


@pytest.fixture
def captures(monkeypatch):
    """The GPU's way on the CPU: several steps a look, few batch sizes; a "graph" is the step itself.

    A list of (weak reference to the graph, its pool).
    """
    made = []

    def captured(step, pool):
        def graph():
            step()

        made.append((weakref.ref(graph), pool))
        return graph

    monkeypatch.setattr(em.sampling.batch, "_new_pool", object)
    monkeypatch.setattr(em.sampling.batch, "_uses_graphs", lambda device: True)
    monkeypatch.setattr(em.sampling.batch, "_captured", captured)
    return made


@pytest.mark.parametrize("model", ["gpt2", "qwen2, sliding"], indirect=True)
def test_the_way_of_a_gpu_gives_the_same_text(model, captures, monkeypatch):
    log = recorded(monkeypatch)
    found = [sample(model, prompts(), STOPS, 25, n=6, seed=2, rows=rows) for rows in (3, 16, 40)]
    assert {3, 8, 16, 40} <= set(log["rows"]) <= {3, 8, 10, 16, 20, 40} and captures
    with monkeypatch.context() as patch:
        patch.setattr(em.sampling.batch, "_uses_graphs", lambda device: False)
        expected = sample(model, prompts(), STOPS, 25, n=6, seed=2)
    assert all(texts(rollouts) == texts(expected) for rollouts in found)


def test_a_graph_is_captured_once_a_kind_and_again_only_for_factors_at_new_addresses(captures):
    model = with_adapters()
    sampler = Sampler(model, STOPS, 10, rows=4)

    def call(*names):
        before = len(captures)
        with lora.stack(model, *names, frozen=True):
            sampler(prompts())
        return len(captures) - before

    assert [call("student"), call("student"), call(), call("student"), call("teacher", "student")] == [
        1,
        0,
        1,
        0,
        1,
    ]
    lora.remove_adapter(model, "student")
    lora.add_adapter(model, "student", rank=4)
    assert [call("student"), call("student"), call()] == [1, 0, 0]


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(captures):
    """A pool is gone with its last graph, and a capture into it fails."""
    model = with_adapters()
    sampler = Sampler(model, STOPS, 10, rows=16)

    def call(*names):
        with lora.stack(model, *names, frozen=True):
            sampler(prompts(), n=3)

    def anew():
        lora.remove_adapter(model, "student")
        lora.add_adapter(model, "student", rank=4)

    call("student")
    assert len(captures) == 2  # 16 rows, and the 8 that are left at the end
    anew()
    call("student")
    call()
    anew()
    call("student")
    pools = [pool for _, pool in captures]
    assert len(captures) == 8
    assert len({id(pool) for pool in pools[:2]}) == 1 and len({id(pool) for pool in pools[2:]}) == 1
    assert pools[0] is not pools[2]  # both graphs of the first pool were gone
    assert [graph() is not None for graph, _ in captures] == [False] * 4 + [True] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt2", "qwen2, bfloat16", "qwen2 under a stack"])
def test_captured_steps_equal_eager_ones(family, monkeypatch):
    model = (
        with_adapters() if "stack" in family else MODELS["gpt2" if family == "gpt2" else "qwen2, sliding"]()
    )
    dtype = torch.float32 if family == "gpt2" else torch.bfloat16
    model = model.to("cuda", dtype)
    try:
        sampler = Sampler(model, STOPS, 25, rows=16, log_probs=True)
        names = ("teacher", "student") if "stack" in family else ()
        with lora.stack(model, *names, frozen=True) if names else torch.no_grad():
            graphed = [sampler(prompts(), n=6, seed=seed) for seed in (1, 2, 1)]
            assert any(any(replays.values()) for _, replays in sampler._batch._graphs.values())
            monkeypatch.setattr(em.sampling.batch, "_captured", lambda step, pool: step)
            eager = [
                Sampler(model, STOPS, 25, rows=16, log_probs=True)(prompts(), n=6, seed=seed)
                for seed in (1, 2)
            ]
        assert graphed[0] == graphed[2] == eager[0] and graphed[1] == eager[1] != eager[0]
    finally:
        if family != "qwen2 under a stack":
            model.to("cpu", torch.float32)


@pytest.mark.gpu
def test_steps_are_captured_again_when_all_graphs_of_their_pool_are_gone():
    model = with_adapters().to("cuda", torch.bfloat16)
    sampler = Sampler(model, STOPS, 25, rows=16)
    for seed in range(3):
        with lora.stack(model, "student", frozen=True):
            sampler(prompts(), n=6)
        lora.remove_adapter(model, "student")
        lora.add_adapter(model, "student", rank=4, seed=seed)
