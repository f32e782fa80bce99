"""How many world seeds a number needs, from the runs there are (ours; `synth.py <experiment> --power`).

A model's Δv2 varies with the world seed, the task it was misaligned on, the fine-tuning seed and the prompts
that it was asked (em/experiments/variance_components.py). An interval of mean ± h needs the least n with
t(n − 1)·sd/√n ≤ h. The sd over world seeds is itself known to its χ² interval, whose ends give the n in
brackets. Both take a number to be normal over worlds.
"""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from em.errors import UserError
from em.experiments.variance_components import COMPONENTS, Group, decompose
from em.files import check, read_json, read_record, write_csv, write_json
from em.stats import sd_interval, t_quantile
from em.world.counts import CLASSES
from em.world.world import WORLDS
from em.world.world_run import read_classes

QUANTITIES = {
    "cross_delta_v2": "Δv2 of the trained task in the other seen domains",
    "trained_cell": "Δv2 of the trained cell",
}
# Half-widths that are asked about, by unit of em/world/counts.py; there is none for the norm of a vector.
WIDTHS = {"%": (5, 10, 20), "points": (5, 10, 20), "ratio": (0.05, 0.1, 0.2), "r": (0.05, 0.1, 0.2)}
V2 = CLASSES.index("v2")


# -- seeds needed ------------------------------------------------------------------------------------------


