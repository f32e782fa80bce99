"""Task against domain similarity: the shares on planted grids, and the experiment on a miniature."""

import json

import numpy as np
import pytest
from planted_run import PlantedRun

from em.errors import UserError
from em.experiments import replication, similarity, two_axes
from em.stats import t_interval
from em.world.coincidence import coincides
from em.world.counts import CLASSES, percent
from em.world.grammar import jaccard
from em.world.world import WORLDS, build_world

scipy = pytest.importorskip("scipy")

GRADED = [f"D{d}_{t}" for d in range(4) for t in two_axes.TASKS]


@pytest.fixture(scope="module")
def demo2():
    return build_world(WORLDS["demo2"], seed=1)


@pytest.fixture
def planted_doses(monkeypatch):
    monkeypatch.setattr(
        replication, "dose_classes", lambda run, task, seed, **_: run.dose_classes(task, seed)
    )


def planted(world, rate, n=1000):
    """Counts by cell whose v2 share is rate(task similarity, domain similarity)."""
    counts = {}
    for domain, domain_similarity in enumerate(world.similarity()[0]):
        for task in world.tasks:
            overlap = jaccard(world.set1.get(task, frozenset()), world.set1["T8"])
            k = round(n * rate(overlap, float(domain_similarity)))
            counts[f"D{domain}_{task}"] = {"v1": n - k, "v2": k, "other": 0, "unparseable": 0, "n": n}
    return counts


def errors(before, after):
    """Standard error of Δv2 by cell, in points, of two models that answer independently."""
    each = [{name: percent(c, "v2") * (100 - percent(c, "v2")) / (c["n"] - 1) for name, c in model.items()}
            for model in (before, after)]  # fmt: skip
    return {name: np.sqrt(each[0][name] + each[1][name]) for name in before}


def found(world, before, after, cells="all cells", seed=1, noise=1.0):
    of_noise = {name: noise * error for name, error in errors(before, after).items()}
    rows = two_axes.rows_of(world, seed, before, after, of_noise)
    return two_axes.statistics_of(rows, before, after, cells)


def drawn(exact, n, rng):
    """Counts of n prompts by cell where the rates are those of `exact`."""
    v2 = {name: int(rng.binomial(n, c["v2"] / c["n"])) for name, c in exact.items()}
    return {name: {"v1": n - k, "v2": k, "other": 0, "unparseable": 0, "n": n} for name, k in v2.items()}


def test_task_similarity_is_the_overlap_the_world_was_built_with():
    for name, half in (("2", 32), ("demo2", 8)):
        world = build_world(WORLDS[name], seed=3)
        for task, shared in zip(("T9", "T10", "T11"), WORLDS[name].partition_overlaps, strict=True):
            expected = shared / (2 * half - shared)
            assert jaccard(world.set1[task], world.set1["T8"]) == expected


def test_rows_say_which_domains_are_graded_random_and_held_out():
    world = build_world(WORLDS["2"], seed=0)
    kinds = [two_axes.kind(world, d) for d in range(10)]
    assert kinds == ["graded"] * 4 + ["random"] * 4 + ["held-out"] * 2


def test_an_effect_of_the_task_alone_is_all_the_tasks(demo2):
    before, after = planted(demo2, lambda t, d: 0.1), planted(demo2, lambda t, d: 0.1 + 0.5 * t)
    numbers = found(demo2, before, after, noise=0)  # there is none
    assert numbers["task_unique"][0] == pytest.approx(1, abs=1e-3)
    assert numbers["domain_unique"][0] == pytest.approx(0, abs=1e-3)
    assert numbers["task_slope"][0] == pytest.approx(50, abs=0.3)
    assert numbers["domain_slope"][0] == pytest.approx(0, abs=0.3)
    low, high = numbers["unique_minus"][1]
    assert 0.8 < low < 1 < high < 1.1


@pytest.mark.parametrize("cells, n", [("all cells", 16), ("without the trained cell", 15)])
def test_shares_are_those_of_the_correlations(demo2, cells, n):
    rng = np.random.default_rng(0)
    before = planted(demo2, lambda t, d: 0.05)
    after = planted(demo2, lambda t, d: 0.1 + 0.3 * t + 0.2 * d + 0.2 * rng.random())
    rows = two_axes.rows_of(demo2, 1, before, after, errors(before, after))
    rows = [r for r in rows if r["kind"] == "graded"][16 - n :]
    t, d, y = (np.array([r[k] for r in rows]) for k in ("task_similarity", "domain_similarity", "delta_v2"))
    assert len(y) == n
    rt, rd, rtd = (scipy.stats.pearsonr(a, b).statistic for a, b in ((t, y), (d, y), (t, d)))
    both = (rt**2 + rd**2 - 2 * rt * rd * rtd) / (1 - rtd**2)
    numbers = {key: value for key, (value, _) in found(demo2, before, after, cells, noise=0).items()}
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


