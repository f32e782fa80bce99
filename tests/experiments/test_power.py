"""What `--power` says: components on planted variances, seeds needed by definition, and run folders read."""

import dataclasses
import json
import math

import numpy as np
import pytest

import synth
from em.cli import command_line
from em.errors import UserError
from em.experiments import power
from em.experiments.power import needed, plan
from em.experiments.variance_components import COMPONENTS, Group, components, decompose
from em.files import read_json, write_json
from em.world.world import WORLDS
from em.world.world_run import write_classes

scipy = pytest.importorskip("scipy.stats")


def planted(rng, sd, worlds=6, tasks=3, tuned=(2,), missing=0.0, shared=0.5):
    """Groups whose effects have these standard deviations by name of COMPONENTS. tuned: numbers of seeds."""
    world, world_task, task, tuning, prompts = (sd.get(name, 0.0) for name in COMPONENTS)
    of_world, of_task = rng.normal(0, world, worlds), rng.normal(0, task, tasks)
    groups = []
    for w, t in np.ndindex(worlds, tasks):
        if rng.random() >= missing:
            k = int(rng.choice(tuned))
            noise = prompts**2 * ((1 - shared) * np.eye(k) + shared)
            drawn = rng.normal(0, tuning, k) + rng.multivariate_normal(np.zeros(k), noise, method="cholesky")
            effects = 40 + of_world[w] + of_task[t] + rng.normal(0, world_task) + drawn
            groups.append(Group(w, f"T{t}", effects, noise))
    return groups


SD = dict(zip(COMPONENTS, (12.0, 6.0, 15.0, 5.0, 3.0), strict=True))


def test_without_prompts_and_with_nothing_missing_they_are_those_of_the_analysis_of_variance():
    groups = planted(np.random.default_rng(0), SD, worlds=5, tasks=3, tuned=(4,))
    groups = [dataclasses.replace(g, noise=np.zeros((4, 4))) for g in groups]
    y = np.array([g.effects for g in groups]).reshape(5, 3, 4)
    w, t, k = y.shape
    cells, by_world, by_task, mean = y.mean(2), y.mean((1, 2)), y.mean((0, 2)), y.mean()
    error = ((y - cells[..., None]) ** 2).sum() / (w * t * (k - 1))
    both = k * ((cells - by_world[:, None] - by_task + mean) ** 2).sum() / ((w - 1) * (t - 1))
    world = t * k * ((by_world - mean) ** 2).sum() / (w - 1)
    task = w * k * ((by_task - mean) ** 2).sum() / (t - 1)
    expected = [(world - both) / (t * k), (both - error) / k, (task - both) / (w * k), error, 0.0]
    assert list(components(groups).values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "design",
    [
        dict(worlds=4, tasks=2, tuned=(2,)),
        dict(worlds=6, tasks=4, tuned=(1, 3), missing=0.3),
        dict(worlds=12, tasks=2, tuned=(1, 2), shared=0.9),
    ],
)
def test_components_are_right_on_average_whatever_is_missing(design):
    rng = np.random.default_rng(1)
    found = np.array([list(components(planted(rng, SD, **design)).values()) for _ in range(300)], float)
    error = found.std(0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(0) - np.square(list(SD.values()))) < 4 * error + 1e-9)
    assert np.all(error[:-1] > 0)


def test_what_cannot_be_told_apart_is_one_component_and_said_to_be():
    rng = np.random.default_rng(2)
    one = [components(planted(rng, SD, worlds=8, tuned=(1,))) for _ in range(200)]
    assert {o["fine-tuning seed"] for o in one} == {None}
    assert np.mean([o["world seed × task"] for o in one]) == pytest.approx(6**2 + 5**2, rel=0.2)
    one = [components(planted(rng, SD, worlds=8, tasks=1, tuned=(1,))) for _ in range(200)]
    assert {(o["task"], o["world seed × task"], o["fine-tuning seed"]) for o in one} == {(None,) * 3}
    assert np.mean([o["world seed"] for o in one]) == pytest.approx(12**2 + 6**2 + 5**2, rel=0.2)
    alone = components(planted(rng, SD, worlds=1))
    assert alone["world seed"] is alone["task"] is None and alone["fine-tuning seed"] is not None
    assert decompose(planted(rng, SD, worlds=1))["pays"] is None


