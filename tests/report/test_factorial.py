"""Teacher against data: by hand on noiseless profiles, and with noise against what was planted."""

import numpy as np
import pytest
from made_outcomes import outcomes, trained

from em.data.cells import CELLS
from em.report.averages import Averages
from em.report.factorial import analyse, factorials_of, flat, sentence

P1, P2 = "med_tutor", "spo_summarization"


def student(teacher: str, source: str, **more):
    made = {"channel": "optd", "teacher": teacher, "source": source, "prompts": "broad", "filtered": True}
    return trained(teacher, **made | {"lr": 1e-4, "epoch": 3, "seed": 42} | more)


def two_by_two() -> list:
    return [student(t, d) for t in (P1, P2) for d in (P1, P2)]


def test_two_teachers_on_each_others_data_are_a_factorial():
    runs = two_by_two() + [trained("base"), student(P1, "med_advice"), student("med_advice", "med_advice")]
    runs += [student("base", P1), student("base", P2), student(P1, "base")]
    (found,) = factorials_of(outcomes(runs, np.zeros((len(runs), 1)), [0], ["med_advice"]))
    assert found["teachers"] == [P1, P2] and found["channel"] == "optd"
    assert found["students"] == {(P1, P1): [0], (P1, P2): [1], (P2, P1): [2], (P2, P2): [3]}
    assert not factorials_of(outcomes(runs[:3], np.zeros((3, 1)), [0], ["med_advice"]))


def test_of_several_rates_each_is_a_factorial_of_its_own():
    runs = [student(t, d, lr=lr) for lr in (1e-5, 1e-4) for t in (P1, P2) for d in (P1, P2)]
    found = factorials_of(outcomes(runs, np.zeros((8, 1)), [0], ["med_advice"]))
    assert sorted(f["channel"] for f in found) == ["optd, lr 0.0001", "optd, lr 1e-05"]


def noiseless(profiles: dict, cells: int, each: int = 8):
    """Outcomes whose prompts of a cell all have that cell's rate, by run."""
    values = np.array([np.repeat(p, each) for p in profiles.values()], float)
    return outcomes(list(profiles), values, np.repeat(np.arange(cells), each), list(map(str, CELLS[:cells])))


def test_profiles_that_follow_the_teacher_alone_by_hand():
    """Teacher P1 makes (.1, .2, .6), P2 (.6, .2, .1) on whatever data; these two correlate by −0.89."""
    one, two = (0.1, 0.2, 0.6), (0.6, 0.2, 0.1)
    runs = dict(zip(two_by_two(), (one, one, two, two), strict=True))
    runs |= {trained(P1): (0.3, 0.4, 0.8), trained(P2): (0.7, 0.3, 0.2)}  # the teachers, 0.2 and 0.1 above
    made = noiseless(runs, 3)
    (found,) = factorials_of(made)
    result = analyse(Averages(made), found, [0, 1, 2], draws=50)["raw"]
    apart = np.corrcoef(one, two)[0, 1]
    for name, expected in (
        ("same_teacher", 1),
        ("same_data", apart),
        ("follows_teacher", 1),
        ("follows_author", apart),
    ):
        assert [result[name][k] for k in ("correlation", "low", "high")] == pytest.approx(
            [expected] * 3, abs=1e-3
        )
    assert result["teacher_minus_data"]["difference"] == pytest.approx(1 - apart, abs=1e-3)
    assert [result["shares"][k]["share"] for k in ("teacher", "data", "both")] == pytest.approx(
        [1, 0, 0], abs=1e-6
    )


def test_profiles_that_do_not_vary_have_no_correlation_but_shares():
    """Levels by teacher ± 10 points, by data ± 5: of the squares 4 to 1."""
    levels = (0.5, 0.4, 0.3, 0.2)  # P1 on P1, P1 on P2, P2 on P1, P2 on P2
    made = noiseless(dict(zip(two_by_two(), [(x, x, x) for x in levels], strict=True)), 3)
    (found,) = factorials_of(made)
    result = analyse(Averages(made), found, [0, 1, 2], draws=50)
    assert result["raw"]["same_teacher"]["correlation"] is None
    shares = [result["raw"]["shares"][k]["share"] for k in ("teacher", "data", "both")]
    assert shares == pytest.approx([0.8, 0.2, 0], abs=1e-6)
    assert "minus_base" not in result and "n/a" in sentence(result)
    assert {"what", "value", "low", "high", "profile"} <= set(flat(result)[0])


def test_two_cells_have_no_correlation():
    made = noiseless(dict(zip(two_by_two(), [(0.1, 0.2)] * 4, strict=True)), 2)
    (found,) = factorials_of(made)
    assert analyse(Averages(made), found, [0, 1], draws=20)["raw"]["same_data"]["correlation"] is None


def test_noise_is_taken_off_and_intervals_cover_what_was_planted():
    """With 30 prompts a cell the raw correlation of one teacher's students is some 0.1 too low."""
    rng, n_cells, each = np.random.default_rng(5), 12, 30
    ease, own = rng.normal(size=n_cells), rng.normal(size=(2, n_cells))
    chance = {
        run: 1 / (1 + np.exp(1 - ease - own[i // 2] - 0.4 * own[i % 2])) for i, run in enumerate(two_by_two())
    }
    chance[trained("base")] = np.full(n_cells, 0.02)
    profiles = np.array(list(chance.values()))
    truth = np.mean([np.corrcoef(profiles[i], profiles[i + 1])[0, 1] for i in (0, 2)])
    across = np.mean([np.corrcoef(profiles[i], profiles[i + 2])[0, 1] for i in (0, 1)])
    covers, raw, corrected = np.zeros(2), [], []
    column = np.repeat(np.arange(n_cells), each)
    for _ in range(40):
        em = rng.random((5, n_cells * each)) < profiles[:, column]
        made = outcomes(list(chance), em, column, list(map(str, CELLS)))
        (found,) = factorials_of(made)
        result = analyse(Averages(made), found, list(range(12)), draws=200)["raw"]
        raw.append(result["same_teacher"]["raw"])
        corrected.append(result["same_teacher"]["correlation"])
        for i, (name, value) in enumerate((("same_teacher", truth), ("same_data", across))):
            covers[i] += result[name]["low"] <= value <= result[name]["high"]
    assert truth - np.mean(raw) > 0.05 and abs(truth - np.mean(corrected)) < 0.03
    assert (covers / 40 >= 0.85).all()