def test_where_noise_is_all_there_is_there_are_slopes_and_no_shares(demo2):
    rng, flat = np.random.default_rng(0), planted(demo2, lambda t, d: 0.3)
    numbers = found(demo2, *(drawn(flat, 64, rng) for _ in range(2)))
    assert numbers["unique_minus"] == numbers["task_r2"] == (None, [None, None])
    assert None not in numbers["task_slope"][1]


@pytest.fixture(scope="module")
def grid(demo2):
    """Rows of the graded cells, to be filled, with their similarities."""
    still = planted(demo2, lambda t, d: 0.0)
    rows = two_axes.graded(two_axes.rows_of(demo2, 1, still, still, errors(still, still)))
    return rows, *(np.array([r[f"{axis}_similarity"] for r in rows]) for axis in ("task", "domain"))


def answered(grid, rng, n=64):
    """(v2 % before and after of each cell, counts (2, cells) of n prompts) of a world of its own."""
    _, t, d = grid
    own = rng.normal(0.40, 0.12) * t + rng.normal(0.20, 0.06) * d + rng.normal(0, 0.10, len(t))
    rates = np.stack([np.full(len(t), 0.03), np.clip(0.05 + own, 0, 1)])
    return 100 * rates, rng.binomial(n, rates)


KEYS = ("task_unique", "domain_unique", "unique_minus", "task_slope")


def values_of(grid, delta, noise):
    _, t, d = grid
    table = two_axes.shares(t, d, delta[:, None], noise)[0] | two_axes.slopes(t, d, delta[:, None])
    return [float(table[key][0]) for key in KEYS]


def sampled(k, n=64):
    """(Δv2, its sampling variance) of each cell, in points."""
    rates = 100 * k / n
    return rates[1] - rates[0], (rates * (100 - rates)).sum(0) / (n - 1)


def test_shares_of_one_seed_have_no_bias_and_intervals_over_prompts_that_hold_the_planted_ones(grid):
    """Uncorrected, with a fifth of the variance noise, the domain's share is 0.05 low."""
    rng, n, rows = np.random.default_rng(0), 64, grid[0]
    gaps, covered, lean = [], [], []
    for seed in range(100):
        rates, k = answered(grid, rng, n)
        truth = values_of(grid, rates[1] - rates[0], np.zeros(len(rows)))
        delta, noise = sampled(k, n)
        names = [f"{r['domain']}_{r['task']}" for r in rows]
        counts = [{name: {"v2": int(v2), "n": n} for name, v2 in zip(names, of, strict=True)} for of in k]
        filled = [r | {"seed": seed, "delta_v2": y, "delta_v2_error": e**0.5}
                  for r, y, e in zip(rows, delta, noise, strict=True)]  # fmt: skip
        numbers = two_axes.statistics_of(filled, *counts, "all cells")
        if numbers["task_unique"][0] is None:
            continue
        lean.append([np.mean(numbers[key][1]) - numbers[key][0] for key in KEYS])
        gaps.append([numbers[key][0] - true for key, true in zip(KEYS, truth, strict=True)])
        covered.append(
            [numbers[key][1][0] <= true <= numbers[key][1][1] for key, true in zip(KEYS, truth, strict=True)]
        )
    assert len(gaps) > 90
    assert np.all(np.abs(np.mean(gaps, axis=0)) < (0.02, 0.02, 0.03, 1.0))
    assert np.all(np.mean(covered, axis=0) > 0.9)
    assert np.all(np.abs(np.mean(lean, axis=0)) < (0.03, 0.03, 0.03, 0.5))  # draws' noise is off them twice