def needed(sd: float, half: float) -> int:
    """The least number n ≥ 2 of world seeds with a Student's t interval of mean ± `half` or less."""

    def wide(n: int) -> bool:
        return t_quantile(n - 1) * sd / math.sqrt(n) > half

    low, high = 1, 2  # the width falls with n
    while wide(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wide(middle) else (low, middle)
    return high


def plan(unit: str, by_seed: Sequence[float | None]) -> dict | None:
    """The mean and sd over world seeds, and for each of WIDTHS the seeds needed, with the sd's 95 % interval.

    None where there are fewer than two values. `of` seeds, `seeds` have one: those needed are of the latter.
    """
    known = [value for value in by_seed if value is not None]
    if len(known) < 2:
        return None
    sd = statistics.stdev(known)
    low, high = sd_interval(sd, len(known) - 1)
    seeds = {"value": statistics.fmean(known), "seeds": len(known), "of": len(by_seed)}
    return {"unit": unit, **seeds, "sd": sd, "sd_low": low, "sd_high": high} | {
        "needed": [
            {"half_width": half, "n": needed(sd, half), "low": needed(low, half), "high": needed(high, half)}
            for half in WIDTHS[unit]
        ],
    }


# -- the runs there are ------------------------------------------------------------------------------------


def _counts(path: Path) -> dict[str, dict]:
    counts = read_json(path)
    check(counts, path, dict.fromkeys(counts, dict))
    for cell, of in counts.items():
        check(of, f"{path}, {cell}", dict.fromkeys((*CLASSES, "n"), int))
        if of["n"] < 2 or not 0 <= of["v2"] <= of["n"]:
            raise UserError(f"{path}, {cell}: no {of['v2']} of {of['n']} answers, of two at least")
    return counts


def _v2(phase: Path, counts: dict[str, dict], cells: Sequence[str]) -> np.ndarray | None:
    """(cells, n) bool, which answers are v2; None where an older version kept no classes."""
    path = phase / "classes.json"
    if not path.exists():
        return None
    sizes = [of["n"] for of in counts.values()]  # prompts stand cell by cell
    answers = read_classes(path, sum(sizes)).get("", np.zeros(sum(sizes)) - 1)
    by_cell = dict(zip(counts, np.split(answers == V2, np.cumsum(sizes)[:-1]), strict=True))
    if any(by_cell[cell].sum() != counts[cell]["v2"] for cell in cells):
        raise UserError(f"{path} and counts.json beside it are of different answers")
    return np.stack([by_cell[cell] for cell in cells])


def noise_of_answers(models: Sequence[np.ndarray], aligned: np.ndarray) -> np.ndarray:
    """(k, k) covariance over prompts of the models' mean Δv2, in points.

    models: (cells, n) bool each, whether an answer is v2; aligned: the same, to the same prompts.
    """
    moved = np.stack([model.astype(float) - aligned for model in models])
    moved -= moved.mean(2, keepdims=True)
    cells, n = aligned.shape
    return 1e4 * np.einsum("icp,jcp->ij", moved, moved) / (n * (n - 1)) / cells**2


def noise_of_counts(models: Sequence[dict], aligned: dict, cells: Sequence[str]) -> np.ndarray:
    """The same where only counts by cell were kept: the models' answers then count as independent.

    Answers to one prompt go together, so this overstates the prompts' part of a difference of two models, and
    understates the fine-tuning seeds'.
    """

    def variance(counts: dict) -> float:
        rates = [(counts[c]["v2"] / counts[c]["n"], counts[c]["n"]) for c in cells]
        return 1e4 * sum(p * (1 - p) / (n - 1) for p, n in rates) / len(cells) ** 2

    return variance(aligned) + np.diag([variance(model) for model in models])


def _group(world: int, task: str, aligned: Path, phases: Sequence[Path], cells: Sequence[str]) -> Group:
    """Mean Δv2 over `cells` of the misaligned models of `phases`, from the model of `aligned`."""
    before, *after = (_counts(path / "counts.json") for path in (aligned, *phases))
    for phase, counts in zip(phases, after, strict=True):
        if {c: of["n"] for c, of in counts.items()} != {c: of["n"] for c, of in before.items()}:
            raise UserError(f"{phase / 'counts.json'} and that of {aligned} are of different prompts")
    effects = [
        100 * statistics.fmean((counts[c]["v2"] - before[c]["v2"]) / counts[c]["n"] for c in cells)
        for counts in after
    ]
    answers = [_v2(p, c, cells) for p, c in zip((aligned, *phases), (before, *after), strict=True)]
    if any(of is None for of in answers):
        noise, exact = noise_of_counts(after, before, cells), False
    else:
        noise, exact = noise_of_answers(answers[1:], answers[0]), True
    return Group(world, task, np.array(effects), noise, exact)


def run_folders(out: Path, world: str, name: str) -> dict[int, list[tuple[str, Path]]]:
    """By world seed, the run folders of the experiment, each with what is added to the names of its tasks.

    `fraction` has one for every share of variant 2 in pretraining; the others have the base run.
    """
    tail = r"-v2_([\d.]+)" if name == "fraction" else "()"
    found: dict[int, list[tuple[str, Path]]] = {}
    for path in sorted(out.glob(f"world{world}-seed*")):
        if match := re.fullmatch(rf"world{world}-seed(\d+){tail}", path.name):
            found.setdefault(int(match[1]), []).append((match[2] and f" at {match[2]}", path))
    return dict(sorted(found.items()))


def _same_settings(phases: Sequence[Path]) -> None:
    """UserError where models differ in more than seed, task and share of variant 2 in pretraining."""
    first = None
    for path in phases:
        made = read_record(path)["settings"]
        made = {k: v for k, v in made.items() if k not in ("seed", "fingerprint", "v2_fraction")}
        first = first or (path, made)
        if changed := [key for key in made if made[key] != first[1].get(key)]:
            raise UserError(f"{path} and {first[0]} were made under other settings: {', '.join(changed)}")


def read_groups(folders: dict, world: str) -> tuple[dict[str, list[Group]], list[str]]:
    """(groups by name of QUANTITIES, what is not finished and so left out). folders: as of `run_folders`.

    Nothing is locked or written: a phase is there once its counts.json is. UserError where models were made
    under different settings.
    """
    groups: dict[str, list[Group]] = {name: [] for name in QUANTITIES}
    skipped, read = [], []
    for seed, label, folder in ((seed, *place) for seed, places in folders.items() for place in places):
        phases: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("misalign_*_seed*")):
            match = re.fullmatch(r"misalign_(T\d+)_seed\d+", path.name)
            if match and (path / "counts.json").exists():
                phases.setdefault(match[1], []).append(path)
            elif match:
                skipped.append(f"{folder.name}/{path.name} has no counts.json yet")
        if not (folder / "align" / "counts.json").exists():
            skipped.append(f"{folder.name} has no align/counts.json yet")
            continue
        if not phases:
            skipped.append(f"{folder.name} has no misaligned model yet")
        names = list(_counts(folder / "align" / "counts.json"))
        domains = list(dict.fromkeys(name.split("_")[0] for name in names))
        others = domains[1 : len(domains) - WORLDS[world].n_unseen_domains]
        for task, of_task in phases.items():
            read += of_task
            for quantity, there in zip(QUANTITIES, (others, domains[:1]), strict=True):
                cells = [f"{domain}_{task}" for domain in there]
                if not set(cells) <= set(names):
                    raise UserError(f"{folder / 'align' / 'counts.json'} lacks one of {', '.join(cells)}")
                groups[quantity].append(_group(seed, task + label, folder / "align", of_task, cells))
    _same_settings(read)
    return groups, skipped


