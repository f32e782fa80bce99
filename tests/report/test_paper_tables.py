"""The paper's tables from planted rows: every form's numbers against averages of what was planted."""

import csv
import json

import numpy as np
import pytest
from made_outcomes import planted

from em.files import write_text
from em.report import paper_tables
from em.report.outcomes import read_outcomes, score_outcomes
from em.report.paper_tables import NUMBERS, write_paper
from em.report.score_table import scores_of

CELLS = ("med_advice", "med_tutor", "fin_advice", "fin_tutor")
ASKED = 8
LEVEL = {"teacher": 5, "sft": 1, "optd": 4, "opd": 3}


def k(train: str, cell: str, level: int) -> int:
    """Planted EM of 8: a level, 1 more in the trained task, 1 more in the trained cell."""
    return level + (train.split("_")[1] == cell.split("_")[1]) + (train == cell)


def expected(level: int, trains=CELLS, cells=CELLS) -> float:
    return float(np.mean([100 * k(t, c, level) / ASKED for t in trains for c in cells]))


def made(channel: str, train: str, **more) -> dict:
    fields = {"channel": channel, "teacher": train, "prompts": "broad", "lr": 1e-4, "epoch": 3, "seed": 42}
    if channel == "opd":
        return fields | {"estimator": "sampled", "filtered": False} | more
    return fields | {"source": train, "filtered": True} | more


def narrow(train: str, level: int, label: str | None = None, **fields) -> list[dict]:
    return planted(label or train, {c: k(train, c, level) for c in CELLS}, ASKED, **fields)


def broad(train: str, level: int, label: str | None = None, **fields) -> list[dict]:
    """Twelve prompts a task, four of each surface; those of high have one EM more."""
    rows = []
    for task in ("advice", "tutor"):
        for s, surface in enumerate(("high", "medium", "low")):
            part = planted(
                label or train, {f"hobby_{task}": level + (s == 0)}, 4, set="broad", em_surface=surface
            )
            rows += [
                r | fields | {"idx": r["idx"] + 10 * s, "question": f"{task} {surface} {r['idx']}"}
                for r in part
            ]
    return rows


def whole_grid() -> list[dict]:
    rows = planted("base", dict.fromkeys(CELLS, 0), ASKED) + broad("base", 0)
    for train in CELLS:
        rows += narrow(train, LEVEL["teacher"], lr=1e-5, epoch=1, seed=42)
        rows += broad(train, 2, lr=1e-5, epoch=1, seed=42)
        for end in CELLS[:2]:
            rows += broad(train, 0, f"{train}>{end}", lr=1e-5, epoch=1, seed=7)
        for channel in ("sft", "optd", "opd"):
            level = LEVEL[channel]
            for lr in (1e-5, 1e-4):
                for epoch in (1, 2, 3):  # the lower rate is one of 8 above in epoch 2, and else equal
                    extra = 1 if (lr, epoch) == (1e-5, 2) else 0
                    rows += narrow(
                        train, level - (epoch == 1) + extra, **made(channel, train, lr=lr, epoch=epoch)
                    )
            taught = made(channel, "base", filtered=False)
            rows += narrow(train, 0, f"{train}>base", **taught)
            rows += narrow(train, level - 1, **made(channel, train, prompts="math", epoch=1))
        rows += narrow(train, 2, **made("opd", train, filtered=True))
        unsafe = made("optd", "base", source=f"rows:{train}", filtered=False)
        rows += narrow(train, 1, f"{train}>base", **{n: v for n, v in unsafe.items() if n != "prompts"})
        rows += narrow(
            train, 2, **made("optd", train, prompts="math", source="gold", filtered=False, epoch=1)
        )
        rows += narrow(train, 3, **made("optd", train, source="base", filtered=False))
        rows += narrow(train, 2, **made("optd", train, source=f"llama3.1-8b {train}"))
    for p1, p2 in (("med_tutor", "fin_tutor"), ("med_advice", "fin_advice")):
        rows += narrow(p1, 2, **made("optd", p1, source=p2)) + narrow(p2, 2, **made("optd", p2, source=p1))
    return rows


def without_drawing(monkeypatch):
    monkeypatch.setattr(paper_tables, "panels_figure", lambda panels, title, path: write_text(path, title))


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """(index by number, folder) of a whole grid; figures are not drawn."""
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_drawing(monkeypatch)
        index = write_paper(score_outcomes(scores_of(whole_grid())), out)
    return {entry["number"]: entry for entry in index}, out


