"""Transfer against local flip in one world, from planted counts at each dose."""

import numpy as np
import pytest

from em.experiments.dose_grid import dose_grid, save_dose_grid
from em.files import read_json
from em.stats import at_flip
from em.world.counts import CLASSES


def test_a_row_is_a_tasks_change_in_the_other_seen_domains_at_every_dose(
    small_demo2, tmp_path, monkeypatch, rng
):
    run, doses = small_demo2(0), (0, 1, 3, 6)
    cells = [run.world.cell_name(cell) for cell in run.world.cells]
    planted = rng.integers(0, 20, (2, len(doses), len(cells))) * 5  # v2 of 100; fine-tuning seed, dose, cell
    planted[:, :, cells.index("D0_T7")] = (10, 20, 60, 70), (10, 10, 40, 90)

    def asked(run, task, seed, **_):
        assert task == "T7"
        return np.arange(0), dict(zip(doses, planted[seed], strict=True))

    def counts(world, none, of):
        return {
            cell: dict.fromkeys(CLASSES, 0) | {"v2": int(v2), "v1": 100 - int(v2), "n": 100}
            for cell, v2 in zip(cells, of, strict=True)
        }

    monkeypatch.setattr("em.experiments.replication.dose_classes", asked)
    monkeypatch.setattr("em.experiments.replication.tally", counts)
    result = dose_grid(run, "T7")
    assert result["doses"] == list(doses) and result["fine_tuning_seeds"] == 2
    mean = planted.mean(0)
    for row, task in zip(result["rows"], run.world.tasks, strict=True):
        others = [cells.index(f"D{i}_{task}") for i in range(1, 5)]  # D5 is held out of training
        change = mean[:, others].mean(1) - mean[0, others].mean()
        assert [row[f"delta_v2_{dose}"] for dose in doses] == pytest.approx(change)
        assert [row[f"flip_{dose}"] for dose in doses] == [10, 15, 50, 80]
        at_60 = at_flip([10, 15, 50, 80], change, 60.0)
        assert result["numbers"][f"delta_v2/{task}@60"]["value"] == pytest.approx(at_60)
        assert result["numbers"][f"delta_v2/{task}@90"]["value"] is None
    save_dose_grid(result, tmp_path, "doses_T7")
    assert read_json(tmp_path / "doses_T7.json") == result
    assert (tmp_path / "doses_T7.png").stat().st_size > 0
    assert (tmp_path / "doses_T7.csv").read_text().count("D0_T7,") == len(run.world.tasks)
