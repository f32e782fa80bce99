"""Teacher and data crossed: planted effects come back with their intervals; what the files must say."""

import csv

import numpy as np
import pytest
from referee import held, planted_cross, true_points
from score_rows import row

from em.errors import UserError
from em.files import read_json, write_json
from em.report.cross import cross_effects, cross_report
from em.report.cross_runs import corpus_digests, crosses_of_margins, crosses_of_scores, same_corpora
from em.report.score_table import scores_of

AUTHORS = ("med_advice", "fin_tutor", "base", "gold", "rows:med_advice")
TEACHERS = ("med_advice", "fin_tutor", "base")
SETS = 40


@pytest.mark.parametrize("spread, seeds", [(0.0, 1), (0.3, 3)])
def test_planted_effects_come_back_and_intervals_hold_them(spread, seeds):
    """One seed where runs do not differ, three where they do. There is no data effect: its test has size."""
    truth = true_points(1.5, 0.0, spread=spread)
    crosses = (planted_cross(s, teacher=1.5, data=0.0, spread=spread, seeds=seeds) for s in range(SETS))
    effects = [cross_effects(cross)["effects"]["all"] for cross in crosses]
    for term, error in (("teacher", 0.9), ("data", 1.2)):
        bias, coverage, rejected = held([e["points"][term] for e in effects], truth[term])
        assert abs(bias) < error
        assert coverage >= 0.87  # of 40 that hold 95 times in 100, 35 or more do in 98 of 100 cases
    # Of 40 tests of a true null at 5 %, 5 or fewer reject in 98 of 100 cases.
    assert rejected <= 0.13 and held([e["logit"]["data"] for e in effects], 0)[2] <= 0.13
    assert all(e["logit"]["teacher"]["low"] > 0.5 for e in effects)
    levels = {(e["factor"], e["level"]): e["value"] for e in effects[0]["points"]["levels"]}
    assert len(levels) == 2 + 4 and ("data", "gold") in levels
    mean = (levels["teacher", "med_advice"] + levels["teacher", "fin_tutor"]) / 2
    assert effects[0]["points"]["teacher"]["value"] == pytest.approx(mean, abs=1e-3)


def test_runs_that_differ_need_seeds_and_are_said_to_be_these_runs_without():
    crosses = [planted_cross(s, teacher=1.5, data=0.0, spread=0.5) for s in range(20)]
    effects = [cross_effects(cross) for cross in crosses]
    assert held([e["effects"]["all"]["points"]["data"] for e in effects], 0)[2] > 0.15
    assert {e["scope"] for e in effects} == {"these runs"}
    assert cross_effects(planted_cross(0, 1.5, 0.0, seeds=3))["scope"] == "runs like these"


def test_an_interaction_is_found_where_there_is_one():
    effects = [
        cross_effects(planted_cross(s, teacher=0.5, data=0.5, interaction=1.5, n=200))["effects"]
        for s in range(10)
    ]
    found = [e["all"]["logit"]["interaction"] for e in effects]
    assert np.mean([e["value"] for e in found]) == pytest.approx(
        1.25, abs=0.3
    )  # of 1.5, prompts averaged over
    assert np.mean([e["low"] > 0 for e in found]) > 0.7


def test_effects_by_hand_in_points_for_each_eval_cell():
    """Two by two, exact rates: in med_advice 10, 30, 20, 40 %, in fin_tutor the teacher alone counts."""
    rows = []
    em = {"med_advice": {("base", "base"): 1, ("med_advice", "base"): 3, ("base", "med_advice"): 2,
                         ("med_advice", "med_advice"): 4}}  # fmt: skip
    em["fin_tutor"] = {pair: 5 if pair[0] != "base" else 0 for pair in em["med_advice"]}
    for cell, by_pair in em.items():
        for (teacher, source), k in by_pair.items():
            for idx in range(10):
                rows.append(score(teacher, source, cell, idx, idx < k))
    (cross,) = [sets["narrow"] for sets in crosses_of_scores(scores_of(rows)).values()]
    assert cross.columns == ["med_advice", "fin_tutor"]
    found = {name: e["points"] for name, e in cross_effects(cross)["effects"].items()}
    values = {n: tuple(e[t]["value"] for t in ("teacher", "data", "interaction")) for n, e in found.items()}
    assert values["med_advice"] == pytest.approx((20, 10, 0), abs=1e-3)
    assert values["fin_tutor"] == pytest.approx((50, 0, 0), abs=1e-3)
    assert values["all"] == pytest.approx((35, 5, 0), abs=1e-3)


def score(teacher: str, source: str, cell="med_advice", idx=0, misaligned=False, **more) -> dict:
    how = {"channel": "optd", "teacher": teacher, "source": source, "seed": 1, "lr": 1e-4, "epoch": 3}
    aligned = 10 if misaligned else 90
    return row(train=teacher, cell=cell, idx=idx, aligned=aligned) | how | more