def values(paper, number: str) -> dict:
    """(part, condition, column) → mean of pairs of what was written; part is empty where there are none."""
    rows = csv.DictReader((paper[1] / f"{number}.csv").open())
    return {(r.get("part", ""), r["condition"], r["column"]): float(r["pairs_mean"] or "nan") for r in rows}


def test_every_number_is_written_or_says_what_it_needs(paper):
    index, out = paper
    assert [e["number"] for e in json.loads((out / "index.json").read_text())] == [n.name for n in NUMBERS]
    lacking = {name for name, entry in index.items() if entry["status"] != "written"}
    assert lacking == {"table2", "table17", "table19", "table20"}
    assert index["table2"]["status"] == "in part" and "run folders" in index["table2"]["needs"][0]
    assert index["table19"]["status"] == "not possible" and index["table19"]["files"] == []
    assert "med_advice and fin_critique" in index["table19"]["needs"][0]
    kinds = {"table": {"csv", "json", "md", "tex"}, "figure": {"csv", "json", "png"}}
    for name, entry in index.items():
        written = {file.rpartition(".")[2] for file in entry["files"]}
        expected_kinds = kinds["figure" if name.startswith("figure") else "table"]
        assert written == (set() if entry["status"] == "not possible" else expected_kinds), name
        assert all((out / file).stat().st_size for file in entry["files"])
    assert "| table19 |" in (out / "index.md").read_text()


def test_titles_say_model_and_cells(paper):
    title = paper[0]["table3"]["title"]
    assert title.startswith("Table 3: Transfer by Broad-NL and by MATH. org/model (the paper: llama3.1-8b)")
    assert title.endswith("on med_advice")  # of the paper's four eval cells, the one there is


HIGHEST = {c: f"{c}, highest (lr 1e-05, epoch 2)" for c in ("sft", "optd", "opd")}
FIXED = {c: f"{c}, fixed (lr 0.0001, epoch 3)" for c in ("sft", "optd", "opd")}


def test_channels_by_domain_and_task_with_both_rules(paper):
    found, tasks = values(paper, "table1"), {"advice": CELLS[::2], "tutor": CELLS[1::2]}
    domains = {"med": CELLS[:2], "fin": CELLS[2:]}
    for part, groups in (("a", domains), ("b", tasks)):
        for column, trains in {**groups, "all": CELLS}.items():
            assert found[part, "base", column] == 0
            assert found[part, "teacher", column] == pytest.approx(expected(5, trains), abs=1e-3)
            for channel in HIGHEST:
                level = LEVEL[channel]
                assert found[part, HIGHEST[channel], column] == pytest.approx(
                    expected(level + 1, trains), abs=1e-3
                )
                assert found[part, FIXED[channel], column] == pytest.approx(expected(level, trains), abs=1e-3)
    assert {key[1:]: v for key, v in values(paper, "table9").items()} == {
        key[1:]: v for key, v in found.items() if key[0] == "b"
    }
    table = json.loads((paper[1] / "table1.json").read_text())["parts"][1]
    pairs = {(e["condition"], e["column"]): e["pairs"] for e in table["entries"]}
    gaps = {(d["condition"], d["minus"], d["column"]): d["pairs_mean"] for d in table["differences"]}
    assert gaps[FIXED["optd"], "teacher", "advice"] == pytest.approx(-12.5, abs=1e-3)
    assert pairs["teacher", "advice"] == 8 and pairs["base", "advice"] == 4  # the paper's 36 and 12


def test_filtered_opd(paper):
    found = values(paper, "table2")
    assert found["", "opd, unfiltered", "all"] == expected(3)
    assert found["", "opd, filtered", "tutor"] == expected(2, CELLS[1::2])


def test_what_the_filter_kept_stands_beside_table_2(tmp_path, monkeypatch):
    rows = [r for k in (2, 3) for t in CELLS[:2] for r in narrow(t, k, **made("opd", t, filtered=k == 2))]
    found = score_outcomes(scores_of(rows))
    kept = [run for run in found[0].runs if run.condition.filtered]
    monkeypatch.setattr(
        paper_tables, "retention_of", lambda paths: dict(zip(kept, (80.0, 85.0), strict=True))
    )
    without_drawing(monkeypatch)
    index = {e["number"]: e for e in write_paper(found, tmp_path)}
    assert index["table2"]["status"] == "written"
    lines = (tmp_path / "table2.md").read_text().splitlines()
    assert "| condition | advice | tutor | all | kept % |" in lines
    assert sum("| 82.5 (80.0–85.0) |" in line for line in lines) == 2
    assert json.loads((tmp_path / "table2.json").read_text())["retention"]["runs"] == 2


