"""Task against domain similarity: the shares on planted grids, and the experiment on a miniature."""

import json

import numpy as np
import pytest
from planted_run import PlantedRun

from em.errors import UserError
from em.experiments import similarity
from em.world.grammar import jaccard
from em.world.world import WORLDS, build_world

scipy = pytest.importorskip("scipy")

GRADED = [f"D{d}_{t}" for d in range(4) for t in similarity.TASKS]


@pytest.fixture(scope="module")
def demo2():
    return build_world(WORLDS["demo2"], seed=1)


def planted(world, rate, n=1000):
    """Counts by cell whose v2 share is rate(task similarity, domain similarity)."""
    counts = {}
    for domain, domain_similarity in enumerate(world.similarity()[0]):
        for task in world.tasks:
            overlap = jaccard(world.set1.get(task, frozenset()), world.set1["T8"])
            k = round(n * rate(overlap, float(domain_similarity)))
            counts[f"D{domain}_{task}"] = {"v1": n - k, "v2": k, "other": 0, "unparseable": 0, "n": n}
    return counts


def found(world, before, after, cells="all cells"):
    rows = similarity.rows_of(world, 1, before, after)
    return similarity.statistics_of(rows, before, after, cells)


def test_task_similarity_is_the_overlap_the_world_was_built_with():
    for name, half in (("2", 32), ("demo2", 8)):
        world = build_world(WORLDS[name], seed=3)
        for task, shared in zip(("T9", "T10", "T11"), WORLDS[name].partition_overlaps, strict=True):
            expected = shared / (2 * half - shared)
            assert jaccard(world.set1[task], world.set1["T8"]) == expected


def test_rows_say_which_domains_are_graded_random_and_held_out():
    world = build_world(WORLDS["2"], seed=0)
    kinds = [similarity.kind(world, d) for d in range(10)]
    assert kinds == ["graded"] * 4 + ["random"] * 4 + ["held-out"] * 2


def test_an_effect_of_the_task_alone_is_all_the_tasks(demo2):
    before, after = planted(demo2, lambda t, d: 0.1), planted(demo2, lambda t, d: 0.1 + 0.5 * t)
    numbers = found(demo2, before, after)
    assert numbers["task_unique"][0] == pytest.approx(1, abs=1e-3)
    assert numbers["domain_unique"][0] == pytest.approx(0, abs=1e-3)
    assert numbers["task_slope"][0] == pytest.approx(50, abs=0.3)
    assert numbers["domain_slope"][0] == pytest.approx(0, abs=0.3)
    low, high = numbers["unique_minus"][1]
    assert 0.8 < low < high <= 1


@pytest.mark.parametrize("cells, n", [("all cells", 16), ("without the trained cell", 15)])
def test_shares_are_those_of_the_correlations(demo2, cells, n):
    rng = np.random.default_rng(0)
    before = planted(demo2, lambda t, d: 0.05)
    after = planted(demo2, lambda t, d: 0.1 + 0.3 * t + 0.2 * d + 0.2 * rng.random())
    rows = [r for r in similarity.rows_of(demo2, 1, before, after) if r["kind"] == "graded"][16 - n :]
    t, d, y = (np.array([r[k] for r in rows]) for k in ("task_similarity", "domain_similarity", "delta_v2"))
    assert len(y) == n
    rt, rd, rtd = (scipy.stats.pearsonr(a, b).statistic for a, b in ((t, y), (d, y), (t, d)))
    both = (rt**2 + rd**2 - 2 * rt * rd * rtd) / (1 - rtd**2)
    numbers = {key: value for key, (value, _) in found(demo2, before, after, cells).items()}
    assert numbers["task_r2"] == pytest.approx(rt**2) and numbers["domain_r2"] == pytest.approx(rd**2)
    assert numbers["both_r2"] == pytest.approx(both)
    assert numbers["task_unique"] == pytest.approx(both - rd**2)
    assert numbers["unique_minus"] == pytest.approx(rt**2 - rd**2)
    partial = (rt - rd * rtd) / (1 - rtd**2) * y.std() / t.std()
    assert numbers["task_slope"] == pytest.approx(partial)
    orthogonal = numbers["task_unique"] == pytest.approx(numbers["task_r2"], abs=1e-9)
    assert orthogonal == (cells == "all cells")