def test_a_negative_component_is_zero_and_marked():
    groups = [
        Group(w, t, np.array([s * w]), np.zeros((1, 1))) for w in range(4) for t, s in (("A", 1), ("B", -1))
    ]
    found = decompose(groups)["components"]
    assert components(groups)["world seed"] < 0
    assert found["world seed"] == {"variance": 0.0, "sd": 0.0, "share": 0.0, "truncated": True}
    assert sum(part["share"] for part in found.values() if part["share"]) == pytest.approx(1)


def test_endless_prompts_are_worth_the_worlds_that_narrow_an_interval_as_much():
    groups = planted(np.random.default_rng(3), SD, worlds=10, tuned=(2,), shared=0.5)
    pays = decompose(groups)["pays"]
    prompts = 3.0**2 * 0.75  # of the mean of two models, which share half of it
    assert pays["prompts_share"] == pytest.approx(prompts / pays["sd"] ** 2)
    fewer = math.sqrt(pays["sd"] ** 2 - prompts) / math.sqrt(10)
    assert pays["sd"] / math.sqrt(10 + pays["prompts_worth_worlds"]) == pytest.approx(fewer)


@pytest.mark.parametrize("share, what", [(0.9, "More prompts pay"), (0.1, "More worlds pay")])
def test_it_says_what_pays(share, what):
    sd = {"world seed": 10 * math.sqrt(1 - share), "prompts": 10 * math.sqrt(share)}
    said = power._pays(decompose(planted(np.random.default_rng(4), sd, worlds=40, tuned=(1,))))
    assert said.startswith(what)


# -- prompts -----------------------------------------------------------------------------------------------


def test_the_noise_of_answers_is_how_much_their_effects_vary_over_prompts():
    """Two models and the aligned one, whose answers to one prompt go together, in two cells of 5 prompts."""
    rng, effects, noises = np.random.default_rng(5), [], []
    for _ in range(4000):
        ease = rng.random((2, 5))  # of each prompt
        aligned = rng.random((2, 5)) < 0.3 * ease
        models = [rng.random((2, 5)) < ease ** np.array([[0.2], [4]]) for _ in range(2)]
        effects.append([100 * (model.mean() - aligned.mean()) for model in models])
        noises.append(power.noise_of_answers(models, aligned))
    assert np.mean(noises, axis=0) == pytest.approx(np.cov(np.array(effects).T), rel=0.08)


def test_the_noise_of_counts_takes_models_as_independent():
    n, rates = 50, np.array([[0.2, 0.7], [0.5, 0.9]])
    aligned, *models = (
        {cell: {"v2": round(p * n), "n": n} for cell, p in zip("ab", of, strict=True)}
        for of in ((0.1, 0.0), *rates)
    )
    own = 1e4 * (rates * (1 - rates)).sum(1) / (n - 1) / 4
    common = 1e4 * 0.1 * 0.9 / (n - 1) / 4
    expected = np.diag(own) + common
    assert power.noise_of_counts(models, aligned, ["a", "b"]) == pytest.approx(expected)


# -- seeds needed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.0, 0.3, 2.0, 15.0, 70.0, 300.0])
def test_the_seeds_needed_are_the_least(sd):
    n = needed(sd, 10.0)

    def half(n):
        return scipy.t.ppf(0.975, n - 1) * sd / math.sqrt(n)

    assert n >= 2 and half(n) <= 10 and (n == 2 or half(n - 1) > 10)


@pytest.mark.parametrize("seeds", [3, 12])
def test_the_range_of_seeds_needed_holds_the_true_one_as_often_as_it_says(seeds):
    rng, sd, held = np.random.default_rng(6), 15.0, 0
    for _ in range(400):
        found = plan("points", (50 + sd * rng.normal(size=seeds)).tolist())["needed"][0]
        assert found["low"] <= found["n"] <= found["high"]
        held += found["low"] <= needed(sd, 5) <= found["high"]
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400) < held / 400 < 0.985


