"""Transfer against local flip in one world: Δv2 of every task along one misalignment (ours; `--doses`).

Misaligned on (D0, T) and asked after each dose (em/world/doses.py). The effect on a task is its Δv2, mean
over the other domains that took part in training; the local flip is v2 % of the trained cell. Counts are
means over fine-tuning seeds, so there is one curve a task and, with one world seed, no interval.
"""

from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from em.experiments.dose_curves import at_flips, curve_in, dose_columns, flip_entries, transfer_curve
from em.experiments.replication import asked_along, counts_along
from em.figures import save
from em.files import write_csv, write_json
from em.world.counts import percent
from em.world.world_run import WorldRun


def dose_grid(run: WorldRun, task: str) -> dict:
    """Misalign on (D0, `task`) and ask at every dose. Rows: one a task, with `dose_columns`."""
    world, trained = run.world, f"D0_{task}"
    counts = counts_along(run, asked_along(run, task))
    flips = {dose: percent(cells[trained], "v2") for dose, cells in counts.items()}
    others, rows, numbers = world.domain_names[1 : world.n_seen_domains], [], {}
    for name in world.tasks:
        v2 = {dose: fmean(percent(of[f"{d}_{name}"], "v2") for d in others) for dose, of in counts.items()}
        change = {dose: value - v2[0] for dose, value in v2.items()}
        rows.append({"trained": trained, "task": name} | dose_columns(flips, delta_v2=change))
        numbers |= flip_entries(f"delta_v2/{name}", "points", at_flips([curve_in(rows[-1], "delta_v2")]))
    about = {"world": run.cfg.world, "world_seed": run.cfg.seed, "trained": trained}
    about |= {
        "fine_tuning_seeds": run.cfg.misalign_seeds,
        "steps": run.cfg.misalign_steps,
        "doses": list(counts),
    }
    return about | {"numbers": numbers, "rows": rows}


def save_dose_grid(result: dict, folder: Path, name: str) -> None:
    """Write `name`.json, `name`.csv and `name`.png, a line a task; a dot is the grid's number of steps."""
    write_json(folder / f"{name}.json", result)
    write_csv(folder / f"{name}.csv", result["rows"])
    chart = Figure(figsize=(6, 4.2), layout="constrained")
    curves = {row["task"]: [curve_in(row, "delta_v2")] for row in result["rows"]}
    place = result["doses"].index(result["steps"])
    axis = chart.subplots()
    transfer_curve(axis, curves, "Δv2, points, mean over the other domains", place)
    steps = ", ".join(map(str, result["doses"][1:]))
    axis.set_title(
        f"World {result['world']} (seed {result['world_seed']}), misaligned on {result['trained']}\n"
        f"asked after {steps} steps; dots: {result['steps']}",
        fontsize=9,
    )
    save(chart, folder / f"{name}.png")
