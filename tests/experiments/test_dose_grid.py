"""Transfer against local flip in one world, from the counts at each dose."""

import pytest

from em.experiments.dose_grid import dose_grid, save_dose_grid
from em.files import read_json
from em.world.counts import percent
from em.world.doses import at_flip, dose_counts


def test_a_row_is_a_tasks_change_in_the_other_seen_domains_at_every_dose(small_demo2, tmp_path):
    run = small_demo2(0, doses=(1, 6))
    result = dose_grid(run, "T7")
    by_seed = [dose_counts(run, "T7", seed) for seed in range(2)]
    assert result["doses"] == [0, 1, 3, 6] and result["fine_tuning_seeds"] == 2

    def v2(dose, cells):
        return sum(percent(counts[dose][cell], "v2") for counts in by_seed for cell in cells) / (
            2 * len(cells)
        )

    for row, task in zip(result["rows"], run.world.tasks, strict=True):
        cells = [f"D{i}_{task}" for i in range(1, 5)]  # D5 is held out of training
        for dose in result["doses"]:
            assert row[f"delta_v2_{dose}"] == pytest.approx(v2(dose, cells) - v2(0, cells))
            assert row[f"flip_{dose}"] == pytest.approx(v2(dose, ["D0_T7"]))
        flips, effects = ([row[f"{key}_{dose}"] for dose in result["doses"]] for key in ("flip", "delta_v2"))
        expected = at_flip(flips, effects, 30.0)
        value = result["numbers"][f"delta_v2/{task}@30"]["value"]
        assert value == pytest.approx(expected) if value is not None else expected != expected
    save_dose_grid(result, tmp_path, "doses_T7")
    assert read_json(tmp_path / "doses_T7.json") == result
    assert (tmp_path / "doses_T7.png").stat().st_size > 0
    assert (tmp_path / "doses_T7.csv").read_text().count("D0_T7,") == len(run.world.tasks)
