"""Teacher × data on the worlds: planted students on both sides, effects in closed form, coverage over seeds.

The students themselves: tests/distillation/test_world_cross.py.
"""

import itertools
import json

import numpy as np
import pytest

from em.distillation.world_cross import MODELS
from em.experiments import replication
from em.experiments.cross import (
    PAIRS,
    effects,
    figure,
    from_fisher,
    numbers,
    of_seed,
    over_seeds,
    rows_of,
    summary,
    whose,
)
from em.experiments.replication import replicated

CELLS = [f"D{d}_T{t}" for d in range(4) for t in (0, 1, 2, 4, 5)]
N = 128


def planted_rates(rng, lean, shape=()):
    """((3, C, …), (3, 3, C, …)) v2 as fractions: students have `lean` of their teacher's profile, the rest of
    their writer's. The two misaligned models' profiles are like in part, as those of T5 and T0 are.
    """
    common, *own = rng.uniform(0, 0.6, (3, len(CELLS), *shape))
    start = np.full((len(CELLS), *shape), 0.08)
    rise = np.array([0.3 * common + 0.7 * own[0], 0.3 * common + 0.7 * own[1], 0 * common])
    lean = np.asarray(lean)
    taught = [[start + 0.8 * (lean * rise[t] + (1 - lean) * rise[w]) for w in range(3)] for t in range(3)]
    taught[2] = [start] * 3  # the aligned teacher's students do not move
    return start + rise, np.array(taught)


def counts_of(v2, rng=None):
    """Counts by cell of (C,) rates; without `rng` the rates as they are, of very many prompts."""
    n = N if rng else 10**9
    k = rng.binomial(n, v2) if rng else np.round(n * v2)
    return {
        cell: {"v1": n - int(v), "v2": int(v), "other": 0, "unparseable": 0, "n": n}
        for cell, v in zip(CELLS, k, strict=True)
    }


def models(own, taught, rng=None):
    """The arguments of `of_seed`."""
    alone = {name: counts_of(v2, rng) for name, v2 in zip(MODELS, own, strict=True)}
    pairs = itertools.product(range(3), range(3))
    return alone, {(MODELS[t], MODELS[w]): counts_of(taught[t, w], rng) for t, w in pairs}


@pytest.mark.parametrize(("lean", "sign"), [(1.0, 1), (0.0, -1)])
def test_whose_profile_a_student_has_is_found_on_either_side(lean, sign):
    seeds = range(4)
    rng = np.random.default_rng(0)
    related = [of_seed(*models(*planted_rates(rng, lean), rng), seed)[0] for seed in seeds]
    number = over_seeds(related)
    for gap in ("teacher_minus_writer", "teacher_minus_data", "passed_minus"):
        low, high = (sign * number[gap][bound] for bound in ("low", "high"))
        assert 0 < min(low, high)
    for seed in related:  # over the prompts of one seed as well
        low, high = (sign * bound for bound in seed["teacher_minus_writer"][1])
        assert 0 < min(low, high)
    followed, other = ("with_teacher", "with_writer")[::sign]
    assert from_fisher(number[followed])["low"] > 0.8 > from_fisher(number[other])["high"]


def test_correlations_are_of_the_students_whose_teacher_and_writer_differ():
    own, taught = (100 * v2 for v2 in planted_rates(np.random.default_rng(1), 0.7))
    found = whose(own[..., None], taught[..., None])
    r = {(a, b): np.corrcoef(own[a] - own[2], own[b] - own[2])[0, 1] for a in (0, 1) for b in (0, 1)}
    student = {(t, w): taught[t, w] - taught[2, w] for t in (0, 1) for w in (0, 1)}

    def with_model(pair, model):
        return np.corrcoef(student[pair], own[model] - own[2])[0, 1]

    assert found["with_teacher"][0] == pytest.approx((with_model((0, 1), 0) + with_model((1, 0), 1)) / 2)
    assert found["with_writer"][0] == pytest.approx((with_model((0, 1), 1) + with_model((1, 0), 0)) / 2)
    assert found["of_the_teachers"][0] == pytest.approx(r[0, 1])
    same = [np.corrcoef(student[0, w], student[1, w])[0, 1] for w in (0, 1)]
    assert found["same_data"][0] == pytest.approx(np.mean(same))
    gap = found["with_teacher"] - found["with_writer"]
    assert found["teacher_minus_writer"] == pytest.approx(gap)


def test_what_passes_of_the_difference_between_two_models_is_as_planted():
    own, taught = (100 * v2 for v2 in planted_rates(np.random.default_rng(1), 0.7))
    found = whose(own[..., None], taught[..., None])
    assert found["passed_by_teacher"][0] == pytest.approx(0.8 * 0.7)
    assert found["passed_by_writer"][0] == pytest.approx(0.8 * 0.3)
    assert found["passed_minus"][0] == pytest.approx(0.8 * 0.4)


def test_the_control_is_the_aligned_teachers_student_on_the_same_data():
    """What data alone does to every student is no part of a profile."""
    own, taught = (100 * v2 for v2 in planted_rates(np.random.default_rng(2), 1.0))
    moved = taught + np.random.default_rng(3).uniform(-20, 20, (1, 3, len(CELLS)))
    before, after = (whose(own[..., None], of[..., None]) for of in (taught, moved))
    assert before["with_teacher"] == pytest.approx(1) and after["with_teacher"] == pytest.approx(1)
    delta = effects(taught[..., None], CELLS)["delta_v2/T5/T0/mean"]
    assert effects(moved[..., None], CELLS)["delta_v2/T5/T0/mean"] == pytest.approx(delta)


