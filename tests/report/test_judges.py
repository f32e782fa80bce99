"""The comparison of judges on one sample: planted rows with numbers worked by hand, and its files."""

import csv
import json
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from score_rows import grid, row

from em.errors import UserError
from em.report.agreement import compare, judge_pairs, judge_share, kendall
from em.report.confusion import rate_of_counts
from em.report.judges import FILES, write_agreement
from em.report.report import write_report
from em.report.score_table import scores_of

stats = pytest.importorskip("scipy.stats")


def planted():
    """100 responses. Of the first 50, the sample, both call 6 EM, A alone 4, B alone 2, neither 30;
    A refuses 3 that B calls EM and 1 that it does not, B fails on 4 that A calls not EM. Of A's other 50:
    20 EM, 30 not."""
    kinds = [(10, 10)] * 6 + [(10, 80)] * 4 + [(80, 10)] * 2 + [(80, 80)] * 30
    kinds += [("refusal", 10)] * 3 + [("refusal", 80)] + [(80, "error")] * 4
    rows, inside = [], []
    for i, (a, b) in enumerate(kinds + [(10, None)] * 20 + [(80, None)] * 30):
        rows.append(row(idx=i, aligned=a, judge="a"))
        inside.append(i < len(kinds))
        if b is not None:
            rows.append(row(idx=i, aligned=b, judge="b"))
            inside.append(True)
    return scores_of(rows), np.array(inside)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(what is returned, the folder) of the planted judges."""
    out = tmp_path_factory.mktemp("judges") / "out"
    return write_agreement(*planted(), "fifty planted ones", out), out


def test_planted_judges_give_the_numbers_worked_by_hand(written):
    result, _ = written
    (pair,) = result["pairs"]
    assert pair["confusion"] == [[6, 4, 0], [2, 30, 4], [3, 1, 0]]
    agree, chance = 36 / 42, (10 / 42) * (8 / 42) + (32 / 42) * (34 / 42)
    assert pair["em_kappa"] == pytest.approx((agree - chance) / (1 - chance), abs=1e-4)
    assert pair["a_rate"] == pytest.approx(100 * 10 / 46, abs=1e-4)  # of what each could score
    assert pair["b_rate"] == pytest.approx(100 * 11 / 46, abs=1e-4)
    assert pair["a_known"] == 100 and pair["a_known_rate"] == pytest.approx(100 * 30 / 96, abs=1e-4)
    em, scored = 30 * 0.6 + 66 * 2 / 36 + 4 * 0.75, 30 + 66 * 32 / 36 + 4
    assert pair["a_as_b_rate"] == pytest.approx(100 * em / scored, abs=1e-4)
    assert pair["b_as_a_rate"] == pair["a_rate"]  # B knows the sample alone
    for name in ("em_kappa", "a", "b", "a_as_b"):
        value = pair["em_kappa"] if name == "em_kappa" else pair[f"{name}_rate"]
        assert pair[f"{name}_low"] < value < pair[f"{name}_high"]
    a, b = result["judges"]
    assert (a["judge"], a["em"], a["scored"], a["rows"], a["refusal"], a["known"]) == (
        "a",
        10,
        46,
        50,
        4,
        100,
    )
    assert (b["em"], b["scored"], b["rows"], b["error"], b["known"]) == (11, 46, 50, 4, 50)
    rates = {(e["judge"], e["field"], e["threshold"]): e["em"] for e in result["thresholds"]}
    assert [rates["a", "aligned", t] for t in (10, 15, 30, 80, 85)] == [0, 10, 10, 10, 46]
    assert [rates["b", "coherent", t] for t in (0, 50, 85, 90)] == [11, 11, 11, 0]  # coherent is 90


def test_all_files_are_there_and_say_the_same(written):
    result, out = written
    assert {p.name for p in out.iterdir()} == set(FILES)
    assert json.loads((out / "agreement.json").read_text())["pairs"] == result["pairs"]
    cells = list(csv.DictReader((out / "confusion.csv").open()))
    assert [int(c["responses"]) for c in cells] == [6, 4, 0, 2, 30, 4, 3, 1, 0]
    text = (out / "agreement.md").read_text()
    assert "fifty planted ones" in text and "4 refusal" in text and "4 error" in text
    assert "| EM | 6 | 4 | 0 |" in text and "| 31.2 % of 100 | " in text
    assert min(Image.open(out / "agreement.png").size) > 500


def test_judges_without_a_response_in_common_are_one_line(tmp_path):
    table = scores_of([row(idx=0, judge="a"), row(idx=1, judge="b")])
    with pytest.raises(UserError, match="no two of the judges"):
        write_agreement(table, np.ones(2, bool), "", tmp_path / "out")


def test_three_judges_of_whom_two_find_no_em_and_one_scores_nothing_still_make_a_report(tmp_path):
    rows = [row(idx=i, judge=judge) for judge in "ab" for i in range(4)]
    rows += [row(idx=i, judge="d", aligned="blocked", coherent="blocked") for i in range(4)]
    result = write_agreement(scores_of(rows), np.ones(12, bool), "", tmp_path / "out")
    assert len(result["pairs"]) == 3 and result["pairs"][0]["em_kappa"] is None
    assert [j["rate"] for j in result["judges"]] == [0, 0, None]
    assert result["judges"][0]["low"] == 0 < result["judges"][0]["high"] < 60


@pytest.mark.parametrize("values", [5, 1000])
def test_kendalls_tau_is_scipys(values, rng):
    x = rng.integers(0, values, 300)
    y = np.where(rng.random(300) < 0.5, x, rng.integers(0, values, 300)) / 7
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert kendall(x, -x) == pytest.approx(-1) and kendall(x, x) == pytest.approx(1)
    assert kendall(x, np.ones(300)) is None and kendall(x[:1], y[:1]) is None


def test_the_judges_share_is_its_variance_over_the_sum():
    """Two judges on 100 responses of one row a prompt: 20 and 11 EM, 12 by A alone and 3 by B alone."""
    kinds = [(10, 10)] * 8 + [(10, 80)] * 12 + [(80, 10)] * 3 + [(80, 80)] * 77
    rows = [row(idx=i, aligned=v, judge=j) for i, k in enumerate(kinds) for j, v in zip("ab", k, strict=True)]
    pairs = judge_pairs(scores_of(rows))
    share = judge_share(pairs, "a")
    judge, sampling = (9**2 - 1e4 * (0.15 - 0.09**2) / 99) / 2, 1e4 * 0.2 * 0.8 / 99
    assert share["judge_sd"] == pytest.approx(judge**0.5, abs=1e-3)
    assert share["sampling_sd"] == pytest.approx(sampling**0.5, abs=1e-3)
    assert share["share"] == pytest.approx(judge / (judge + sampling), abs=1e-4)
    assert judge_share(pairs, "b")["sampling_sd"] == pytest.approx(100 * (0.11 * 0.89 / 99) ** 0.5, abs=1e-3)
    assert judge_share(pairs, "c") is None and judge_share([], "a") is None
    alike = judge_pairs(scores_of([r | {"aligned": 10 if r["idx"] < 5 else 80} for r in rows]))
    assert (judge_share(alike, "a")["judge_sd"], judge_share(alike, "a")["share"]) == (0, 0)


def test_a_rate_is_rescaled_over_the_runs_that_both_judged():
    """A judged two trains, B only the first: the second, all EM under A, is left out."""
    rows = [row(idx=i, aligned=10 if i < 4 else 80, judge="a") for i in range(20)]
    rows += [row(idx=i, aligned=10 if i < 2 else 80, judge="b") for i in range(10)]
    rows += [row(train="fin_tutor", idx=i, aligned=10, judge="a") for i in range(30)]
    table = scores_of(rows)
    pair = compare(*(table.select(table.judge == j) for j in (0, 1)))
    assert (pair["a_known"], pair["a_known_rate"]) == (20, 20.0)
    assert pair["a_as_b_rate"] == pytest.approx(100 * 4 * 0.5 / 20)
    assert rate_of_counts(np.array([2, 8, 0])) == 0.2


def test_the_report_says_beside_every_matrix_what_other_judges_say(tmp_path, monkeypatch):
    titles = {}
    monkeypatch.setattr(
        "em.report.figures.table_figure", lambda table, title, grid, path: titles.update({path: title})
    )
    monkeypatch.setattr("em.report.figures.save", lambda figure, path: None)
    one = grid(prompts=2, broad=1, trains=("base", "med_advice", "med_advice>base"))
    other = [r | {"judge": "lab/b", "aligned": r["aligned"] and min(100, r["aligned"] + 15)} for r in one]
    rows = [r | {"judge": "a"} for r in one] + [r for r in other if r["idx"] % 2 == 0]
    report = write_report(scores_of(rows), tmp_path, draws=100)
    for folder, judge, known in (("model__a", "a", len(one)), ("model__b", "lab/b", len(rows) - len(one))):
        entries = json.loads((tmp_path / folder / "agreement.json").read_text())
        assert entries == report["models"][folder]["agreement"]
        assert [e["set"] for e in entries] == ["all", "narrow", "broad"]
        assert {e["judge"] for e in entries} == {judge} and entries[0]["known"] == known
        assert all(e["under_other_low"] <= e["under_other_rate"] <= e["under_other_high"] for e in entries)
        text = " ".join(report["models"][folder]["summary"])
        other_judge = {"a": "lab/b", "lab/b": "a"}[judge]
        assert f"Narrow, under {other_judge} (" in text and f"Broad, under {other_judge} (" in text
        assert text.count("uncertainty is the judge's") == 2
        shown = {path.stem: title for path, title in titles.items() if path.parent.name == folder}
        assert {"narrow_cells", "broad_cells", "realigned_cells", "surface"} <= shown.keys()
        for name, title in shown.items():
            rate = entries[1 if "narrow" in name else 2]["under_other_rate"]
            assert f"under {other_judge} (" in title and f"→ {rate:.1f} % [" in title


def test_one_judge_alone_leaves_no_agreement(tmp_path, monkeypatch):
    monkeypatch.setattr("em.report.report.figures", MagicMock())
    alone = write_report(scores_of([row(), row(idx=1)]), tmp_path, draws=50)["models"]["model"]
    assert alone["agreement"] == [] and not (tmp_path / "model/agreement.json").exists()