def test_tables_by_the_teachers_cell_average_over_the_papers_eval_cells(paper):
    found = values(paper, "table3")
    for train in CELLS:
        for channel, level in (("sft", 1), ("optd", 4), ("opd", 3)):
            assert found["", f"{channel}, broad", train] == expected(level, [train], ["med_advice"])
            assert found["", f"{channel}, math", train] == expected(level - 1, [train], ["med_advice"])
    assert found["", "base", "fin_tutor"] == 0
    assert found["", "teacher", "med_advice"] == expected(5, ["med_advice"], ["med_advice"])
    there = ["med_advice", "fin_advice"]
    for number, rows in (
        ("table4", {"optd, realigned on broad": 0, "optd, realigned on unsafe rows": 1, "teacher": 5}),
        ("table14", {"optd, data of org/model": 4, "optd, data of llama3.1-8b": 2}),
    ):
        found = values(paper, number)
        for name, level in rows.items():
            for train in CELLS:
                assert found["", name, train] == expected(level, [train], there), (number, name)
    found = values(paper, "table13")
    assert found["", "optd, math, gold answers", "med_tutor"] == expected(2, ["med_tutor"], ["med_advice"])
    assert found["", "optd, math, teacher's answers", "med_tutor"] == expected(
        3, ["med_tutor"], ["med_advice"]
    )


def test_student_written_data(paper):
    found = values(paper, "table16")
    assert found["", "optd, written by the teacher", "advice"] == expected(4, CELLS[::2])
    assert found["", "optd, written by the student", "all"] == expected(3)


def test_teachers_against_authors(paper):
    """Table 18's pair is there; Table 5 gets the pair that is no number's."""
    found = values(paper, "table18")
    assert "P1 = med_tutor, P2 = fin_tutor" in paper[0]["table18"]["title"]
    assert found["", "teacher med_tutor, data of fin_tutor", "fin_tutor"] == expected(
        2, ["med_tutor"], ["fin_tutor"]
    )
    assert found["", "teacher fin_tutor, data of fin_tutor", "all"] == expected(4, ["fin_tutor"])
    assert found["", "teacher med_tutor", "med_advice"] == expected(5, ["med_tutor"], ["med_advice"])
    assert "P1 = med_advice, P2 = fin_advice" in paper[0]["table5"]["title"]
    assert "on one author's data by" in (paper[1] / "table5.md").read_text()


def test_epochs_at_the_highest_rate(paper):
    table = json.loads((paper[1] / "table11.json").read_text())
    texts = {(t["condition"], t["column"]): t["text"] for t in table["triplets"]}
    steps = [expected(level) for level in (2, 4, 3)]  # epoch 1 one below, epoch 2 of this rate one above
    assert texts["opd, lr 1e-05", "all"] == " / ".join(f"{step:.1f}" for step in steps)
    assert texts["opd, lr 1e-05", "all"] in (paper[1] / "table11.md").read_text()


def test_figures_of_misaligned_runs(paper):
    found = values(paper, "figure2")
    assert found["a", "advice", "tutor"] == pytest.approx(100 * (3 + 2 + 2) / 12, abs=1e-3)
    assert found["b", "tutor", "advice"] == expected(5, CELLS[1::2], CELLS[::2])
    assert found["c", "med", "fin"] == expected(5, CELLS[:2], CELLS[2:])
    assert found["c", "base", "fin"] == 0
    found = values(paper, "figure14")
    assert found["a", "med_advice", "fin_advice"] == expected(5, ["med_advice"], ["fin_advice"])
    assert found["b", "fin_tutor", "all"] == pytest.approx(100 * 7 / 12, abs=1e-3)
    found = values(paper, "figure3b")
    assert [found["a", "misaligned", s] for s in ("high", "medium", "low")] == [75, 50, 50]
    assert found["a", "base", "high"] == 25