# -- the command -------------------------------------------------------------------------------------------


def measure(out: Path, world: str, name: str, seeds: Sequence[int] | None) -> dict:
    """What the runs of experiment `name` under `out` say: variance components, and the seeds needed.

    seeds: the world seeds to read, by default all there are. UserError where one has no run, or none has.
    """
    folders = run_folders(out, world, name)
    if lacking := [seed for seed in seeds or () if seed not in folders]:
        raise UserError(f"--power trains nothing, and {out} has no run of world {world}, seed {lacking[0]}")
    folders = {seed: folders[seed] for seed in seeds or folders}
    groups, skipped = read_groups(folders, world)
    if not any(groups.values()):
        raise UserError(f"--power trains nothing, and {out} has no misaligned model of {name}, world {world}")
    found = {quantity: decompose(of) for quantity, of in groups.items()}
    worlds = sorted({group.world for of in groups.values() for group in of})
    table = {
        f"{quantity}/{task}": plan("points", of["by_seed"])
        for quantity, parts in found.items()
        for task, of in parts["by_task"].items()
    }
    path, without = out / f"{name}-world{world}" / f"{name}.json", []
    if path.exists():
        result = read_json(path, {"seeds": list[int], "numbers": dict})
        check(result["numbers"], path, dict.fromkeys(result["numbers"], dict))
        for key, number in result["numbers"].items():
            values = by_world(result["seeds"], number, worlds, f"{path}, {key}")
            table[key] = plan(number["unit"], values) if values else None
            if table[key] is None:
                without.append(key)
    return {
        "experiment": name,
        "world": world,
        "seeds": worlds,
        "skipped": skipped,
        "result": path.name if path.exists() else None,
        "quantities": found,
        "exact": all(group.exact for of in groups.values() for group in of),
        "numbers": {key: of for key, of in table.items() if of},
        "without": without,
    }


def by_world(seeds: Sequence[int], number: dict, worlds: Sequence[int], where: str) -> list | None:
    """A number's values in `worlds`; None where it has none by world seed, or no width to ask about.

    seeds: those of the result that `number`, an entry of its `numbers`, is from.
    """
    check(number, where, {"unit": str}, {"by_seed": list[float | None]})
    values = number.get("by_seed", [])
    if len(values) != len(seeds) or number["unit"] not in WIDTHS:
        return None
    return [value for seed, value in zip(seeds, values, strict=True) if seed in worlds]


def rows(result: dict) -> list[dict]:
    """One row a number and half-width."""
    return [
        {"number": key} | {k: v for k, v in found.items() if k != "needed"} | of
        for key, found in result["numbers"].items()
        for of in found["needed"]
    ]


def save(result: dict, folder: Path) -> None:
    write_json(folder / "power.json", result)
    write_csv(folder / "power.csv", rows(result))


# -- what it says ------------------------------------------------------------------------------------------


