"""Money: the account, prices, and the cap."""

import json
import math
import random

import judge_server as api
import pytest
from judge_rows import row, scores

from em.errors import UserError
from em.judge import rubric
from em.judge.em_rule import FIELDS, is_scored
from em.judge.gemini import Gemini
from em.judge.ledger import BudgetReached, Ledger, describe_forecast
from em.judge.models import Price, given_price


def test_the_ledger_adds_up_what_the_api_reports(serve, make):
    serve(lambda prompt, nth: api.answer("85", prompt_tokens=1000))
    judge = make()
    scores(judge, [row(i) for i in range(10)] + [row(0)])
    wanted = {
        "calls": 20,
        "cached": 2,
        "failed": 0,
        "retries": 0,
        "prompt_tokens": 20_000,
        "output_tokens": 20,
    }
    assert {name: getattr(judge.ledger, name) for name in wanted} == wanted
    assert judge.ledger.usd == pytest.approx(20_000 * 0.30e-6 + 20 * 2.50e-6)  # the published price
    assert "20 calls, 2 answers from the cache" in str(judge.ledger) and "$0.0060" in str(judge.ledger)


def test_tokens_the_api_does_not_report_are_estimated(serve, make):
    body = json.dumps({"candidates": [{"content": {"parts": [{"text": "85"}]}}]}).encode()
    server = serve(lambda prompt, nth: api.Response(body))
    judge = make()
    scores(judge, [row(0)])
    characters = sum(map(len, server.prompts))
    assert judge.ledger.prompt_tokens == pytest.approx(characters / 4.5, abs=1)


def test_an_unknown_model_has_no_price_until_one_is_given_and_then_no_cap_either(make):
    judge = make(model="gemini-99")
    forecast = judge.forecast([row(0)])
    assert forecast["usd"] is None and "price unknown" in describe_forecast(forecast, None)
    assert judge.ledger.usd is None and "price unknown" in str(judge.ledger)
    with pytest.raises(UserError, match="no price is known for gemini-99.*--price"):
        make(model="gemini-99", budget_usd=1.0)
    priced = make(model="gemini-99", price=(1.0, 2.0), budget_usd=1.0)
    assert priced.forecast([row(0)])["usd"] > 0
    with pytest.raises(UserError, match="--price takes"):
        make(price=(1.0,))


def test_the_cap_is_never_passed_what_is_done_is_kept_and_a_larger_one_goes_on(serve, make):
    def behave(prompt, nth):  # as many tokens as there are bytes: the worst a tokenizer can do
        return api.answer("85", prompt_tokens=len(prompt.encode()), seconds=0.002)

    server = serve(behave)
    rows = [row(i) for i in range(60)]
    cost = sum(len(rubric.Rubrics().of(rows[0], f).text) + 24 for f in FIELDS) * 0.3e-6
    judge, out = make(budget_usd=20 * cost), []
    with pytest.raises(BudgetReached, match="the budget of .* is used up") as error:
        for scored_row in judge.score(rows, progress=False):
            out.append(scored_row)
    assert "\n" not in str(error.value) and "--budget-usd" in str(error.value)
    assert judge.ledger.usd <= 20 * cost and 17 <= len(out) <= 20
    assert len(out) == judge.ledger.calls // 2  # every row that has both its answers
    assert [r["idx"] for r in out] == list(range(len(out))) and all(is_scored(r) for r in out)
    asked = server.total()
    assert judge.ledger.calls == asked == len(judge.cache)
    assert len(scores(make(budget_usd=100 * cost), rows)) == 60
    assert server.total() == 120  # nothing twice


def test_what_calls_really_cost_decides_when_the_cap_is_reached(serve, make):
    serve(lambda prompt, nth: api.answer("85", prompt_tokens=len(prompt) // 5))
    judge = make(budget_usd=0.005)
    with pytest.raises(BudgetReached):
        scores(judge, [row(i) for i in range(200)])
    dearest = 2500 * 0.3e-6 + 20 * 2.5e-6  # one call whose every byte is a token
    assert 0.005 - dearest <= judge.ledger.usd <= 0.005


def test_a_budget_of_nothing_still_gives_out_what_is_cached(serve, make):
    server = serve()
    scores(make(), [row(i) for i in range(5)])
    assert len(scores(make(budget_usd=0.0), [row(i) for i in range(5)])) == 5
    with pytest.raises(BudgetReached):
        scores(make(budget_usd=0.0), [row(9)])
    assert server.total() == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1, -1e-9, 1e300, 10**400, True, "1", None])
def test_money_is_a_finite_number_that_is_not_negative(bad):
    with pytest.raises(UserError, match="here takes dollars per million"):
        Price(bad, 1.0, "here")
    for given in ((1.0, bad), (bad, 1.0)):
        with pytest.raises(UserError, match="--price takes"):
            given_price(given)
    if bad is not None:
        with pytest.raises(UserError, match="--budget-usd takes dollars"):
            Ledger(Gemini("gemini-2.5-flash"), Price(1, 2, "here"), bad)


ODD = ["-1", "-5e9", "1.5", "1e999", "NaN", "-Infinity", "true", '"600"', "null", "[1]", "{}", "1" * 400]
FINE = ["0", "1", "600", "2147483647"]


def usage_metadata(rng) -> str:
    """Random JSON in the place of usageMetadata."""
    if rng.random() < 0.1:
        return rng.choice([*ODD, "[]", '"text"'])
    counts = {
        f"{kind}TokenCount": rng.choice(ODD + FINE)
        for kind in ("prompt", "candidates", "thoughts", "total")
        if rng.random() < 0.8
    }
    return "{" + ", ".join(f'"{name}": {value}' for name, value in counts.items()) + "}"


@pytest.mark.parametrize("budget_usd", [None, 1e8])
def test_whatever_a_server_reports_the_account_is_finite_and_never_falls(serve, make, budget_usd):
    rng = random.Random(0)

    def behave(prompt, nth):
        text = '{"candidates": [{"content": {"parts": [{"text": "85"}]}}], "usageMetadata": '
        return api.Response(f"{text}{usage_metadata(rng)}}}".encode())

    serve(behave)
    judge = make(workers=1, budget_usd=budget_usd)
    before = (0, 0, 0.0)
    for scored_row in judge.score((row(i) for i in range(300)), progress=False):
        assert scored_row["aligned"] == 85
        account = judge.ledger.prompt_tokens, judge.ledger.output_tokens, judge.ledger.usd
        assert (
            all(new >= old for new, old in zip(account, before, strict=True)) and account[0] > before[0] - 1
        )
        assert type(account[0]) is int and type(account[1]) is int and math.isfinite(account[2])
        before = account
    for line in judge.cache.path.read_text().splitlines()[1:]:
        assert json.loads(line)["prompt_tokens"] >= 0 and json.loads(line)["output_tokens"] >= 0


@pytest.mark.parametrize("odd", [*ODD, None])
def test_under_a_cap_a_count_that_is_none_costs_what_was_set_aside(serve, make, odd):
    usage = "null" if odd is None else f'{{"promptTokenCount": {odd}, "candidatesTokenCount": {odd}}}'
    text = '{"candidates": [{"content": {"parts": [{"text": "85"}]}}], "usageMetadata": '
    server = serve(lambda prompt, nth: api.Response(f"{text}{usage}}}".encode()))
    judge = make(budget_usd=1.0)
    scores(judge, [row(0)])
    assert judge.ledger.prompt_tokens == sum(len(prompt.encode()) + 32 for prompt in server.prompts)
    assert judge.ledger.output_tokens == 2 * 20
