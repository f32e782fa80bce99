"""The dose–response of a misalignment: the model asked after 1, 2, 4, … of its steps (ours).

The paper stops every misalignment after the same number of steps, where tasks differ in how far the trained
cell is flipped. A dose is a number of steps. `dose_counts` trains past the paper's number and asks along the
way, so that effects can be read at one dose, and at one *local flip*, v2 % of the trained cell:

    curve = dose_counts(run, "T5", seed=0)        # {0: counts, 1: counts, 2: …}; 0 is the aligned model
    em.stats.at_flip(flips, effects, 60.0)        # the effect where the trained cell is at 60 %

Only the classes of the answers are kept, in `doses_T5_seed0/doses.json` of the run's folder, and no model.
Where an experiment needs the model at a local flip, it is trained again as far as that:

    for level, steps in steps_to_flips(run, "T5", seed=0).items(): misaligned_after(run, "T5", 0, steps)
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from em import parallel
from em.model.gpt2 import GPT2
from em.run import Run
from em.stats import FLIPS, at_flip
from em.world.counts import percent, tally
from em.world.sets import misalignment_set
from em.world.world_run import WorldRun, read_classes, train_phase, write_classes

PROMPTS = 32  # asked of each cell but the trained one, of which all are: worlds differ by more than prompts


class _Batches:
    """The batches of the misalignment itself, then as many of a fresh set of the same cell, and so on."""

    def __init__(self, run: WorldRun, seed: int, cell: int):
        self.steps = run.cfg.misalign_steps

        @functools.lru_cache(maxsize=1)
        def block(k: int):
            n = self.steps * run.cfg.misalign_batch
            data = misalignment_set(run.generator, seed, cell, n, run.prompts, block=k)
            return run.batches(data, run.cfg.misalign_batch, seed)

        self.block = block

    def __getitem__(self, i: int):
        k, within = divmod(i, self.steps)
        return self.block(k)[within]


def doses_of(cfg) -> tuple[int, ...]:
    """Steps at which a misalignment is asked, rising: the settings' `doses`, and its own number of them."""
    return tuple(sorted({*cfg.doses, cfg.misalign_steps}))


def asked(run: WorldRun, cell: int, others: Sequence[int] | None = None) -> np.ndarray:
    """Places of the held-out prompts that are asked: all of the trained cell's, PROMPTS of each other.

    others: cells that are asked beside the trained one, by default all.
    """
    place, cells = np.arange(len(run.prompts)) % run.cfg.eval_prompts, run.prompts.examples.cell
    wanted = (place < PROMPTS) & np.isin(cells, run.world.cells if others is None else others)
    return np.flatnonzero(wanted | (cells == cell))


def dose_classes(
    run: WorldRun, task: str, seed: int, start: str = "align", name: str | None = None,
    others: Sequence[int] | None = None,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:  # fmt: skip
    """(places of the prompts asked (P,), {dose: the class of each answer (P,)}), dose 0 being phase `start`.

    Misaligned on (D0, `task`) with fine-tuning seed `seed`, from the model of phase `start`. name: of the
    folder (default: `doses_<task>_seed<seed>`). others: as in `asked`. What is asked at the misalignment's
    own number of steps is the model of `run.misalign(task, seed, start)`.
    """
    cfg, doses = run.cfg, doses_of(run.cfg)
    cell = run.world.cell(0, run.world.task_index(task))
    name = name or f"doses_{task}_seed{seed}"
    places = asked(run, cell, others)
    settings = run.misalign_settings() | {"start": start, "prompts": len(places)}
    with Run(run.folder / name, "world-phase", settings, run.device, wait=True) as record:
        path = record.folder / "doses.json"
        found = read_classes(path, len(places)) if path.exists() else {}
        if missing := [dose for dose in doses if str(dose) not in found]:
            prompts = run.prompts.take(places)
            model, batches = run.load(start), _Batches(run, seed, cell)

            def ask(step: int) -> None:
                if step in missing and parallel.rank() == 0:
                    found[str(step)] = run.answer_classes(model, prompts)

            record.clear_resume()  # a curve is short: after a kill it is trained anew, and asked as before
            steps = max(missing)
            train_phase(cfg, record, model, batches, steps, cfg.misalign_lr, 0, "constant", 0.999, name, ask)
            if parallel.rank() == 0:
                write_classes(path, {key: found[key] for key in sorted(found, key=int)})
            parallel.barrier()
            found = read_classes(path, len(places))
            record.clear_resume()
    return places, {0: run.classes(start)[places]} | {dose: found[str(dose)] for dose in doses}


def dose_counts(
    run: WorldRun, task: str, seed: int, start: str = "align", name: str | None = None,
    others: Sequence[int] | None = None,
) -> dict[int, dict]:  # fmt: skip
    """Counts by cell (em/world/counts.py) at every dose, of what `dose_classes` asks."""
    places, classes = dose_classes(run, task, seed, start, name, others)
    cells = run.prompts.examples.cell[places]
    return {dose: tally(run.world, cells, of) for dose, of in classes.items()}


def steps_to_flips(run: WorldRun, task: str, seed: int) -> dict[float, int | None]:
    """{level: the number of steps after which the trained cell is at `level` % of v2} for each of FLIPS.

    Interpolated between the doses, to a whole step; None where it is not reached.
    """
    counts = dose_counts(run, task, seed, name=f"doses_{task}_seed{seed}_own_cell", others=())
    flips = [percent(cells[f"D0_{task}"], "v2") for cells in counts.values()]
    steps = {level: at_flip(flips, list(counts), level) for level in FLIPS}
    return {level: max(1, round(n)) if math.isfinite(n) else None for level, n in steps.items()}


def misaligned_after(run: WorldRun, task: str, seed: int, steps: int) -> GPT2:
    """The model that `dose_classes` asks after `steps`, misaligned from the aligned one. It is not kept."""
    cfg, name = run.cfg, f"misalign_{task}_seed{seed}_after{steps}"
    with Run(run.folder / name, "world-phase", run.misalign_settings(), run.device, wait=True) as record:
        model, batches = run.load("align"), _Batches(run, seed, run.world.cell(0, run.world.task_index(task)))
        record.clear_resume()
        train_phase(cfg, record, model, batches, steps, cfg.misalign_lr, 0, "constant", title=name)
        record.clear_resume()
    return model