def scores(**more) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        score(teacher, source, cell, idx, rng.random() < (0.5 if teacher != "base" else 0.1), **more)
        for source in AUTHORS
        for teacher in TEACHERS
        for cell in ("med_advice", "law_essay")
        for idx in range(8)
    ]


def test_groups_are_of_one_model_judge_channel_rate_and_epoch_whatever_the_corpora_are():
    rows = scores() + scores(epoch=1) + scores(model="other") + scores(channel="sft")
    rows = [r | {"filtered": r["source"] == "fin_tutor", "prompts": "broad"} for r in rows]
    crosses = crosses_of_scores(scores_of(rows))
    assert [(g.model, g.way.epoch) for g in crosses] == [("org/model", 1), ("org/model", 3), ("other", 3)]
    students = crosses[next(iter(crosses))]["narrow"].students
    assert {s.data for s in students} == set(AUTHORS) and len(students) == 15
    both = [r for r in scores() if r["source"] == "base"]
    both = [r | {"filtered": f} for r in both for f in (True, False)]
    both += [r for r in scores() if r["source"] == "gold"]
    (sets,) = crosses_of_scores(scores_of(both)).values()
    effects = cross_effects(sets["narrow"])
    assert effects["data"] == ["base, filtered", "base, unfiltered", "gold"]
    assert effects["effects"]["all"]["points"]["data"]["value"] is None  # no misaligned model wrote any
    assert effects["effects"]["all"]["points"]["teacher"]["value"] > 20


def test_the_report_from_score_rows_and_from_margins(tmp_path):
    table = scores_of(scores())
    text = cross_report(crosses_of_scores(table), tmp_path / "em")
    assert "15 students of 3 teachers on 5 corpora" in text and "is not checked" in text
    written = read_json(tmp_path / "em" / "model" / "cross.json")
    assert written["narrow"]["teachers"] == ["med_advice", "fin_tutor", "base"]
    assert written["narrow"]["data"] == ["med_advice", "fin_tutor", "base", "gold", "rows:med_advice"]
    assert np.shape(written["narrow"]["rates"]) == (5, 3)
    assert (tmp_path / "em" / "model" / "cross.png").stat().st_size > 1000
    with open(tmp_path / "em" / "model" / "cross.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["eval"] for line in lines} == {"all", "med_advice", "law_essay"}
    assert {line["factor"] for line in lines} == {"teacher", "data", "interaction"}

    margins = [r | {"before": -0.5, "after": -0.5 + 0.3 * (r["teacher"] != "base")} for r in scores()]
    cross_report(crosses_of_margins(margins), tmp_path / "margins")
    found = read_json(tmp_path / "margins" / "model" / "cross.json")["narrow"]["effects"]["all"]["nats"]
    assert found["teacher"]["value"] == pytest.approx(0.3) and found["data"]["value"] == pytest.approx(0)
    with pytest.raises(UserError, match="no optd students"):
        cross_report(crosses_of_scores(scores_of([row()])), tmp_path / "none")


def test_a_row_of_the_cross_is_checked_to_have_read_one_corpus(tmp_path):
    def run(teacher: str, source: str, digest: str | None, seed=1) -> str:
        folder = tmp_path / f"{teacher}-{source}-{seed}"
        settings = {"model": "org/model", "cell": "med_advice", "channel": "optd", "estimator": "sampled"}
        settings |= {"filter": False, "on": None, "teacher_train": teacher, "source_train": source}
        settings |= {"lr": 1e-4, "epochs": 3, "seed": seed}
        record = {"kind": "distill", "settings": settings}
        write_json(folder / "config.json", record | ({"made_from": {"corpus": digest}} if digest else {}))
        write_json(folder / "adapter_config.json", {})
        (folder / "adapter_model.safetensors").write_bytes(b"")
        return str(folder)

    (group,) = crosses = crosses_of_scores(scores_of(scores()))
    runs = [run("base", "gold", "a"), run("med_advice", "gold", "a"), run("base", "base", None)]
    runs += [run("base", "gold", "c", seed=2)]  # another seed may have another corpus
    checked = same_corpora(group, corpus_digests(runs))
    assert [(c["data"], c["seed"], c["runs"], c["corpora"]) for c in checked] == [
        ("gold", 1, 2, 1),
        ("gold", 2, 1, 1),
    ]
    assert "all 3 students checked" in cross_report(crosses, tmp_path / "out", corpus_digests(runs))
    digests = corpus_digests([*runs, run("fin_tutor", "gold", "b")])
    assert "CAUTION" in cross_report(crosses, tmp_path / "out", digests)
