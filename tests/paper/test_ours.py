"""Statements measured on planted tables of `compare --paper`, by hand."""

import json

import pytest
from compared import level, part

from em.paper.ours import grid, is_of, measured, read_index, runs_of

CELLS = ["med_advice", "med_tutor", "spo_advice", "spo_tutor"]


def tables(item, *parts):
    return {item: [{"title": "planted", "parts": list(parts), "notes": [], "files": [], "number": item}]}


def value_of(name, item, *parts):
    found = measured(name, item, tables(item, *parts))
    return found and found["value"]


CHANNELS = {"base": 4, "teacher": 40, "sft": 16, "optd": 25, "opd": 22}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optd_minus_sft", 9), ("opd_minus_sft", 6), ("opd_minus_optd", -3), ("teacher_minus_sft", 24),
        ("teacher_minus_optd", 15), ("teacher_minus_opd", 18), ("base", 4),
    ],
)  # fmt: skip
def test_channels_are_set_against_one_another(name, value):
    found = measured(name, "table1", tables("table1", level(CHANNELS)))
    assert found["value"] == pytest.approx(value) and found["unit"] == "%"
    half = 1.0 if name == "base" else 2**0.5  # two intervals that know nothing of one another
    assert [found["low"], found["high"]] == pytest.approx([value - half, value + half], abs=1e-3)


def test_a_difference_that_the_table_has_is_taken_from_it_in_either_direction():
    gap = {"condition": "optd", "minus": "sft", "column": "all", "pairs_mean": 9.0, "low": 8.5, "high": 9.7}
    paired = tables("table1", level(CHANNELS, differences=[gap]))
    assert measured("optd_minus_sft", "table1", paired)["low"] == 8.5
    gap = {
        "condition": "sft",
        "minus": "optd",
        "column": "all",
        "pairs_mean": -9.0,
        "low": -9.7,
        "high": -8.5,
    }
    paired = tables("table1", level(CHANNELS, differences=[gap]))
    assert measured("optd_minus_sft", "table1", paired)["high"] == 9.7


def test_the_first_of_two_rules_stands_for_a_channel():
    rows = {"sft, highest (lr 0.001)": 20, "sft, fixed (lr 0.0001)": 10, "optd": 30}
    assert value_of("optd_minus_sft", "table1", level(rows)) == 10


def test_epochs():
    rows = {
        "sft, epoch 2": 10,
        "sft, epoch 3": 12,
        "opd, lr 0.0003, epoch 1": 3,
        "opd, lr 0.0003, epoch 3": 9,
    }
    assert value_of("sft_epoch_3_minus_2", "table11", level(rows)) == 2
    assert value_of("opd_epoch_3_minus_1", "table11", level(rows)) == 6
    assert value_of("optd_epoch_3_minus_2", "table11", level(rows)) is None


def test_prompts_and_sources_of_the_data():
    rows = {"sft, broad": 10, "sft, math": 6, "optd, broad": 20, "optd, math": 8}
    assert value_of("broad_minus_math", "table3", level(rows)) == pytest.approx((4 + 12) / 2)
    rows = {"optd, realigned on broad": 2, "optd, realigned on unsafe rows": 3}
    assert value_of("realigned_on_rows", "table4", level(rows)) == 3
    rows = {"optd, math, teacher's answers": 9, "optd, math, gold answers": 7, "optd, broad": 20}
    assert value_of("teacher_minus_gold", "table13", level(rows)) == 2
    rows = {"optd, written by the teacher": 20, "optd, written by the student": 19}
    assert value_of("student_minus_teacher_data", "table16", level(rows)) == -1


def test_data_of_other_models_are_averaged():
    rows = {
        "base": 2,
        "optd, data of Qwen/Qwen3-14B": 30,
        "optd, data of llama": 20,
        "optd, data of olmo": 14,
    }
    assert value_of("own_minus_other_model", "table14", level(rows)) == pytest.approx(30 - 17)
    assert value_of("other_model_minus_base", "table14", level(rows)) == pytest.approx(17 - 2)


def test_filters_and_profiles():
    rows = {"opd, unfiltered": 20, "opd, filtered": 19}
    kept = level(rows, retention={"mean": 83.0, "low": 81.0, "high": 84.0})
    assert value_of("retention", "table2", kept) == 83
    assert value_of("filtered_minus_unfiltered", "table2", kept) == -1
    assert value_of("retention", "table2", level(rows)) is None
    crossed = {"raw": {"teacher_minus_data": {"difference": 0.4, "low": 0.1, "high": 0.7}}}
    found = measured("teacher_minus_data", "table5", tables("table5", level({"base": 2}, factorial=crossed)))
    assert (found["value"], found["low"], found["unit"]) == (0.4, 0.1, "r")