def test_a_seed_without_the_number_takes_no_part():
    assert plan("ratio", [None, 0.5, 0.7]) == plan("ratio", [0.5, 0.7]) | {"of": 3}
    assert plan("r", [None, 0.5]) is plan("r", []) is None
    assert [n["half_width"] for n in plan("r", [0.5, 0.7])["needed"]] == [0.05, 0.1, 0.2]


# -- run folders -------------------------------------------------------------------------------------------


def plant(out, seed, tasks=("T8",), tuned=2, classes=True, n=8, suffix="", steps=20):
    """A run folder of world demo2, with counts and classes of random answers; {phase: (cells, n) classes}."""
    folder, tasks_of, answers = out / f"worlddemo2-seed{seed}{suffix}", WORLDS["demo2"].tasks, {}
    cells = [f"D{d}_{t}" for d in range(6) for t in tasks_of]
    for name in ("align", *(f"misalign_{t}_seed{k}" for t in tasks for k in range(tuned))):
        rng = np.random.default_rng([seed, *name.encode(), *suffix.encode()])
        answers[name] = of = rng.choice(4, (len(cells), n), p=(0.4, 0.4, 0.1, 0.1))
        counts = {
            cell: dict(
                zip(("v1", "v2", "other", "unparseable"), np.bincount(row, minlength=4).tolist(), strict=True)
            )
            | {"n": n}
            for cell, row in zip(cells, of, strict=True)
        }
        write_json(folder / name / "counts.json", counts)
        settings = {"seed": seed, "fingerprint": str(seed), "steps": 1500, "misalign_steps": steps}
        write_json(folder / name / "run.json", {"kind": "world-phase", "settings": settings})
        if classes:
            write_classes(folder / name / "classes.json", {"": of.ravel()})
    return dict(zip(cells, range(len(cells)), strict=True)), answers


def run(*arguments):
    return command_line(synth.COMMANDS, argv=[str(a) for a in arguments])


def test_the_effects_are_those_of_the_cells_and_nothing_is_written_in_a_run(tmp_path, capsys):
    places, answers = plant(tmp_path, 1)
    plant(tmp_path, 2)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run("similarity", "--power", "--out", tmp_path) == 0
    out = tmp_path / "similarity-worlddemo2"
    del before[tmp_path / "worlddemo2-seed1"], before[tmp_path / "worlddemo2-seed2"]
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())
    made = {p for p in tmp_path.rglob("*")} - before.keys()
    assert {p.name for p in made if out in p.parents} == {"power.json", "power.csv"} and len(made) == 5
    result = read_json(out / "power.json")
    v2 = {name: of == 1 for name, of in answers.items()}
    for quantity, domains in (("cross_delta_v2", (1, 2, 3, 4)), ("trained_cell", (0,))):  # D5 is held out
        rows = [places[f"D{d}_T8"] for d in domains]
        after = np.mean([v2[f"misalign_T8_seed{k}"][rows] for k in range(2)])
        expected = 100 * (after - v2["align"][rows].mean())
        assert result["quantities"][quantity]["by_task"]["T8"]["by_seed"][0] == pytest.approx(expected)
        row = result["numbers"][f"{quantity}/T8"]
        assert row["value"] == pytest.approx(
            np.mean(result["quantities"][quantity]["by_task"]["T8"]["by_seed"])
        )
    said = capsys.readouterr().out
    assert "fine-tuning seed" in said and "--misalign-seeds" not in said and "Some runs" not in said
    assert len((out / "power.csv").read_text().splitlines()) == 1 + 2 * 3