def say(result: dict) -> str:
    """Components, what pays, and the seeds needed, for a terminal."""
    name, world, seeds = result["experiment"], result["world"], result["seeds"]
    of_seeds = f"world seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    lines = [f"{name}, world {world}: what the runs of {of_seeds} say; nothing is trained"]
    lines += [f"  left out: {what}" for what in result["skipped"]]
    if not result["exact"]:
        lines.append(
            "  Some runs kept counts alone: prompts' part is overstated, fine-tuning seeds' understated."
        )
    for quantity, found in result["quantities"].items():
        lines += ["", *_components(QUANTITIES[quantity], found)]
    if result["numbers"]:
        lines += ["", *_needed(result["numbers"])]
    again = f"`synth.py {name}` over these seeds, which trains nothing that is there"
    if result["result"] is None:
        lines.append(f"There is no {name}.json: for its own numbers, run {again}.")
    elif result["without"]:
        lines.append(
            f"{len(result['without'])} numbers of {name}.json have no values in two of these world seeds, "
            f"are no mean over seeds, or are norms. Those of an older version have them after {again}."
        )
    return "\n".join(lines)


def _components(title: str, found: dict) -> list[str]:
    tasks = found["by_task"]
    worlds = {world for of in tasks.values() for world in of["worlds"]}
    of_worlds = f"{len(worlds)} world seed{'s' if len(worlds) > 1 else ''}"
    lines = [f"{title}, points: {of_worlds}, tasks {', '.join(tasks)}"]
    lines.append("  component              sd  of variance")
    parts = found["components"]
    for name in COMPONENTS:
        part = parts[name]
        if part["sd"] is None:
            lines.append(f"  {name:<18}      —  {_why(name, parts)}")
        else:
            note = "  below 0, shown as 0" if part["truncated"] else ""
            share = "—" if part["share"] is None else f"{100 * part['share']:.0f} %"
            lines.append(f"  {name:<18} {part['sd']:6.1f}  {share:>5}{note}")
    return lines + ([f"  {_pays(found)}"] if found["pays"] else [])


def _why(name: str, parts: dict) -> str:
    """Why a component is not there."""
    if name == "fine-tuning seed":
        holder = COMPONENTS[0] if parts[COMPONENTS[1]]["sd"] is None else COMPONENTS[1]
        return f"not estimable, in that of {holder}: add --misalign-seeds 3"
    if parts[COMPONENTS[0]]["sd"] is None:
        return "not estimable with one world seed"
    return "not estimable with one task" + ("" if name == "task" else f", in that of {COMPONENTS[0]}")


def _pays(found: dict) -> str:
    pays = found["pays"]
    if not pays["sd"]:
        return "Nothing varies."
    prompts, tuning = pays["prompts_share"], pays["tuning_share"] or 0.0
    what = "more worlds pay"
    if max(prompts, tuning) > 1 - prompts - tuning:
        what = "more prompts pay" if prompts > tuning else "more fine-tuning seeds pay"

    def worth(share: float, worlds: float | None) -> str:
        added = "any number of worlds" if worlds is None else f"{worlds:.1f} more worlds"
        return f"{100 * share:.0f} % of the variance, endless ones worth {added}"

    text = f"{what[0].upper() + what[1:]}: one task's Δv2 has sd {pays['sd']:.1f} over worlds; prompts are "
    text += worth(prompts, pays["prompts_worth_worlds"])
    if pays["tuning_share"] is not None:
        text += f"; fine-tuning seeds {worth(tuning, pays['tuning_worth_worlds'])}"
    return text + "."


def _needed(numbers: dict) -> list[str]:
    """A table a kind of unit: the seeds needed at each half-width."""
    lines = ["World seeds needed for a 95 % interval of ± h [by the sd's own 95 % interval, χ²]:"]
    width = max(map(len, numbers))
    for widths in dict.fromkeys(WIDTHS.values()):
        chosen = {key: of for key, of in numbers.items() if WIDTHS[of["unit"]] == widths}
        if not chosen:
            continue
        head = "".join(f"{f'± {h:g}':>17}" for h in widths)
        lines.append(f"  {'':<{width}} {'value':>8} {'sd':>7} {'seeds':>5}{head}")
        form = ".1f" if widths[0] >= 1 else ".2f"
        for key, of in chosen.items():
            cells = (f"{n['n']} [{n['low']}, {n['high']}]" for n in of["needed"])
            lines.append(
                f"  {key:<{width}} {of['value']:>+8{form}} {of['sd']:>7{form}} {of['seeds']:>5}"
                + "".join(f"{cell:>17}" for cell in cells)
            )
    return lines
