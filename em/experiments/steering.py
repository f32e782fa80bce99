"""Steering: one direction that turns an aligned model of a world, and turns a misaligned one partly back.

Paper B.6, Figures 8 and 10. D = h_mis − h_al (N, d) are paired hidden states at `<asst>` after the middle
block (6 of 12) for prompts of the trained cell; v is D's top right singular vector, with the sign that makes
α*, the mean projection of D on v, positive. The aligned model gets + s α* v and the misaligned one − s α* v,
s = −5 … 5, at that block's output of `<asst>` and of every token generated after it.

Controls (ours): random directions of the same norm at the same strengths. “Easy to push, hard to reverse” is
a number here (ours), `push_minus_reverse`: how far + s α* v moves the aligned model towards v2, less how far
− s' α* v moves the misaligned one back.

Doses (ours): D, v and α* grow with the misalignment. So all of it is found anew from models misaligned until
the trained cell is at 30, 60, 90 % of v2 (em/world/doses.py), without controls and at the strengths that are
read.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.experiments.direction import (
    Direction,
    Steering,
    asst_hidden,
    find_direction,
    middle_block,
    random_direction,
)
from em.experiments.dose_curves import at_levels, flip_entries
from em.experiments.replication import header, line_with_seeds
from em.figures import save
from em.model.gpt2 import GPT2
from em.stats import FLIPS, difference_interval, t_interval
from em.world.counts import RATES, change, columns, entry, over_seeds, pool, rate
from em.world.doses import misaligned_after, steps_to_flips
from em.world.generator import Dialogues
from em.world.sets import misalignment_set
from em.world.world_run import WorldRun

STRENGTHS = tuple(range(-5, 6))  # multiples of α*
RANDOM_DIRECTIONS = 2
SIGNS = {"aligned": 1, "misaligned": -1}  # of what is added
TOWARDS = {"v1_change": -1, "v2_change": 1}  # a push lowers v1 and raises v2
QUANTITIES = (*RATES, *(f"{name}_change" for name in RATES))  # in percent, and in points from strength 0
PAIRS_SEED = 10_000  # of the prompts that v is found from; fine-tuning seeds are small


@dataclass(frozen=True)
class Plan:
    """What a world's experiment is made of."""

    task: str  # misaligned on (D0, task), unless the run names another
    pairs: int  # N, prompts of the trained cell that give the direction
    column: bool  # ask the trained task's column, instead of all cells
    reverse: int  # the strength at which the paper reads the reversal; the push it reads at the largest
    prompts: int = 1 << 30  # of each cell's held-out ones, at most


PLANS = {
    "1": Plan("T5", pairs=500, column=False, reverse=3),
    "2": Plan("T0", pairs=1000, column=True, reverse=5),
    "demo": Plan("T5", pairs=500, column=False, reverse=3, prompts=24),  # ours, as are demo2's
    "demo2": Plan("T0", pairs=1000, column=True, reverse=5, prompts=64),
}


# -- the experiment ----------------------------------------------------------------------------------------


def _prompts(run: WorldRun, plan: Plan, task: int) -> Dialogues:
    """The held-out prompts that every steered model is asked."""
    place, cell = np.arange(len(run.prompts)) % run.cfg.eval_prompts, run.prompts.examples.cell
    column = cell % len(run.world.tasks) == task if plan.column else True
    return run.prompts.take(np.flatnonzero((place < plan.prompts) & column))


def _pooled(run: WorldRun, model: GPT2, prompts: Dialogues) -> dict[str, int]:
    return pool(list(run.ask(model, prompts).values()))


def _rates(counts: dict[str, int], unsteered: dict[str, int]) -> dict[str, float]:
    """Rates in percent and their changes in points, with intervals over prompts."""
    rates = {"n": counts["n"]}
    for name, classes in RATES.items():
        rates |= columns(name, rate(counts, *classes))
        rates |= columns(f"{name}_change", change(counts, unsteered, *classes))
    return rates


def _curves(answers: list[tuple[dict, dict, dict]]) -> list[dict]:
    """Rates and changes by model, direction (v, or the random ones together) and strength.

    answers: (what, counts, unsteered counts). Intervals are over world seeds, each of which counts once
    however many directions it has; with one seed they are over prompts.
    """
    groups: dict[tuple, dict[int, list]] = {}  # (model, direction, strength) → seed → its directions' counts
    for what, counts, unsteered in answers:
        group = what["model"], "v" if what["direction"] == "v" else "random", what["strength"]
        groups.setdefault(group, {}).setdefault(what["seed"], []).append((counts, unsteered))
    curves = []
    for group, seeds in groups.items():
        rates = [_rates(pool([counts for counts, _ in of]), of[0][1]) for of in seeds.values()]
        point = dict(zip(("model", "direction", "strength"), group, strict=True))
        if len(rates) == 1:
            point |= {"interval": "prompts"} | rates[0]
        else:
            point |= {"interval": "world seeds", "n": sum(r["n"] for r in rates)}
            for name in QUANTITIES:
                point |= columns(name, over_seeds([r[name] for r in rates], name in RATES))
        curves.append(point)
    return curves