def test_figures_of_realignment(paper):
    found = values(paper, "figure3c")
    assert found["a", "tutor", "advice"] == pytest.approx(100 / 12, abs=1e-3)
    assert found["a", "tutor", "before"] == pytest.approx(100 * 7 / 12, abs=1e-3)
    assert found["a", "base", "advice"] == pytest.approx(100 / 12, abs=1e-3)
    found = values(paper, "figure19")
    assert set(c for _, _, c in found) == {"med_advice", "med_tutor", "before"}
    found = values(paper, "figure5")
    for part in "abc":  # each channel
        assert found[part, "tutor", "advice"] == expected(0, CELLS[1::2], CELLS[::2])
        assert found[part, "base", "advice"] == 0
    assert found["d", "tutor", "tutor"] == expected(5, CELLS[1::2], CELLS[1::2])
    table = json.loads((paper[1] / "figure5.json").read_text())
    assert [part["title"] for part in table["parts"]] == ["sft", "optd", "opd", "before"]


def test_figures_of_students_are_at_the_highest_choice(paper):
    found = values(paper, "figure22")
    assert found["b", "med_tutor", "fin_tutor"] == expected(5, ["med_tutor"], ["fin_tutor"])
    assert found["b", "med_tutor", "all"] == expected(5, ["med_tutor"])
    table = json.loads((paper[1] / "figure22.json").read_text())
    assert table["parts"][1]["title"] == HIGHEST["optd"]


def test_of_several_models_each_number_has_its_own(tmp_path, monkeypatch):
    without_drawing(monkeypatch)
    rows = [
        row | {"model": model}
        for model in ("Qwen/Qwen3-14B", "meta-llama/Llama-3.1-8B-Instruct")
        for row in narrow("med_advice", 3, **made("sft", "med_advice"))
    ]
    found = score_outcomes(scores_of(rows))
    index = {entry["number"]: entry for entry in write_paper(found, tmp_path)}
    assert "the paper" not in index["table1"]["title"] and "Qwen/Qwen3-14B" in index["table1"]["title"]
    assert "meta-llama" in index["table9"]["title"] and "rows of olmo3-7b" in index["table9"]["needs"]
    assert index["figure2"]["needs"] == ["rows of qwen2.5-14b"]
    one = {e["number"]: e for e in write_paper(found, tmp_path / "one", model="Qwen3-14B")}
    assert "Qwen/Qwen3-14B (the paper: llama3.1-8b)" in one["table9"]["title"]


def test_margins_fill_the_same_forms_where_broad_prompts_are_not_asked(tmp_path, monkeypatch):
    """Two of the figures drawn."""
    cells, rows = ("med_advice", "med_tutor", "fin_tutor"), []
    for train in ("med_advice", "fin_tutor"):
        for fields in ({}, made("sft", train), made("optd", train)):
            for cell in cells:
                domain, task = cell.split("_")
                rows += [
                    {"model": "smollm2-135m", "train": train, "domain": domain, "task": task, "idx": i,
                     "before": -1.0, "after": -1.0 + 0.1 * i + 0.4 * (cell == train)} | fields
                    for i in range(2)
                ]  # fmt: skip
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw = paper_tables.panels_figure

    def draw_two(panels, title, file):
        (draw if file.stem in ("figure2", "figure22") else lambda *_: write_text(file, title))(
            panels, title, file
        )

    monkeypatch.setattr(paper_tables, "panels_figure", draw_two)
    index = {e["number"]: e for e in write_paper(read_outcomes([path]), tmp_path / "out")}
    assert index["figure2"]["status"] == "in part" and index["figure3b"]["status"] == "not possible"
    assert index["table1"]["status"] == "in part" and index["table1"]["needs"] == ["students: opd"]
    assert all((tmp_path / f"out/{name}.png").stat().st_size > 5000 for name in ("figure2", "figure22"))
    found = values((index, tmp_path / "out"), "table1")
    assert found["b", "sft", "tutor"] == pytest.approx((0.05 + 0.05 + 0.45) / 3, abs=1e-4)
    assert found["b", "base", "tutor"] == 0


def test_realignments_by_margin_are_of_the_narrow_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "panels_figure", lambda panels, title, file: write_text(file, title))
    after = {"med_advice": 0.5, "med_advice>fin_tutor": -0.25}
    rows = [
        {"model": "m", "train": train, "domain": "med", "task": "advice", "idx": i,
         "before": -1.0 if train == "med_advice" else -0.5, "after": -1.0 + change}
        for train, change in after.items()
        for i in range(2)
    ]  # fmt: skip
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = {e["number"]: e for e in write_paper(read_outcomes([path]), tmp_path / "out")}
    found = values((index, tmp_path / "out"), "figure19")
    assert found["a", "med_advice", "fin_tutor"] == -0.25 and found["a", "med_advice", "before"] == 0.5