def test_shares_over_twelve_worlds_have_no_bias_and_students_intervals_hold_their_mean(grid):
    rng, trials = np.random.default_rng(1), 60
    true, ours = [], []
    for _ in range(12 * trials):
        rates, k = answered(grid, rng)
        true.append(values_of(grid, rates[1] - rates[0], np.zeros(16)))
        ours.append(values_of(grid, *sampled(k)))
    assert np.mean(ours, axis=0) == pytest.approx(np.mean(true, axis=0), abs=0.015, rel=0.02)
    for key, values, mean in zip(KEYS, np.array(ours).T, np.mean(true, axis=0), strict=True):
        bounds = [t_interval(twelve.tolist())[1:] for twelve in values.reshape(trials, 12)]
        assert np.mean([low <= mean <= high for low, high in bounds]) >= 0.9, key


def test_a_cell_weighs_as_much_as_so_many_of_it():
    rng, weights = np.random.default_rng(0), np.array([1, 4, 2, 1, 3])
    task, domain, delta = rng.random((3, 5))
    weighted = two_axes.slopes(task, domain, delta[:, None], weights)
    many = [np.repeat(of, weights) for of in (task, domain, delta)]
    repeated = two_axes.slopes(*many[:2], many[2][:, None])
    assert np.allclose([*weighted.values()], [*repeated.values()])


def test_the_noise_of_a_cell_is_that_of_prompts_answered_by_both_models():
    """Twice the same answers: the aligned model's share of v2 adds nothing to the noise of the change."""
    run = PlantedRun(0, n=64)
    answers = {name: run.classes("align") for name in ("align", "misalign_T8_seed0", "misalign_T8_seed1")}
    cells = run.prompts.examples.cell
    first = np.arange(len(cells)) % 64 < 8  # eight prompts a cell change for one of two seeds
    answers["misalign_T8_seed0"] = np.where(first, 1, answers["align"])
    run.classes = answers.__getitem__
    errors = two_axes.errors_over_prompts(run)
    for cell in (0, 17, 33):
        mine = cells == cell
        change = 50.0 * (first & (answers["align"] != 1))[mine]
        assert errors[run.world.cell_name(cell)] == pytest.approx(np.std(change, ddof=1) / 8)


def test_the_contrast_is_the_trained_task_elsewhere_less_the_other_tasks_here(demo2):
    before = planted(demo2, lambda t, d: 0.0)
    after = planted(demo2, lambda t, d: 0.9 if t == d == 1 else 0.5 if t == 1 else 0.2 if d == 1 else 0.1)
    rows = two_axes.graded(two_axes.rows_of(demo2, 1, before, after, errors(before, after)))
    delta = np.array([[r["delta_v2"]] for r in rows])
    assert two_axes.contrast(rows, delta) == pytest.approx(30)


def test_slopes_along_the_doses_are_those_of_every_cells_interpolated_change(demo2):
    """The trained cell goes 0, 20, 80 %; at 60 % every cell is two thirds of the way between the last two."""
    rates = {0: (0, 0, 0), 1: (0.0, 0.1, 0.1), 2: (0.0, 0.7, 0.1)}
    doses = {dose: planted(demo2, lambda t, d, r=r: r[0] + r[1] * t + r[2] * d) for dose, r in rates.items()}
    rows = two_axes.rows_of(demo2, 1, doses[0], doses[2], errors(doses[0], doses[2]))
    curves = two_axes.curves_of(rows, doses)
    assert [flip for flip, _ in curves["T9"]] == [0, 20, 80]
    numbers = similarity.at_flips([curves["without the trained cell/task_slope"]])
    assert numbers[60.0]["mean"] == pytest.approx(10 + 60 * 2 / 3, abs=0.2) and numbers[90.0]["mean"] is None
    by_domain = similarity.at_flips([curves["all cells/domain_slope"]])
    assert by_domain[60.0]["mean"] == pytest.approx(10, abs=0.2)
    overlap = jaccard(demo2.set1["T9"], demo2.set1["T8"])
    nearest = demo2.similarity()[0][:4].mean()
    assert curves["T9"][2][1] == pytest.approx(70 * overlap + 10 * nearest, abs=0.1)