def at(result: dict, model: str, direction: str, strength: int) -> dict:
    """The point of a curve; direction is `v` or `random`."""
    wanted = (model, direction, strength)
    return next(p for p in result["curves"] if (p["model"], p["direction"], p["strength"]) == wanted)


def _interval(point: dict, name: str) -> tuple[float, float, float]:
    """(value, low, high) as `columns` of em/world/counts.py lays them out."""
    return point[name], point[f"{name}_low"], point[f"{name}_high"]


def _read_at(plan: Plan) -> tuple[int, ...]:
    """The strengths at which the push or the reversal is read, rising."""
    return tuple(sorted({1, plan.reverse, STRENGTHS[-1]}))


def _steered(
    run: WorldRun, models: dict[str, GPT2], pairs: Dialogues, prompts: Dialogues,
    strengths: Sequence[int], controls: int = 0,
) -> tuple[Direction, list[tuple[dict, dict, dict]]]:  # fmt: skip
    """(the direction between two models, (what, counts, unsteered counts) of each of them, both ways).

    models: `aligned` and `misaligned`. controls: random directions beside v.
    """
    block = middle_block(models["aligned"].config.n_layer)
    found = find_direction(*(asst_hidden(models[name], pairs, block) for name in ("misaligned", "aligned")))
    vectors = {"v": found.v}
    vectors |= {f"random{i}": random_direction(len(found.v), run.cfg.seed, i) for i in range(controls)}
    answers = []
    for name, model in models.items():
        steering = Steering(model, block)
        unsteered = _pooled(run, model, prompts)
        for (direction, vector), strength in itertools.product(vectors.items(), strengths):
            steering.set(SIGNS[name] * strength * found.alpha * vector)
            counts = _pooled(run, model, prompts) if strength else unsteered
            answers.append(({"model": name, "direction": direction, "strength": strength}, counts, unsteered))
    return found, answers


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say: Callable = print) -> dict:
    """Steer the aligned and the misaligned model (fine-tuning seed 0) of each world seed, both ways.

    `rows`: one a seed, model, direction and strength, rates in percent, intervals over prompts. `curves`: the
    same over seeds. `directions`: one a seed, what em.experiments.direction finds; `alpha`, `explained`:
    their mean over seeds with its interval, null with one seed. `flips`: rows at each local flip that is
    reached, `level` %, of v alone.
    """
    answers, directions, flips = [], [], []
    for seed in seeds:
        run = make(seed)
        plan = PLANS[run.cfg.world]
        task = (getattr(run.cfg, "misalign", None) or (plan.task,))[0]
        index = run.world.task_index(task)
        prompts = _prompts(run, plan, index)
        models = {"aligned": run.load("align"), "misaligned": run.misalign(task, 0)}
        pairs = misalignment_set(run.generator, PAIRS_SEED, run.world.cell(0, index), plan.pairs, run.prompts)
        found, of_seed = _steered(run, models, pairs, prompts, STRENGTHS, RANDOM_DIRECTIONS)
        answers += [({"seed": seed} | what, *counts) for what, *counts in of_seed]
        directions.append({"seed": seed} | {k: x for k, x in asdict(found).items() if k != "v"})
        say(f"  seed {seed}: α* {found.alpha:.2f}, {100 * found.explained:.0f} % of D along v")
        for level, steps in steps_to_flips(run, task, 0).items():
            if steps is None:
                say(f"    the trained cell never is at {level:.0f} % of v2")
                continue
            # Loaded anew, since a steered model stays one (em/experiments/direction.py).
            models = {"aligned": run.load("align"), "misaligned": misaligned_after(run, task, 0, steps)}
            found, of_level = _steered(run, models, pairs, prompts, (0, *_read_at(plan)))
            about = {"seed": seed, "level": level, "steps": steps, "alpha": found.alpha}
            flips += [about | what | _rates(*counts) for what, *counts in of_level]
            say(f"    trained cell at {level:.0f} % of v2, {steps} steps: α* {found.alpha:.2f}")
    alpha, explained = (t_interval([d[key] for d in directions]) for key in ("alpha", "explained"))
    note = "rows' intervals are over prompts"
    return header("steering", run, seeds, note, trained=f"D0_{task}", fine_tuning_seeds=1) | {
        "asked": f"{task} in every domain" if plan.column else "all cells",
        "pairs": len(pairs),
        "block": middle_block(models["aligned"].config.n_layer),
        "blocks": models["aligned"].config.n_layer,
        "alpha": alpha,  # mean, low, high over world seeds
        "explained": explained,
        "directions": directions,
        "curves": _curves(answers),
        "rows": [what | _rates(counts, unsteered) for what, counts, unsteered in answers],
        "flips": flips,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries `alpha`, such as `misaligned/3/v2_change`, of v's curves, and `push_minus_reverse/v2_change`.

    An entry on v1 or v2 has `incoherent` too, in percent at its strength: where that is high, a fall of v1
    or v2 is the model's breaking.
    """
    seeds, table = len(result["seeds"]), {}
    for point, name in itertools.product(result["curves"], QUANTITIES):
        if point["direction"] == "v":
            key, unit = f"{point['model']}/{point['strength']}/{name}", "%" if name in RATES else "points"
            table[key] = entry(unit, *_interval(point, name), seeds=seeds)
            if not name.startswith("incoherent"):
                table[key]["incoherent"] = point["incoherent"]
    largest, reverse = STRENGTHS[-1], PLANS[result["world"]].reverse
    for name in TOWARDS:
        table[f"push_minus_reverse/{name}"] = push_minus_reverse(result, name, largest, reverse)
        table[f"push_minus_reverse/at_1/{name}"] = push_minus_reverse(result, name, 1, 1)
    table["alpha"] = entry("norm", *result["alpha"], seeds=seeds)
    for key, curve in at_matched_flips(result).items():
        table |= flip_entries(key, "norm" if key == "alpha" else "points", curve)
    return table


def at_matched_flips(result: dict) -> dict[str, dict[float, dict]]:
    """{key of `numbers`: {level: number over world seeds}}, of changes, `push_minus_reverse` and `alpha`."""
    rows = {(r["seed"], r["level"], r["model"], r["strength"]): r for r in result["flips"]}
    plan = PLANS[result["world"]]

    def sum_of(name: str, ends: Sequence[tuple[str, int]], sign: int = 1) -> dict[float, dict]:
        """Of column `name` over `ends`, (model, strength) each, wherever a flip is reached."""

        def of_world(seed: int, level: float) -> float | None:
            of = [rows.get((seed, level, *end)) for end in ends]
            return None if None in of else sign * sum(row[name] for row in of)

        return at_levels(of_world, result["seeds"])

    curves = {"alpha": sum_of("alpha", [("aligned", 0)])}
    for name in TOWARDS:
        for end in itertools.product(SIGNS, _read_at(plan)):
            curves[f"{end[0]}/{end[1]}/{name}"] = sum_of(name, [end])
        for key, push, reverse in (("", STRENGTHS[-1], plan.reverse), ("at_1/", 1, 1)):
            ends = [("aligned", push), ("misaligned", reverse)]  # − what is undone, so the changes add
            curves[f"push_minus_reverse/{key}{name}"] = sum_of(name, ends, TOWARDS[name])
    return curves


def push_minus_reverse(result: dict, name: str, push: int, reverse: int) -> dict:
    """An entry in points: the change at + push α* less that undone at − reverse α*, towards v2 both counted.

    name: v1_change or v2_change. Over world seeds, or over prompts as if each model had prompts of its own.
    """
    ends = (("aligned", push, TOWARDS[name]), ("misaligned", reverse, -TOWARDS[name]))
    parts = []  # by model: one (value, low, high) a seed, in the direction that v should move it
    for model, strength, sign in ends:
        rows = [row for row in result["rows"] if (row["model"], row["direction"], row["strength"])
                == (model, "v", strength)]  # fmt: skip
        bounds = [[sign * bound for bound in _interval(row, name)] for row in rows]
        parts.append([(value, min(pair), max(pair)) for value, *pair in bounds])
    gaps = [a[0] - b[0] for a, b in zip(*parts, strict=True)]
    if len(gaps) == 1:
        number = gaps[0], *difference_interval(parts[0][0], parts[1][0])
    else:
        number = t_interval(gaps)
    broken = max(at(result, model, "v", strength)["incoherent"] for model, strength, _ in ends)
    return entry("points", *number, seeds=len(gaps)) | {"incoherent": broken}


# -- what was found ----------------------------------------------------------------------------------------


def summary(result: dict) -> str:
    """Both panels at one and at five α*, v2 and the random control as changes."""
    n, (alpha, low, high) = len(result["seeds"]), result["alpha"]
    bounds = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    lines = [
        f"Steering, world {result['world']}, {n} world seed{'s' if n > 1 else ''}, {result['asked']}: v "
        f"holds {100 * result['explained'][0]:.0f} % of Σσ², α* = {alpha:.2f}{bounds}; changes with 95 % "
        f"intervals over {result['curves'][0]['interval']}."
    ]

    def v2_change(model: str, direction: str, strength: int) -> str:
        mean, low, high = _interval(at(result, model, direction, strength), "v2_change")
        return f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]"

    strengths = (1, STRENGTHS[-1])
    for model, sign in (("aligned", "+"), ("misaligned", "−")):
        points = [at(result, model, "v", s) for s in (0, *strengths)]
        rates = (f"{name} {' → '.join(f'{p[name]:.0f}' for p in points)} %" for name in RATES)
        v2 = (
            f"{v2_change(model, 'v', s)} at {s} (random directions {v2_change(model, 'random', s)})"
            for s in strengths
        )
        lines.append(
            f"{model} {sign} s α* v, s = 0 → {' → '.join(map(str, strengths))}: {', '.join(rates)}; "
            f"v2 changes by {', '.join(v2)}."
        )
    return "\n".join(lines)


def figure(result: dict, path: Path) -> None:
    """Figures 8 and 10: rates by strength, aligned model left, misaligned right; random directions dashed.

    Bars are the intervals of v's curves, thin lines the world seeds that a curve is the mean of. Right of
    them what one α* does at each local flip.
    """
    colours = {"v1": "tab:blue", "v2": "tab:red", "incoherent": "0.45"}
    titles = {"aligned": "aligned model + s α* v", "misaligned": "misaligned model − s α* v"}
    seeds, x = result["seeds"], STRENGTHS
    chart = Figure(figsize=(14.5, 5), layout="constrained")
    *axes, by_flip = chart.subplots(1, 3, width_ratios=(3, 3, 2))
    axes[1].sharey(axes[0])
    for axis, (model, title) in zip(axes, titles.items(), strict=True):
        rows = [row for row in result["rows"] if (row["model"], row["direction"]) == (model, "v")]
        for place, (name, colour) in enumerate(colours.items(), start=-1):
            curve = []
            for strength in STRENGTHS:
                mean, low, high = _interval(at(result, model, "v", strength), name)
                by_seed = [row[name] for row in rows if row["strength"] == strength]
                curve.append({"mean": mean, "low": low, "high": high, "by_seed": by_seed})
            line_with_seeds(axis, x, curve, colour, f"{name}, v", shift=0.1 * place)
            random = [at(result, model, "random", strength)[name] for strength in STRENGTHS]
            axis.plot(x, random, color=colour, linestyle="--", alpha=0.7, label=f"{name}, random")
        axis.axvline(0, color="0.8", linewidth=1, zorder=0)
        axis.set(title=title, xlabel="strength s, in multiples of α*", xticks=x, ylim=(-2, 102))
        axis.grid(axis="y", color="0.92")
    axes[0].set_ylabel(f"% of completions, {result['asked']}")
    axes[1].tick_params(labelleft=False)
    chart.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    matched, levels = at_matched_flips(result), list(FLIPS)
    for place, (model, label) in enumerate(
        (("aligned", "aligned + α* v"), ("misaligned", "misaligned − α* v"))
    ):
        curve = list(matched[f"{model}/1/v2_change"].values())
        line_with_seeds(by_flip, levels, curve, f"C{place}", label, shift=place)
    by_flip.axhline(0, color="0.8", linewidth=1, zorder=0)
    by_flip.set(title="one α*, at a matched local flip", xticks=levels, ylabel="change of v2, points")
    by_flip.set(xlabel="v2 % of the trained cell, where D is taken", xlim=(20, 100))
    by_flip.legend(fontsize=8, frameon=False)
    over = f"{len(seeds)} world seed{'s' if len(seeds) > 1 else ''}"
    chart.suptitle(
        f"World {result['world']}, misaligned on {result['trained']}; v from {result['pairs']} pairs after "
        f"block {result['block']} of {result['blocks']}, α* = {result['alpha'][0]:.2f}\n"
        f"v holds {100 * result['explained'][0]:.0f} % of Σσ²; {over}, bars: 95 % over "
        f"{result['curves'][0]['interval']}",
        fontsize=10,
    )
    save(chart, path)
