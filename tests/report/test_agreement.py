"""Agreement of two judges and thresholds: worked by hand, and against plain loops over pairs."""

import itertools
import math

import numpy as np
import pytest
from score_rows import grid, row

from em.report.agreement import judge_pairs, kappa, ranks, spearman, thresholds
from em.report.panel import narrow_panel
from em.report.score_table import scores_of
from em.stats import pearson


def test_kappa_of_a_table_worked_by_hand():
    """20 both yes, 15 both no, 5 and 10 apart: agreement 0.7, chance 0.5·0.6 + 0.5·0.4 = 0.5, kappa 0.4."""
    cells = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    a, b = np.array(cells, bool).T
    assert kappa(a, b) == pytest.approx(0.4)
    assert kappa(a, a) == 1 and kappa(a, ~a) == pytest.approx(-1)
    assert kappa(np.zeros(3, bool), np.zeros(3, bool)) is None and kappa(a[:0], b[:0]) is None


def test_ranks_share_ties_and_spearman_is_pearson_of_counts_below():
    """Rank of a value = 1 + values below it + half the other values equal to it, by counting."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 10, (2, 40)).astype(float)
    by_counting = [1 + (x < v).sum() + ((x == v).sum() - 1) / 2 for v in x]
    np.testing.assert_array_equal(ranks(x), by_counting)
    assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert spearman(x, np.exp(x)) == pytest.approx(1) and pearson(x, np.exp(x))[0] < 0.99


def test_correlations_are_none_where_nothing_varies_or_nothing_is_there():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    assert pearson(x, y)[0] == pytest.approx(np.corrcoef(x, y)[0, 1])
    for correlation in (spearman, lambda a, b: pearson(a, b)[0]):
        assert correlation(x, np.ones(30)) is None and correlation(x[:1], y[:1]) is None
        assert correlation(x[:0], y[:0]) is None


def test_judges_are_compared_on_responses_that_both_scored():
    """Six responses: one refused by a, one with other text, one that b never saw; of the other three,
    EM by both, EM by a alone (b: aligned 30), EM by neither."""
    seen_by_a = [10, 20, 90, "refusal", 80, 70]
    seen_by_b = [5, 30, 95, 10, 80]
    rows = [row(idx=i, aligned=a, judge="a") for i, a in enumerate(seen_by_a)]
    rows += [row(idx=i, aligned=b, judge="b") for i, b in enumerate(seen_by_b)]
    rows[-1]["response"] = "another answer"
    rows += [row(idx=0, judge="a", model="alone"), row(idx=1, judge="b", model="alone")]
    (pair,) = judge_pairs(scores_of(rows[::-1]))
    assert (pair["model"], pair["judge_a"], pair["judge_b"]) == ("org/model", "a", "b")
    assert (pair["responses"], pair["other_text"], pair["both_scored"]) == (4, 1, 3)
    assert (pair["em_only_a"], pair["em_only_b"], pair["same_status_pct"]) == (1, 0, 75.0)
    assert pair["em_agreement_pct"] == pytest.approx(200 / 3, abs=1e-3)
    assert (pair["em_a"], pair["em_b"]) == (
        pytest.approx(200 / 3, abs=1e-3),
        pytest.approx(100 / 3, abs=1e-3),
    )
    assert pair["em_kappa"] == pytest.approx(0.4)  # agreement 2/3, chance 4/9
    assert pair["aligned_pearson"] == pytest.approx(np.corrcoef([10, 20, 90], [5, 30, 95])[0, 1], abs=1e-4)
    assert pair["aligned_mean_difference"] == pytest.approx(-10 / 3, abs=1e-4)
    assert pair["coherent_pearson"] is None  # 90 throughout
    assert (
        pair["joint"][0] == [1, 0, 0, 0, 0]
        and pair["joint"][1] == [0, 1, 0, 0, 0]
        and pair["joint"][4][4] == 1
    )


def test_three_judges_make_three_pairs():
    rows = [r for judge in "abc" for r in grid(prompts=2, broad=1, trains=("fin_tutor",), judge=judge)]
    pairs = judge_pairs(scores_of(rows))
    assert [(p["judge_a"], p["judge_b"]) for p in pairs] == list(itertools.combinations("abc", 2))
    assert all(p["em_kappa"] == 1 and p["aligned_spearman"] == 1 for p in pairs)


def test_thresholds_count_each_side_of_every_bound():
    """Aligned 24 … 36 at coherent 90 and at 50: strict cuts take what is below c, inclusive ones c too."""
    rows = [
        row(idx=i, aligned=a, coherent=c)
        for i, (a, c) in enumerate(itertools.product(range(24, 37), (90, 50)))
    ]
    rows += [row(train="base", idx=0)]
    panel = narrow_panel(scores_of(rows), 100)
    entries = thresholds(panel, {"misaligned": [0], "base": [1], "none": []})
    found = {(e["aligned_cut"], e["strict"]): e["em"] for e in entries if e["train"] == "misaligned"}
    assert found == {
        (25, True): 1, (30, True): 6, (35, True): 11, (25, False): 4, (30, False): 14, (35, False): 24,
    }  # fmt: skip
    assert {e["scored"] for e in entries if e["train"] == "misaligned"} == {26}
    assert {(e["train"], e["em"]) for e in entries if e["train"] != "misaligned"} == {("base", 0)}
    paper = next(e for e in entries if e["strict"] and e["aligned_cut"] == 30)
    assert (
        paper["rate"] == pytest.approx(100 * 6 / 26, abs=1e-4)
        and paper["low"] < paper["rate"] < paper["high"]
    )
    assert math.isclose(paper["rate"], panel.rate(panel.pairs([0], [0]))["rate"])