def test_a_grid_that_does_not_move_has_no_shares_and_no_nan(demo2):
    still = planted(demo2, lambda t, d: 0.0)
    numbers = found(demo2, still, still)
    assert numbers["task_unique"][0] is None and numbers["task_slope"][0] == pytest.approx(0)
    json.dumps(numbers, allow_nan=False)


def test_the_prompt_interval_of_a_slope_covers_the_planted_slope(demo2):
    rng, covered, n = np.random.default_rng(0), 0, 128
    exact = planted(demo2, lambda t, d: 0.1 + 0.4 * t + 0.2 * d, 10**6)
    base = planted(demo2, lambda t, d: 0.05, n)
    for _ in range(60):
        after = {}
        for name, c in exact.items():
            k = int(rng.binomial(n, c["v2"] / c["n"]))
            after[name] = {"v1": n - k, "v2": k, "other": 0, "unparseable": 0, "n": n}
        rows = similarity.rows_of(demo2, int(rng.integers(10**6)), base, after)
        low, high = similarity.statistics_of(rows, base, after, "all cells")["task_slope"][1]
        covered += low <= 40 <= high
    assert covered / 60 > 0.85


def test_the_experiment_ends_with_a_grid_statistics_over_seeds_and_a_figure(small_demo2, tmp_path):
    said = []
    result = similarity.measure(small_demo2, [0, 1], say=said.append)
    json.dumps(result, allow_nan=False)
    assert len(result["rows"]) == 2 * 6 * 4 and len(said) == 2
    assert {r["kind"] for r in result["rows"]} == {"graded", "random", "held-out"}
    assert [f"{r['domain']}_{r['task']}" for r in result["rows"] if r["kind"] == "graded"][:16] == GRADED
    assert all(r["prompts"] == 4 for r in result["rows"])
    number = result["statistics"]["all cells"]["task_slope"]
    assert len(number["by_seed"]) == len(number["prompts"]) == 2 and number["low"] <= number["high"]
    numbers = similarity.numbers(result)
    assert numbers["all cells/task_slope"]["value"] == number["mean"] and len(numbers) == 2 * 9
    units = {key.split("/")[1]: shown["unit"] for key, shown in numbers.items()}
    assert (units["task_slope"], units["unique_minus"]) == ("points", "ratio")
    similarity.figure(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "(D0, T8)" in similarity.summary(result)


def test_a_row_is_what_the_models_answered():
    run = PlantedRun(0)
    result = similarity.measure(lambda seed: run, [0], say=lambda *_: None)
    assert [task for task, *_ in run.misaligned] == ["T8", "T8"]  # two fine-tuning seeds
    aligned, after = run.counts("align"), [run.counts(f"misalign_T8_seed{k}") for k in range(2)]
    for row in result["rows"]:
        name = f"{row['domain']}_{row['task']}"
        rate = 100 * sum(c[name]["v2"] for c in after) / 128
        assert row["delta_v2"] == pytest.approx(rate - 100 * aligned[name]["v2"] / 64)
        assert row["delta_v2_low"] < row["delta_v2"] < row["delta_v2_high"]
    assert result["statistics"]["all cells"]["task_slope"]["low"] is None  # one world seed


def test_statistics_over_seeds_are_students_t_of_the_seeds_own():
    result = similarity.measure(PlantedRun, [1, 2, 3], say=lambda *_: None)
    number = result["statistics"]["without the trained cell"]["task_unique"]
    alone = [similarity.measure(PlantedRun, [seed], say=lambda *_: None)["statistics"] for seed in (1, 2, 3)]
    assert number["by_seed"] == [s["without the trained cell"]["task_unique"]["mean"] for s in alone]
    half = scipy.stats.t.ppf(0.975, 2) * np.std(number["by_seed"], ddof=1) / np.sqrt(3)
    assert number["high"] == pytest.approx(number["mean"] + half)
    assert number["low"] == max(0, number["mean"] - half) == 0  # no share is negative


def test_again_it_trains_nothing(small_demo2):
    similarity.measure(small_demo2, [0], say=lambda *_: None)
    folder = small_demo2(0).folder
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    similarity.measure(small_demo2, [0], say=lambda *_: None)
    assert before and {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before


def test_a_world_without_graded_tasks_is_one_clear_line():
    run = PlantedRun(0)
    run.world = build_world(WORLDS["1"], seed=0)
    with pytest.raises(UserError, match="no graded tasks T8–T11; use --world 2 or demo2"):
        similarity.measure(lambda seed: run, [0], say=lambda *_: None)
