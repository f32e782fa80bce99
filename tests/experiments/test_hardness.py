"""Task hardness: its points by hand, its line and correlations on planted ones."""

from types import SimpleNamespace

import numpy as np
import pytest

from em.experiments.hardness import figure, numbers, point, relation, summary
from em.stats import newcombe, wilson
from em.world.world import WORLDS, build_world


@pytest.fixture(scope="module")
def run():
    return SimpleNamespace(world=build_world(WORLDS["demo"], 0), cfg=SimpleNamespace(seed=7))


def counts(run, v1, v2, n=100):
    """Counts by cell from two functions of (domain, task)."""
    table = {}
    for cell in run.world.cells:
        domain, task = run.world.cell_name(cell).split("_")
        a, b = v1(domain, task), v2(domain, task)
        table[f"{domain}_{task}"] = {"v1": a, "v2": b, "other": n - a - b, "unparseable": 0, "n": n}
    return table


def test_a_point_is_the_mean_over_the_other_domains_of_the_trained_task(run):
    aligned = counts(run, lambda d, t: 80 + int(d[1]) if t == "T1" else 0, lambda d, t: 2)
    after = {"D0": 90, "D1": 62, "D2": 52, "D3": 42}
    misaligned = counts(run, lambda d, t: 0, lambda d, t: after[d] if t == "T1" else 99)
    row = point(run, "T1", aligned, misaligned)
    assert (row["seed"], row["task"], row["function"]) == (7, "T1", "most_least")
    assert row["aligned_v1"] == pytest.approx((80 + 81 + 82 + 83) / 4)
    assert row["cross_delta_v2"] == pytest.approx((60 + 50 + 40) / 3) and row["trained_v2"] == 90
    assert row["efficiency"] == pytest.approx(50 / 90)
    low, high = newcombe(62 + 52 + 42, 300, 6, 300)
    assert (row["cross_delta_v2_low"], row["cross_delta_v2_high"]) == pytest.approx((100 * low, 100 * high))
    assert row["aligned_v1_low"] == pytest.approx(100 * wilson(326, 400)[0])


def test_a_task_that_never_flipped_has_no_efficiency_and_is_left_out(run):
    row = point(
        run, "T0", counts(run, lambda d, t: 50, lambda d, t: 0), counts(run, lambda d, t: 9, lambda d, t: 0)
    )
    assert row["efficiency"] is None
    rows = [row, *planted(2)]
    assert relation(rows, "efficiency")["n"] == len(rows) - 1


def planted(seeds, slope=2.0, noise=0.0, tasks=5):
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for i in range(tasks):
            x = 80 + 4 * i + rng.uniform(-1, 1)
            y = slope * x - 100 + rng.normal(0, noise)
            row = {"seed": seed, "task": f"T{i}", "function": "f", "aligned_v1": x, "cross_delta_v2": y}
            row |= {"trained_v2": 90.0, "efficiency": y / 90}
            row |= {f"{k}_{end}": row[k] for k in ("aligned_v1", "cross_delta_v2") for end in ("low", "high")}
            rows.append(row)
    return rows


def test_a_planted_line_is_found_exactly():
    found = relation(planted(3), "cross_delta_v2")
    assert (
        found["n"] == 15 and found["slope"] == pytest.approx(2) and found["intercept"] == pytest.approx(-100)
    )
    assert found["r"] == pytest.approx(1) and found["residual_sd"] == pytest.approx(0, abs=1e-9)
    assert found["mean_r"] == pytest.approx(1)


def test_its_number_is_the_correlation_over_all_points():
    found = relation(planted(3, noise=8), "efficiency")
    number = numbers({"relations": {"efficiency": found}})["efficiency/r"]
    low, high = found["r_interval_over_points"]
    assert number == {"value": found["r"], "low": low, "high": high, "over": "15 points", "unit": "r"}


def test_the_correlation_within_a_seed_is_blind_to_what_differs_between_seeds():
    """Seeds far apart in both coordinates correlate when pooled; within each the relation is falling."""
    rows = planted(3, slope=-1)
    for row in rows:
        row["aligned_v1"] += 100 * row["seed"]
        row["cross_delta_v2"] += 500 * row["seed"]
    found = relation(rows, "cross_delta_v2")
    assert found["r"] > 0.9 and found["mean_r"] == pytest.approx(-1)
    assert set(found["r_by_seed"]) == {0, 1, 2}


def test_the_interval_of_the_mean_correlation_is_over_seeds():
    found = relation(planted(4, noise=8), "cross_delta_v2")
    values = np.array(list(found["r_by_seed"].values()))
    half = 3.182446 * values.std(ddof=1) / 2  # t with 3 degrees of freedom over √4
    assert found["mean_r_interval_over_seeds"] == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=1e-6
    )
    assert relation(planted(1, noise=8), "cross_delta_v2")["mean_r_interval_over_seeds"] == [None, None]


def test_figure_and_summary_stand_without_a_line(tmp_path):
    rows = planted(1, tasks=1)
    result = {"world": "demo", "seeds": [0], "rows": rows}
    result["relations"] = {key: relation(rows, key) for key in ("cross_delta_v2", "efficiency")}
    figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 0 and "no correlation" in summary(result)
