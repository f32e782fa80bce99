"""What is asked about a row, and the forecast."""

import judge_server as api
import pytest
from judge_rows import row, scores

from em.errors import UserError
from em.judge.ledger import describe_forecast


def test_a_blank_response_is_empty_and_is_not_asked_about(serve, make):
    server = serve()
    out = scores(make(), [row(0, response=""), row(1, response=" \n"), row(2)])
    assert [r["aligned_status"] for r in out] == ["empty", "empty", "ok"] and out[0]["coherent"] is None
    assert server.total() == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"response": None}, "row 3 to be judged: 'response' is None"),
        ({"set": "wide"}, "'set' is 'wide' and should be one of narrow, broad"),
        ({"domain": None}, "'domain' is None"),
        ({"task": "poetry"}, "has no narrow_med_poetry_alignment.md or narrow_poetry"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(serve, make, changes, message):
    serve()
    with pytest.raises(UserError, match=message):
        scores(make(), [row(0), row(1), row(2, **changes)])


def test_the_last_row_of_a_list_is_checked_before_the_first_is_asked_about(serve, make, tmp_path):
    server, rows = serve(), [row(i) for i in range(50)]
    for bad in (row(9, set="wide"), row(9, task="poetry"), row(9, response=7), row(9, domain=None)):
        with pytest.raises(UserError, match="row 51 to be judged|narrow_med_poetry_alignment.md"):
            scores(make(), [*rows, bad])
    with pytest.raises(UserError, match="row 51 to be judged: 'question' is None"):
        list(make().label_surface([*rows, {"question": None}], progress=False))
    assert not server.requests and not (tmp_path / "cache.jsonl").exists()


def test_surface_labels_see_the_prompt_alone_and_are_one_of_three_words(serve, make):
    words = {"Q0": "high", "Q1": " Medium\n", "Q2": "LOW", "Q3": "very high", "Q4": "7"}

    def behave(prompt, nth):
        return api.answer(next(word for name, word in words.items() if name in prompt))

    server = serve(behave)
    rows = [{"question": name, "response": "never shown"} for name in words]
    out = list(make().label_surface(rows, progress=False))
    assert [r["em_surface"] for r in out] == ["high", "medium", "low", None, None]
    assert [r["em_surface_status"] for r in out] == ["ok"] * 3 + ["parse_error"] * 2
    assert not any("never shown" in prompt for prompt in server.prompts)
    list(make().label_surface(rows, progress=False))
    assert server.total() == 5


def test_a_forecast_counts_calls_still_to_be_made_and_sends_nothing(serve, make):
    server = serve()
    rows = [row(i) for i in range(20)] + [row(0), row(99, response="")]
    judge = make()
    forecast = judge.forecast(iter(rows))
    assert not server.requests
    assert (forecast["rows"], forecast["calls"], forecast["cached"]) == (22, 40, 4)
    scores(judge, rows[:5])
    assert forecast["prompt_tokens"] == pytest.approx(4 * sum(map(len, server.prompts)) / 4.5, rel=0.01)
    assert forecast["usd"] == pytest.approx((forecast["prompt_tokens"] * 0.30 + 120 * 2.50) / 1e6)
    assert judge.forecast(rows)["calls"] == 30
    assert "40 calls for 22 rows (4 answers" in describe_forecast(forecast, judge.ledger.price)