def test_main_effects_and_interaction_are_those_planted():
    teacher, data, both = np.array([30, 10, 0]), np.array([5, -3, 0]), np.zeros((3, 3))
    both[:2, :2] = 4  # misaligned teachers on misaligned writers' data
    taught = 20 + teacher[:, None] + data + both
    by_cell = np.broadcast_to(taught[:, :, None, None], (3, 3, len(CELLS), 1))
    found = {name: value[0] for name, value in effects(by_cell, CELLS).items()}
    assert found["main/teacher"] == pytest.approx(20 + 4 * 2 / 3)
    assert found["main/teacher/T5"] == pytest.approx(30 + 4 * 2 / 3)
    assert found["main/data"] == pytest.approx(1 + 4 * 2 / 3)
    assert found["main/data/T0"] == pytest.approx(-3 + 4 * 2 / 3)
    assert found["main/interaction"] == pytest.approx(4)
    assert found["delta_v2/T5/aligned/T1"] == pytest.approx(30)
    assert found["delta_v2/T0/T5/mean"] == pytest.approx(14)


def test_the_interval_of_the_gap_covers_over_world_seeds():
    """Seeds differ in whom their students follow, as likely either: cells as the unit would miss that."""
    rng, experiments, seeds = np.random.default_rng(0), 400, 5
    lean = rng.normal(0.5, 0.15, experiments * seeds)
    own, taught = planted_rates(rng, lean, shape=(experiments * seeds,))
    drawn = [100 * rng.binomial(N, v2.clip(0, 1)) / N for v2 in (own, taught)]
    gap = whose(*drawn)["teacher_minus_writer"].reshape(experiments, seeds)
    found = [replicated(values.tolist(), []) for values in gap]
    covered = np.mean([n["low"] < 0 < n["high"] for n in found])
    assert 0.92 < covered < 0.98


def test_over_the_prompts_of_one_seed_the_interval_lies_around_what_is_observed_and_covers(monkeypatch):
    """Drawing the rates again lowers a correlation: unmoved, the interval of a high one is below it."""
    monkeypatch.setattr(replication, "DRAWS", 300)
    rng = np.random.default_rng(0)
    own, taught = planted_rates(rng, 1.0)
    draws = 2000
    drawn = [100 * rng.binomial(N, np.repeat(v2[..., None], draws, -1)) / N for v2 in (own, taught)]
    truth = np.arctanh(whose(*drawn)["with_teacher"]).mean()
    inside = 0
    for seed in range(25):
        value, (low, high) = of_seed(*models(own, taught, rng), seed)[0]["with_teacher"]
        assert low < value < high
        inside += low < truth < high
    assert inside >= 21


def test_correlations_over_seeds_are_by_fishers_z():
    r = [0.9, 0.95, 0.99]
    z = np.arctanh(r)
    number = from_fisher(replicated(list(map(float, z)), [(0.5, None)] * 3))
    half = 4.30265273 * np.std(z, ddof=1) / 3**0.5  # t with two degrees of freedom
    assert number["mean"] == pytest.approx(np.tanh(z.mean())) and number["by_seed"] == pytest.approx(r)
    assert number["low"] == pytest.approx(np.tanh(z.mean() - half)) and number["high"] < 1
    assert number["prompts"][0] == [pytest.approx(np.tanh(0.5)), None]


def result_of(seeds, own, taught, rng=None):
    rows, related, moved = [], [], []
    for seed in seeds:
        alone, counts = models(own, taught, rng)
        for found, of in zip((related, moved), of_seed(alone, counts, seed), strict=True):
            found.append(of)
        rows += rows_of(seed, alone, counts)
    profile = {k: from_fisher(n) if k in PAIRS else n for k, n in over_seeds(related).items()}
    kept = {name: replicated([50.0] * len(seeds), []) for name in (*MODELS, "all three")}
    return {"world": "demo", "seeds": list(seeds), "profile": profile, "effects": over_seeds(moved),
            "kept": kept, "rows": rows}  # fmt: skip


def test_numbers_figure_and_summary_of_a_cross(tmp_path, monkeypatch):
    monkeypatch.setattr(replication, "DRAWS", 300)
    rng = np.random.default_rng(0)
    result = result_of((1, 2), *planted_rates(rng, 1.0), rng)
    found = numbers(result)
    assert found["profile/with_teacher/r"]["value"] > 0.8 and found["profile/with_teacher/r"]["unit"] == "r"
    assert found["profile/teacher_minus_writer"]["over"] == "2 world seeds"
    assert found["main/teacher"]["unit"] == "points" and "delta_v2/T5/T0/T1" in found and "kept/T5" in found
    assert len(result["rows"]) == 2 * 9 * len(CELLS)
    figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert "All three wrote v1 on 50 % of the prompts" in summary(result)


def test_students_that_do_not_move_have_no_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(replication, "DRAWS", 300)
    own, taught = planted_rates(np.random.default_rng(0), 1.0)
    taught[:] = taught[2, 2]
    result = result_of((1,), own, taught)
    json.dumps(result, allow_nan=False)
    found = numbers(result)
    assert found["profile/with_teacher/r"]["value"] is None
    assert found["profile/teacher_minus_writer"]["low"] is None
    assert found["main/teacher"]["value"] == 0 and found["profile/of_the_teachers/r"]["value"] is not None
    figure(result, tmp_path / "f.png")
    assert "—" in summary(result)