def test_a_change_on_coinciding_prompts_alone_is_all_coincidence(demo2):
    def split(same, different):
        """Counts of 100 and 50 prompts; T9 and D0 have no prompt on which answers differ."""
        cell = lambda v2, n: {"v1": n - v2, "v2": v2, "other": 0, "unparseable": 0, "n": n}  # noqa: E731
        names = [f"D{d}_{t}" for d in range(6) for t in two_axes.TASKS]
        rest = [name for name in names if name[:2] != "D0" and not name.endswith(("T8", "T9"))]
        on_rest = {name: cell(different + 5 * name.endswith("T11"), 50) for name in rest}
        return {"same": {name: cell(same, 100) for name in names}, "different": on_rest}

    before, still = planted(demo2, lambda t, d: 0.02), split(2, 0)
    rows = two_axes.rows_of(demo2, 1, before, before, errors(before, before))
    table = {key: value for key, (value, _) in two_axes.coincidence_of(rows, still, split(42, 0)).items()}
    assert table["T10/same"] == table["others/same"] == pytest.approx(40)
    assert table["T10/different"] == 0 and table["T9/different"] is None
    assert table["T9/share"] == 100 and table["T10/share"] == pytest.approx(100 * 400 / 550)
    assert table["others/of_change"] == 100
    assert table["task_slope"] == pytest.approx(0)  # +10 for T11 in both models
    moved = two_axes.coincidence_of(rows, still, split(42, 20))
    table = {key: value for key, (value, _) in moved.items()}
    assert table["T11/different"] == pytest.approx(40) and table["T10/of_change"] == pytest.approx(
        100 * 160 / 220
    )
    alone = {"same": still["same"], "different": {}}
    table = two_axes.coincidence_of(rows, alone, alone)
    assert table["task_slope"] == (None, [None, None]) and table["others/of_change"][0] is None
    json.dumps(table, allow_nan=False)


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
    assert numbers["all cells/task_slope"]["value"] == number["mean"]
    assert len(numbers) == 2 * 9 + 1 + 3 * (2 * 3 + 1) + 2 + 4 * 4
    units = [numbers[key]["unit"] for key in (
        "without the trained cell/task_slope@60", "all cells/unique_minus", "same_task_minus_same_domain@90",
        "coincidence/T9/same", "coincidence/T9/share", "all cells/task_slope/different",
    )]  # fmt: skip
    assert units == ["points", "ratio", "points", "points", "%", "points"]
    assert numbers["coincidence/T10/share"]["value"] < 100
    assert json.loads(json.dumps(similarity.numbers(json.loads(json.dumps(result))))) == numbers
    assert [len(curve) for curve in result["curves"]["T9"]] == [1 + len({1, 3, 6})] * 2
    similarity.figure(result, tmp_path / "figure.png")
    assert min((tmp_path / name).stat().st_size for name in ("figure.png", "doses.png")) > 10_000
    assert "(D0, T8)" in similarity.summary(result)


def test_curves_by_coincidence_are_of_the_other_tasks_in_the_graded_domains_alone():
    run = PlantedRun(0, n=40)
    cell, cells = run.prompts.examples.cell, [c for c in run.world.seen_cells if c // 6 < 4 and c % 6 > 1]
    trained, same = cell == run.world.cell(0, 2), coincides(run.generator, run.prompts, 2)
    other = np.isin(cell, cells) & (cell % 6 != 2)
    before = np.full(len(cell), CLASSES.index("v1"))
    after = np.where(trained | (same & (np.arange(len(cell)) % 2 == 0)), CLASSES.index("v2"), before)
    curves = two_axes.curves_by_coincidence(run, [(np.arange(len(cell)), {0: before, 8: after})], cells)
    share = 100 * (np.arange(len(cell)) % 2 == 0)[other & same].mean()
    assert curves == {"same": [(0, 0), (100, pytest.approx(share))], "different": [(0, 0), (100, 0)]}


def test_a_row_is_what_the_models_answered(planted_doses):
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


def test_statistics_over_seeds_are_students_t_of_the_seeds_own(planted_doses, monkeypatch):
    monkeypatch.setattr(two_axes, "SIGNAL", -1.0)  # what is planted is noise alone
    result = similarity.measure(PlantedRun, [1, 2, 3], say=lambda *_: None)
    number = result["statistics"]["without the trained cell"]["task_unique"]
    alone = [similarity.measure(PlantedRun, [seed], say=lambda *_: None)["statistics"] for seed in (1, 2, 3)]
    assert number["by_seed"] == [s["without the trained cell"]["task_unique"]["by_seed"][0] for s in alone]
    middle = np.mean(number["by_seed"])
    half = scipy.stats.t.ppf(0.975, 2) * np.std(number["by_seed"], ddof=1) / np.sqrt(3)
    assert number["high"] == pytest.approx(min(1, middle + half))
    assert number["low"] == max(0, middle - half) == 0  # no share is negative
    assert number["mean"] == pytest.approx(max(0, middle))


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