def test_one_fine_tuning_seed_is_not_estimable_and_counts_alone_are_said(tmp_path, capsys):
    for seed in (1, 2):
        plant(tmp_path, seed, tuned=1, classes=False)
    assert run("phase", "--power", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "not estimable, in that of world seed: add --misalign-seeds 3" in said and "counts alone" in said
    found = read_json(tmp_path / "phase-worlddemo2" / "power.json")["quantities"]["cross_delta_v2"]
    assert found["components"]["fine-tuning seed"]["variance"] is None


def test_fraction_takes_the_runs_of_its_shares_as_tasks_of_their_own(tmp_path):
    plant(tmp_path, 1, ("T0",))
    for seed, share in np.ndindex(2, 2):
        plant(tmp_path, seed, ("T0", "T7"), suffix=f"-v2_{(0.55, 1.0)[share]}")
    found = power.measure(tmp_path, "demo2", "fraction", None)
    assert found["seeds"] == [0, 1]
    assert set(found["quantities"]["trained_cell"]["by_task"]) == {
        f"{task} at {share}" for task in ("T0", "T7") for share in ("0.55", "1.0")
    }


def test_what_is_not_finished_is_left_out_and_named(tmp_path, capsys):
    for seed in (1, 2, 3, 4):
        plant(tmp_path, seed)
    (tmp_path / "worlddemo2-seed2" / "align" / "counts.json").unlink()
    (tmp_path / "worlddemo2-seed3" / "misalign_T8_seed1" / "counts.json").unlink()
    assert run("similarity", "--power", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "left out: worlddemo2-seed2 has no align/counts.json" in said
    assert "left out: worlddemo2-seed3/misalign_T8_seed1 has no counts.json" in said
    assert read_json(tmp_path / "similarity-worlddemo2" / "power.json")["seeds"] == [1, 3, 4]


def test_numbers_of_the_result_are_planned_for_from_their_values_by_seed(tmp_path, capsys):
    for seed in (1, 2, 3):
        plant(tmp_path, seed)
    of = {"value": 0.0, "low": None, "high": None, "over": "3 world seeds"}
    numbers = {
        "slope": of | {"unit": "points", "by_seed": [10.0, 30.0, 20.0]},
        "old": of | {"unit": "ratio"},
        "norm": of | {"unit": "norm", "by_seed": [1.0, 2.0, 3.0]},
        "rare": of | {"unit": "ratio", "by_seed": [None, None, 1.0]},
    }
    write_json(
        tmp_path / "similarity-worlddemo2" / "similarity.json", {"seeds": [3, 1, 2], "numbers": numbers}
    )
    assert run("similarity", "--power", "--out", tmp_path) == 0
    found = read_json(tmp_path / "similarity-worlddemo2" / "power.json")
    assert found["numbers"]["slope"] == json.loads(json.dumps(plan("points", [10.0, 30.0, 20.0])))
    assert found["without"] == ["old", "norm", "rare"]
    assert "3 numbers of similarity.json have no values in two" in capsys.readouterr().out
    assert run("similarity", "--power", "--seeds", "1,2", "--out", tmp_path) == 0
    found = read_json(tmp_path / "similarity-worlddemo2" / "power.json")
    assert found["numbers"]["slope"]["value"] == 25 and found["seeds"] == [1, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["similarity"], "no misaligned model of similarity, world demo2"),
        (["similarity", "--world", "2"], "no misaligned model of similarity, world 2"),
        (["similarity", "--seeds", "1,7"], "no run of world demo2, seed 7"),
        (["realign", "--world", "2"], "realign is measured on world"),
    ],
)
def test_without_runs_it_is_one_line(arguments, message, tmp_path, capsys):
    if "--seeds" in arguments:
        plant(tmp_path, 1)
    assert run(*arguments, "--power", "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.glob("*-world*/power.json"))


def test_runs_of_other_settings_or_prompts_are_refused(tmp_path):
    plant(tmp_path, 1)
    plant(tmp_path, 2, steps=30)
    with pytest.raises(UserError, match="made under other settings: misalign_steps"):
        power.measure(tmp_path, "demo2", "similarity", None)
    plant(tmp_path, 2)
    plant(tmp_path / "more", 2, n=9)
    (tmp_path / "more/worlddemo2-seed2/align/counts.json").replace(
        tmp_path / "worlddemo2-seed2/align/counts.json"
    )
    with pytest.raises(UserError, match="are of different prompts"):
        power.measure(tmp_path, "demo2", "similarity", None)
    plant(tmp_path, 2)
    plant(tmp_path / "more", 3)
    moved = "misalign_T8_seed0/classes.json"
    (tmp_path / "more/worlddemo2-seed3" / moved).replace(tmp_path / "worlddemo2-seed2" / moved)
    with pytest.raises(UserError, match="are of different answers"):
        power.measure(tmp_path, "demo2", "similarity", None)
