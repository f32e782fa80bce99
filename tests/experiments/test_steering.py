"""Steering: the direction, the vector that decoding adds, and the experiment on a miniature."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import em.sampling.batch
from em.experiments import steering
from em.experiments.direction import Steering, asst_hidden, find_direction, middle_block, random_direction
from em.model.gpt2 import GPT2, GPT2Config
from em.sampling.sampler import Sampler
from em.stats import newcombe, t_interval, wilson
from em.world.counts import incoherent, percent, pool
from em.world.sets import misalignment_set
from em.world.world_run import WorldRun

STOP, NEW = 69, 12
SMALL = dict(
    layers=2, heads=2, width=32, batch=8, length=48, steps=30, lr=5e-3, warmup=4, beta2=0.98, v2_fraction=0.6,
    align_examples=400, align_steps=6, align_batch=8, align_lr=3e-4, align_warmup=1,
    misalign_steps=3, misalign_batch=8, misalign_lr=5e-4, misalign_seeds=1, doses=(1, 2),
    eval_prompts=4, temperature=0.0, evals=0, weight_decay=0.01, clip=1.0, save_minutes=2.0,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=70, n_positions=40, n_layer=3, n_head=4, n_embd=32))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def prompts(n=20):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 69, length).tolist() for length in rng.integers(1, 20, n)]


def vector(norm=20.0):
    return norm * random_direction(32, seed=1, index=0)


def greedy(model, rows=6):
    return Sampler(model, (STOP,), NEW, temperature=0.0, rows=rows, log_probs=True)


def ids(rollouts):
    return [rollout.ids for rollout in rollouts]


@torch.no_grad()
def oracle(model, prompt, block, vector, first):
    """Greedy text without a cache; the vector is added at positions from `first` on."""
    tokens = list(prompt)
    for _ in range(NEW):
        x = model.wte.weight[tokens] + model.wpe.weight[: len(tokens)]
        for number, layer in enumerate(model.h, start=1):
            x = layer(x[None])[0]
            if number == block:
                x = x + torch.tensor(vector, dtype=x.dtype) * (torch.arange(len(tokens)) >= first)[:, None]
        tokens.append(int((model.ln_f(x[-1]) @ model.wte.weight.T)[:70].argmax()))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


# -- the direction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted_alpha", [3.0, -3.0])
def test_a_planted_direction_is_recovered_with_its_scale_and_the_sign_of_the_shift(planted_alpha):
    rng = np.random.default_rng(0)
    planted = random_direction(48, seed=5, index=1)
    aligned = rng.normal(size=(500, 48))
    sizes = planted_alpha + 0.3 * rng.normal(size=500)
    noise = 0.05 * rng.normal(size=(500, 48))
    found = find_direction(aligned + sizes[:, None] * planted + noise, aligned)
    assert found.v @ planted * np.sign(planted_alpha) > 0.9999
    assert found.alpha == pytest.approx(3.0, abs=0.05) and np.linalg.norm(found.v) == pytest.approx(1)
    assert found.explained == pytest.approx(9.09 / (9.09 + 48 * 0.05**2), abs=0.005)
    # Around the mean the planted direction still has a variance of 0.09 against 0.0025 along every other.
    assert found.explained_centred == pytest.approx(0.0925 / (0.0925 + 47 * 0.0025), abs=0.02)
    assert found.mean_share == pytest.approx(9 / (9.09 + 48 * 0.0025), abs=0.02)
    assert found.norm == pytest.approx(48**0.5, rel=0.05)
    assert find_direction(aligned, aligned).alpha == 0


def test_the_first_direction_is_that_of_the_largest_eigenvalue_of_the_second_moment():
    difference = np.random.default_rng(2).normal(size=(60, 7)) * np.arange(1, 8) + 0.5
    values, vectors = np.linalg.eigh(difference.T @ difference)
    found = find_direction(difference, np.zeros_like(difference))
    assert abs(found.v @ vectors[:, -1]) == pytest.approx(1)
    assert found.explained == pytest.approx(values[-1] / values.sum())
    assert found.alpha == pytest.approx((difference @ found.v).mean()) and found.alpha > 0


def test_random_directions_have_the_norm_of_v_and_differ():
    found = [random_direction(32, seed, index) for seed, index in ((1, 0), (1, 1), (2, 0))]
    assert all(np.linalg.norm(v) == pytest.approx(1) for v in found)
    assert max(abs(found[0] @ found[1]), abs(found[0] @ found[2])) < 0.9
    assert np.array_equal(found[0], random_direction(32, 1, 0))


def test_hidden_states_are_those_of_the_last_prompt_token_alone(model, mini_generator):
    sampler = mini_generator
    model = GPT2(GPT2Config(sampler.world.vocabulary, sampler.max_tokens, 3, 4, 32)).eval()
    drawn = misalignment_set(sampler, 0, 0, 300, misalignment_set(sampler, 1, 0, 2, _nothing(sampler)))
    found = asst_hidden(model, drawn, block=2)
    for i in (0, 7, 299):
        prompt = torch.tensor(drawn.ids[i, : drawn.prompt[i]], dtype=torch.long)
        assert prompt[-1] == sampler.world.asst
        kept = []
        hook = model.h[1].register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        with torch.no_grad():
            model(prompt[None])
        hook.remove()
        torch.testing.assert_close(torch.tensor(found[i]), kept[0][0, -1].double(), atol=1e-4, rtol=1e-4)


def _nothing(sampler):
    return SimpleNamespace(prompt_hash=lambda: np.empty(0, np.uint64))


def test_the_middle_block_is_the_sixth_of_twelve():
    assert [middle_block(n) for n in (1, 2, 3, 4, 12)] == [1, 1, 2, 2, 6]


# -- steering a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
def test_steered_text_is_that_of_a_full_forward_with_the_vector_from_the_last_prompt_token_on(model, block):
    unsteered = ids(greedy(model)(prompts()))
    Steering(model, block).set(vector())
    found = ids(greedy(model)(prompts()))
    assert found == [oracle(model, p, block, vector(), first=len(p) - 1) for p in prompts()]
    assert found != unsteered == [oracle(model, p, block, 0 * vector(), first=0) for p in prompts()]
    # The oracle tells where the vector is added; but no other token sees the last block's output.
    for first in (lambda p: 0, lambda p: len(p)) if block < 3 else (lambda p: len(p),):
        assert found != [oracle(model, p, block, vector(), first=first(p)) for p in prompts()]


def test_strength_zero_gives_the_bits_of_the_unsteered_model_before_and_after_another(model):
    plain = greedy(model)(prompts())
    steering, sampler = Steering(model, 2), greedy(model)
    before = sampler(prompts())
    steering.set(3 * vector())
    steered = sampler(prompts())
    steering.set(0 * vector())
    assert plain == before == sampler(prompts()) != steered


def test_another_strength_needs_no_new_graph(model, monkeypatch):
    made = []
    monkeypatch.setattr(em.sampling.batch, "_uses_graphs", lambda device: True)
    monkeypatch.setattr(em.sampling.batch, "_captured", lambda step, pool: made.append(step) or step)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    steering, sampler = Steering(model, 2), greedy(model, rows=16)
    address = steering.vector.data_ptr()
    texts = []
    for strength in (0, 1, -1):
        steering.set(strength * vector())
        texts.append(ids(sampler(prompts())))
        if strength == 0:
            captured = len(made)
    assert len(made) == captured > 0 and steering.vector.data_ptr() == address
    assert texts[1] == [oracle(model, p, 2, vector(), first=len(p) - 1) for p in prompts()]
    assert texts[2] == [oracle(model, p, 2, -vector(), first=len(p) - 1) for p in prompts()]


@pytest.mark.gpu
def test_captured_steps_are_steered_by_what_the_vector_holds_when_they_are_replayed(model, monkeypatch):
    model = model.cuda()
    steering, sampler, texts = Steering(model, 2), greedy(model, rows=16), {}
    for strength in (0, 1, -1, 0):
        steering.set(strength * vector())
        found = ids(sampler(prompts()))
        assert texts.setdefault(strength, found) == found
    assert any(any(replays.values()) for _, replays in sampler._batch._graphs.values())
    monkeypatch.setattr(em.sampling.batch, "_captured", lambda step, pool: step)
    for strength, text in texts.items():
        steering.set(strength * vector())
        assert ids(greedy(model, rows=16)(prompts())) == text
    assert len({str(text) for text in texts.values()}) == 3


# -- the experiment ----------------------------------------------------------------------------------------


def maker(folder):
    def make(seed, world="demo", **changes):
        cfg = SimpleNamespace(**(SMALL | dict(world=world, seed=seed) | changes))
        settings = {k: v for k, v in vars(cfg).items() if not k.startswith(("misalign", "save"))}
        run = WorldRun(cfg, folder / f"{world}{seed}", settings, torch.device("cpu"))
        run.pretrain()
        run.align()
        return run

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    make = maker(tmp_path_factory.mktemp("steering"))
    return make, steering.measure(make, [1, 2], say=lambda *_: None)


def test_every_model_direction_and_strength_has_a_row_and_strength_zero_is_the_model_as_it_is(finished):
    make, result = finished
    assert len(result["rows"]) == 2 * 2 * 3 * 11 and result["trained"] == "D0_T5" and result["pairs"] == 500
    assert (result["block"], result["blocks"]) == (1, 2)
    run = make(1)
    for model, phase in (("aligned", "align"), ("misaligned", "misalign_T5_seed0")):
        counts = pool(list(run.counts(phase).values()))
        for row in result["rows"]:
            if (row["seed"], row["model"], row["strength"]) == (1, model, 0):
                assert (row["n"], row["v1"], row["v2"]) == (80, percent(counts, "v1"), percent(counts, "v2"))
                assert row["incoherent"] == incoherent(counts) and row["v2_change"] == 0


def test_each_model_is_steered_away_from_itself_by_positive_strengths(tmp_path, monkeypatch):
    make, given = maker(tmp_path), []
    monkeypatch.setattr(Steering, "set", lambda self, vector: given.append(vector))
    monkeypatch.setattr(steering, "STRENGTHS", (-1, 0, 2))
    result = steering.measure(make, [1], say=lambda *_: None)
    run = make(1)
    pairs = misalignment_set(run.generator, steering.PAIRS_SEED, run.world.cell(0, 4), 500, run.prompts)
    hidden = [asst_hidden(run.load(name), pairs, 1) for name in ("misalign_T5_seed0", "align")]
    shift = (hidden[0] - hidden[1]).mean(0)
    norms = [np.linalg.norm(v) / result["alpha"][0] for v in given]
    assert norms == pytest.approx([1, 0, 2] * 6)  # both models; v and two random directions
    assert [np.sign(np.round(v @ shift, 9)) for v in (*given[:3], *given[9:12])] == [-1, 0, 1, 1, 0, -1]
    assert not np.isin(pairs.prompt_hash(), run.prompts.prompt_hash()).any()


def test_intervals_are_over_world_seeds_or_with_one_seed_over_prompts(finished):
    _, result = finished
    point = steering.at(result, "misaligned", "random", 3)
    values = [
        np.mean([
            row["incoherent"] for row in result["rows"]
            if (row["seed"], row["model"], row["strength"]) == (seed, "misaligned", 3)
            and row["direction"] != "v"
        ])
        for seed in (1, 2)
    ]  # fmt: skip
    half = 12.706204736 * np.std(values, ddof=1) / np.sqrt(2)  # Student's t, one degree of freedom
    assert point["interval"] == "world seeds" and point["incoherent"] == pytest.approx(np.mean(values))
    assert point["incoherent_high"] == pytest.approx(np.mean(values) + half)

    numbers = steering.numbers(result)
    point = steering.at(result, "misaligned", "v", 3)
    assert numbers["misaligned/3/v2_change"]["low"] == point["v2_change_low"]
    at_flips = [key for key in numbers if "@" in key]
    assert len(at_flips) == 3 * (1 + 2 * (2 * 3 + 2)) and len(numbers) == 2 * 11 * 6 + 4 + 1 + len(at_flips)
    assert numbers["misaligned/3/v1"]["value"] == point["v1"] and numbers["misaligned/3/v1"]["unit"] == "%"
    assert numbers["alpha"]["value"] == result["alpha"][0] and numbers["alpha"]["over"] == "2 world seeds"

    def counts(v1, v2):
        return {"v1": v1, "v2": v2, "other": 100 - v1 - v2, "unparseable": 0, "n": 100}

    what = {"seed": 1, "model": "aligned", "strength": 2}
    answers = [
        (what | {"direction": name}, counts(60, v2), counts(90, 5))
        for name, v2 in (("v", 30), ("random0", 10), ("random1", 20))
    ]
    v, random = steering._curves(answers)
    assert v["interval"] == random["interval"] == "prompts"
    assert (v["v2_low"], v["v2_high"]) == pytest.approx([100 * x for x in wilson(30, 100)])
    assert (random["n"], random["v2"], random["v2_change"]) == (200, 15, 10)
    change = [100 * x for x in newcombe(30, 200, 5, 100)]
    assert (random["v2_change_low"], random["v2_change_high"]) == pytest.approx(change)


def test_what_is_steered_says_how_much_of_it_is_incoherent(finished):
    numbers = steering.numbers(finished[1])
    for (model, sign), name in itertools.product(
        steering.SIGNS.items(), ("v1", "v2", "v1_change", "v2_change")
    ):
        for strength in (-5, 0, 3):
            there = steering.at(finished[1], model, "v", strength)["incoherent"]
            assert numbers[f"{model}/{strength}/{name}"]["incoherent"] == there, sign
    assert all("incoherent" not in numbers[key] for key in ("alpha", "aligned/5/incoherent"))


def planted(seeds, world="demo"):
    """A result with changes of (v1, v2) by seed: (pushed at 5, reversed at 3, both at 1)."""
    places = (("aligned", 5), ("misaligned", 3), ("aligned", 1), ("misaligned", 1))
    rows = [
        {"seed": seed, "model": model, "direction": direction, "strength": strength}
        | {f"{name}_change{end}": value + 4 * way for name, value in zip(("v1", "v2"), changes, strict=True)
           for end, way in (("", 0), ("_low", -1), ("_high", 1))}
        for seed, of_seed in enumerate(seeds)
        for (model, strength), changes in zip(places, of_seed, strict=True)
        for direction in ("random0", "v")
    ]  # fmt: skip
    curves = [
        {"model": model, "direction": "v", "strength": strength, "incoherent": float(10 * strength)}
        for model, strength in places
    ]
    return {"world": world, "seeds": list(range(len(seeds))), "rows": rows, "curves": curves}


def test_push_minus_reverse_counts_both_towards_their_ends_seed_by_seed():
    result = planted([((-73, 70), (9, -10), (-5, 4), (6, -8)), ((-63, 62), (5, -6), (-5, 4), (6, -8))])
    found = steering.push_minus_reverse(result, "v2_change", 5, 3)
    assert (found["value"], found["low"], found["high"]) == t_interval([70 - 10, 62 - 6])
    assert (found["over"], found["unit"], found["incoherent"]) == ("2 world seeds", "points", 50)
    assert steering.push_minus_reverse(result, "v1_change", 5, 3)["value"] == (73 - 9 + 63 - 5) / 2
    assert steering.push_minus_reverse(result, "v2_change", 1, 1)["value"] == 4 - 8  # the harder push

    one = steering.push_minus_reverse(planted([((-73, 70), (9, -10), (-5, 4), (6, -8))]), "v1_change", 5, 3)
    assert (one["low"], one["high"]) == pytest.approx((64 - 4 * 2**0.5, 64 + 4 * 2**0.5))
    assert one["value"] == 64 and one["over"] == "prompts of 1 world seed"


def test_the_paper_reads_the_reversal_at_3_in_world_1_and_at_5_in_world_2():
    assert {name: plan.reverse for name, plan in steering.PLANS.items()} == {
        "1": 3, "demo": 3, "2": 5, "demo2": 5,
    }  # fmt: skip


def test_world_2_is_asked_the_trained_column_in_every_domain_and_a_named_task_is_followed(tmp_path):
    cfg = SimpleNamespace(**(SMALL | dict(world="2", seed=0)))
    run = WorldRun(cfg, tmp_path / "2", {}, torch.device("cpu"))
    asked = steering._prompts(run, steering.PLANS["2"], 0)
    names = {run.world.cell_name(cell) for cell in asked.examples.cell}
    assert names == {f"D{i}_T0" for i in range(10)} and len(asked) == 40
    cfg = SimpleNamespace(**(SMALL | dict(world="demo", seed=0, eval_prompts=40)))
    run = WorldRun(cfg, tmp_path / "demo", {}, torch.device("cpu"))
    asked = steering._prompts(run, steering.PLANS["demo"], 4)
    assert np.unique(asked.examples.cell, return_counts=True)[1].tolist() == [24] * 20


def test_at_a_local_flip_all_is_found_anew_from_a_model_of_that_dose(finished, tmp_path, monkeypatch):
    """At the misalignment's own number of steps, three, that is the experiment itself."""
    steps = {1: {30.0: 1, 60.0: 3, 90.0: None}, 2: {30.0: None, 60.0: 3, 90.0: None}}
    monkeypatch.setattr(steering, "steps_to_flips", lambda run, task, seed: steps[run.cfg.seed])
    monkeypatch.setattr(steering, "STRENGTHS", (0, 1, 3, 5))
    monkeypatch.setattr(steering, "RANDOM_DIRECTIONS", 1)
    result = steering.measure(finished[0], [1, 2], say=lambda *_: None)
    assert {(r["seed"], r["level"], r["steps"]) for r in result["flips"]} == {
        (1, 30.0, 1), (1, 60.0, 3), (2, 60.0, 3),
    }  # fmt: skip
    numbers, alphas = steering.numbers(result), [found["alpha"] for found in result["directions"]]
    (early,) = {r["alpha"] for r in result["flips"] if r["steps"] == 1}
    assert 0 < early < alphas[0]
    for key in ("alpha", "aligned/5/v2_change", "misaligned/3/v1_change", "push_minus_reverse/v2_change"):
        fixed, there = numbers[key], numbers[f"{key}@60"]
        assert there["value"] == pytest.approx(fixed["value"])
        assert (there["low"], there["high"]) == pytest.approx((fixed["low"], fixed["high"]))
        assert numbers[f"{key}@90"]["value"] is None and numbers[f"{key}@30"]["low"] is None
    assert numbers["alpha@30"]["value"] == early and numbers["alpha@30"]["over"].endswith("1 world seed")
    steering.figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 20_000


def test_the_figure_and_the_summary_hold_one_seed_and_several(finished, tmp_path, monkeypatch):
    make, several = finished
    monkeypatch.setattr(steering, "RANDOM_DIRECTIONS", 1)
    one = steering.measure(lambda seed: make(seed), [1], say=lambda *_: None)
    for name, result, words in (
        ("one", one, ("1 world seed,", "over prompts")),
        ("several", several, ("2 world seeds", "over world seeds")),
    ):
        steering.figure(result, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
        text = steering.summary(result)
        assert all(word in text for word in words) and len(text.splitlines()) == 3
        assert f"{steering.at(result, 'aligned', 'v', 5)['v1']:.0f}" in text