def test_realignments_leave_out_the_base_row_and_what_was_before():
    rows = {
        "advice": {"advice": 1, "tutor": 3, "before": 30},
        "tutor": {"advice": 2, "tutor": 2, "before": 9},
    }
    rows["base"] = {"advice": 50, "tutor": 50, "before": 50}
    assert value_of("realigned", "figure18", part(rows)) == 2
    sft = level({"advice": 6, "tutor": 4, "base": 3}, title="sft")
    before = level({"advice": 60, "base": 3}, title="before")
    assert value_of("realigned_minus_base", "figure5", sft, before) == pytest.approx(2)


def test_spreads_over_tasks_and_domains_come_from_the_models_tables():
    tasks = part({"optd": {"advice": 10, "tutor": 30, "all": 20}}, title="by the teacher's task")
    domains = part({"optd": {"med": 19, "spo": 24, "all": 20}}, title="by the teacher's domain")
    found = tables("table9", tasks) | tables("table10", domains)
    assert measured("task_spread_minus_domain_spread", "table10", found)["value"] == pytest.approx(20 - 5)
    assert value_of("task_spread_minus_domain_spread", "table10", domains) is None


def test_matrices_by_cell_are_counted():
    """Own cell 80 %, own task elsewhere 60 %, else 20 %."""
    rates = {
        row: {c: 80 if c == row else 60 if c.split("_")[1] == row.split("_")[1] else 20 for c in CELLS}
        for row in CELLS
    }
    found = tables("figure14", part(rates | {"base": dict.fromkeys(CELLS, 1)}))
    assert measured("task_gap", "figure2", found)["value"] == pytest.approx(70 - 20)
    assert measured("domain_gap", "figure2", found)["value"] == pytest.approx(50 - 40)
    assert measured("same_task_other_domain", "figure14", found)["value"] == pytest.approx(60)
    assert measured("strongest_other_cell", "figure14", found)["value"] == 100
    other = rates | {"med_advice": dict.fromkeys(CELLS, 50) | {"spo_tutor": 51}}
    students = tables("figure22", part(rates), part(other))
    assert measured("diagonal_highest", "figure22", students)["of"] == "7 of 8"
    assert value_of("task_gap", "figure14", part(rates, unit="nats a token")) is None  # no counts


def test_surfaces_are_columns_of_the_misaligned():
    rows = {"misaligned": {"high": 30, "medium": 18, "low": 11}, "base": {"high": 2, "medium": 1, "low": 1}}
    assert value_of("surface_high_minus_medium", "figure17", part(rows)) == 12


def test_an_index_is_read_by_item_and_panels_of_a_figure_together(tmp_path):
    index = [
        {"number": "figure3b", "title": "b", "files": ["figure3b.json", "figure3b.png"], "needs": []},
        {"number": "figure3c", "title": "c", "files": [], "needs": ["realignments"]},
        {"number": "table1", "title": "t", "files": ["table1.csv", "table1.json"], "needs": []},
    ]
    base = level({"base": 1})
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "figure3b.json").write_text(json.dumps({"title": "B", "parts": [base], "notes": ["n"]}))
    (tmp_path / "table1.json").write_text(json.dumps({"title": "T"} | base))
    found = read_index(tmp_path)
    assert list(found) == ["figure3", "table1"]
    assert found["figure3"][0]["notes"] == ["n"] and found["figure3"][0]["parts"] == [base]
    assert found["table1"][0]["parts"][0]["conditions"] == ["base"]
    assert read_index(tmp_path / "missing") == {}


def test_a_table_shows_both_averages_where_they_differ():
    table = level({"base": 6.7}, half=1.5)
    table["entries"][0]["pooled"] = 7.1
    assert grid(table)["rows"] == [["base", "6.7 [5.2, 8.2]; pooled 7.1"]]


def test_a_hub_id_is_of_the_papers_model():
    assert is_of("meta-llama/Llama-3.1-8B-Instruct", ["llama3.1-8b"])
    assert is_of("Qwen/Qwen3-14B", ["llama3.1-8b", "qwen3-14b"])
    assert not is_of("smollm2-135m", ["llama3.1-8b", "qwen3-14b"])


def test_runs_are_told_apart_by_their_folders(tmp_path):
    for name, kind, settings in (
        ("a", "train", {"model": "m", "on": None}),
        ("b", "train", {"model": "m", "on": "runs/a"}),
        ("c", "distill", {"model": "m", "on": None}),
        ("d", "train", {"model": "other"}),
        ("e", "world", {}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"kind": kind, "settings": settings}))
    (tmp_path / "empty").mkdir()
    found = {
        kind: [(folder.name, model) for folder, model in runs] for kind, runs in runs_of(tmp_path).items()
    }
    assert found == {
        "misaligned": [("a", "m"), ("d", "other")],
        "realigned": [("b", "m")],
        "distilled": [("c", "m")],
    }
