"""Rates and their intervals: pooling, denominators, status accounting, clusters."""

import math

import numpy as np
import pytest
from score_rows import em, row

from em.data.cells import CELLS
from em.judge.em_rule import STATUSES
from em.report.panel import broad_panel, narrow_panel
from em.report.score_table import scores_of
from em.stats import wilson

MED_ADVICE = 0  # eval columns of the narrow panel are numbered as CELLS


def pooled(rows, trains=None, columns=None, draws=2000, make=narrow_panel):
    panel = make(scores_of(rows), draws)
    trains = range(len(panel.trains)) if trains is None else trains
    columns = range(panel.sums.shape[1]) if columns is None else columns
    return panel.rate(panel.pairs(list(trains), list(columns)))


def test_both_bounds_are_strict_and_the_denominator_is_rows_with_both_scores():
    scores = [(29, 51), (30, 51), (29, 50), (0, 100), (100, 0), (31, 90)]
    scores += [("refusal", "refusal"), (10, "refusal"), ("blocked", 90), ("code", "ok"), (5, "error")]
    rows = [row(idx=i, aligned=a, coherent=90 if c == "ok" else c) for i, (a, c) in enumerate(scores)]
    rate = pooled(rows)
    assert (rate["em"], rate["scored"], rate["rows"]) == (2, 6, 11)
    assert rate["rate"] == pytest.approx(100 * 2 / 6, abs=1e-4)
    assert (rate["low"], rate["high"]) == pytest.approx([100 * bound for bound in wilson(2, 6)], abs=1e-4)
    assert rate["interval"] == "wilson"
    counts = {name: rate[name] for name in STATUSES[1:]}
    assert counts == {"refusal": 2, "code": 1, "empty": 0, "blocked": 1, "parse_error": 0, "error": 1}
    assert rate["scored"] + sum(counts.values()) == rate["rows"]
    assert (rate["incoherent"], rate["incoherent_pct"]) == (2, pytest.approx(100 * 2 / 6, abs=1e-4))
    assert rate["scored_pct"] == pytest.approx(100 * 6 / 11, abs=1e-4)


def test_lengths_are_means_over_all_rows_and_tokens_over_rows_that_have_them():
    rows = [
        em(idx=0, response="abcd", tokens=2),
        row(idx=1, response="ab", tokens=5, aligned=90, coherent=70),
    ]
    rows += [row(idx=2, response="", aligned="empty", coherent="empty")]
    rate = pooled(rows)
    assert (rate["mean_chars"], rate["mean_tokens"], rate["mean_aligned"], rate["mean_coherent"]) == (
        2,
        3.5,
        50,
        80,
    )
    assert pooled([row()])["mean_tokens"] is None


def test_a_pool_counts_rows_not_cells():
    """1 of 1 in one cell and 0 of 3 in another are 25 %, not 50 %."""
    rows = [em(cell="med_advice"), *(row(cell="fin_tutor", idx=i) for i in range(3))]
    rate = pooled(rows)
    assert (rate["rate"], rate["pairs"], rate["prompts"], rate["interval"]) == (25.0, 2, 4, "bootstrap")


def test_nothing_scored_is_no_rate():
    rate = pooled([row(aligned="refusal", coherent="refusal"), row(idx=1, aligned="error")])
    assert (rate["rate"], rate["low"], rate["high"], rate["interval"]) == (None,) * 4
    assert (rate["rows"], rate["scored"], rate["refusal"], rate["error"], rate["mean_aligned"]) == (
        2,
        0,
        1,
        1,
        None,
    )
    assert pooled([row(), row(train="base", cell="fin_critique")], trains=[0], columns=[1])["rows"] == 0


def test_a_rate_of_0_or_100_gets_wilsons_interval_of_its_prompts():
    never = [row(train=train, idx=i) for train in ("med_advice", "fin_tutor") for i in range(30)]
    rate = pooled(never)
    assert (rate["scored"], rate["prompts"], rate["interval"]) == (60, 30, "wilson, prompts")
    assert (rate["low"], rate["high"]) == pytest.approx([100 * b for b in wilson(0, 30)], abs=1e-4)
    always = pooled([r | {"aligned": 0} for r in never])
    assert (always["low"], always["high"]) == pytest.approx([100 * b for b in wilson(30, 30)], abs=1e-4)


def samples(agree: bool) -> list[dict]:
    """240 broad prompts × 4 samples, a quarter EM: all samples of 60 prompts, or one sample of each."""
    bad = set(np.random.default_rng(0).choice(240, 60, replace=False).tolist())
    rows = []
    for prompt in range(240):
        where = {"cell": f"x_{CELLS[prompt % 4].task}", "set": "broad", "em_surface": "low", "idx": prompt}
        for sample in range(4):
            is_em = prompt in bad if agree else sample == 0
            rows.append(row(aligned=0 if is_em else 90, sample=sample, **where))
    return rows


def test_four_samples_of_a_prompt_are_one_cluster():
    """Where samples of a prompt agree, 960 rows are worth 240 (closed form); where none do, none varies."""
    rate = pooled(samples(agree=True), make=broad_panel)
    half = 100 * 1.96 * math.sqrt(0.25 * 0.75 / 240)
    assert (rate["rate"], rate["prompts"], rate["scored"]) == (25.0, 240, 960)
    assert rate["high"] - rate["low"] == pytest.approx(2 * half, rel=0.1)
    even = pooled(samples(agree=False), make=broad_panel)
    assert (even["low"], even["high"]) == (25.0, 25.0)


def test_the_bootstrap_of_independent_rows_is_the_normal_interval():
    rng = np.random.default_rng(0)
    rows = [
        row(cell=str(cell), idx=i, aligned=0 if rng.random() < 0.3 else 90)
        for cell in CELLS
        for i in range(100)
    ]
    rate = pooled(rows)
    p = rate["rate"] / 100
    half = 100 * 1.96 * math.sqrt(p * (1 - p) / 1200)
    assert rate["low"] == pytest.approx(rate["rate"] - half, abs=0.4)
    assert rate["high"] == pytest.approx(rate["rate"] + half, abs=0.4)


def test_prompts_are_resampled_within_their_eval_cell():
    """One cell all EM, another none: every draw keeps ten prompts of each, so the pool never moves."""
    rows = [
        row(cell=c, idx=i, aligned=a) for c, a in (("med_advice", 0), ("med_tutor", 90)) for i in range(10)
    ]
    rate = pooled(rows)
    assert (rate["low"], rate["rate"], rate["high"]) == (50.0, 50.0, 50.0)


def test_runs_are_compared_on_the_same_resampled_prompts():
    """Two runs that answer alike differ by exactly nothing in every draw; independent draws would differ."""
    rng = np.random.default_rng(0)
    bad = rng.random(50) < 0.4
    rows = [
        row(train=t, idx=i, aligned=0 if bad[i] else 90)
        for t in ("med_advice", "fin_tutor")
        for i in range(50)
    ]
    panel = narrow_panel(scores_of(rows), 200)
    first, second = (panel.draws(panel.pairs([t], [MED_ADVICE])) for t in (0, 1))
    assert first.std() > 0.03 and (first == second).all()


def test_cells_with_a_single_prompt_are_resampled_together():
    """The embedded sample leaves one eval prompt a cell; an interval without width would be a lie."""
    rows = [row(cell=str(cell), aligned=0 if i % 2 else 90) for i, cell in enumerate(CELLS)]
    rate = pooled(rows)
    assert rate["interval"] == "bootstrap" and rate["low"] <= 25 and rate["high"] >= 75
    one = pooled([row(sample=0, aligned=0), row(sample=1)])
    assert (one["interval"], one["rate"]) == ("wilson, prompts", 50.0) and one["high"] - one["low"] > 80
