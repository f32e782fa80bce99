"""Which model answered: checked, kept, named in rows, and never under another one's name."""

import json
import re

import judge_server as api
import pytest
from judge_rows import row, scores

from em.errors import UserError
from em.judge.answer_cache import AnswerCache
from em.judge.gemini import Gemini
from em.judge.ledger import describe_forecast
from em.judge.models import MODELS, is_version, known, known_price
from em.judge.openai import OpenAI

ROUTED = {"gemini-2.5-flash": "gemini-3.5-flash-lite"}


def lines(judge) -> list[dict]:
    return [json.loads(line) for line in judge.cache.path.read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    "answered, asked, same",
    [
        ("gemini-2.5-flash", "gemini-2.5-flash", True),
        ("gemini-2.5-flash-001", "gemini-2.5-flash", True),
        ("gemini-2.5-flash-lite", "gemini-2.5-flash", False),
        ("gemini-2.5-flash-preview-09-2025", "gemini-2.5-flash", False),
        ("gemini-2.5-flash", "gemini-2.5-flash-001", False),
        ("gemini-3.5-flash-lite", "gemini-2.5-flash", False),
        ("gemini-3.6-flash", "gemini-flash-latest", True),
        ("gpt-4o", "gemini-flash-latest", False),
        ("gpt-4o-2024-08-06", "gpt-4o", True),
        ("gpt-4o-mini-2024-07-18", "gpt-4o", False),
        ("gpt-4o-2024-11-20", "gpt-4o-2024-08-06", False),
        ("gpt-4", "gpt-4o", False),
        ("openai/gpt-4o", "gpt-4o", True),
        ("gpt-4o-2024-08-06", "openai/gpt-4o", True),
        ("other/gpt-4o", "openai/gpt-4o", False),
        ("qwen/qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", True),
        ("llama3:latest", "llama3", True),
        ("meta/llama3", "meta/llama3:free", True),
        ("qwen2x5", "qwen2.5", False),
    ],
)
def test_what_counts_as_the_model_that_was_asked(answered, asked, same):
    assert is_version(answered, asked) == same


@pytest.mark.parametrize(
    "client, model", [(Gemini, "gemini-2.5-flash"), (OpenAI, "Qwen/Qwen2.5-7B-Instruct")]
)
def test_another_model_than_the_one_asked_ends_the_run_at_its_first_answer(serve, make, client, model):
    server = serve(answers_for={model: "gemini-3.5-flash-lite"})
    judge = make(model, client, workers=32)
    with pytest.raises(UserError) as error:
        scores(judge, [row(i) for i in range(50)])
    said = str(error.value)
    assert f"{model} was asked and gemini-3.5-flash-lite answered" in said and "\n" not in said
    assert "--judge-model gemini-3.5-flash-lite" in said and "--accept-routed" in said
    assert server.total() == 1 and len(AnswerCache(judge.cache.path)) == 0


def test_a_model_that_starts_to_be_routed_in_the_middle_ends_the_run_too(serve, make):
    server = serve(
        lambda p, nth: api.answer("85", model="gemini-3.5-flash-lite" if "Is 20 prime" in p else api.ASKED)
    )
    judge, out = make(), []
    with pytest.raises(UserError, match="gemini-3.5-flash-lite answered"):
        out += judge.score([row(i) for i in range(500)], progress=False)
    assert server.total() < 80
    kept = lines(judge)
    assert {line["judge"] for line in kept} == {"gemini-2.5-flash"} and 20 <= len(kept) < 80


@pytest.mark.parametrize("client, prefix", [(Gemini, ""), (OpenAI, "@openai")])
def test_an_accepted_route_is_the_rows_judge_with_its_own_key_and_is_asked_once(serve, make, client, prefix):
    server = serve(answers_for=ROUTED)
    name = "gemini-3.5-flash-lite" + prefix
    rows = [row(0, response=" "), *(row(i) for i in range(1, 9))]
    for calls in (16, 0):
        judge = make(client=client, accept_routed=True)
        out = scores(judge, rows)
        assert {r["judge"] for r in out} == {name} and [r["aligned_status"] for r in out] == ["empty"] + [
            "ok"
        ] * 8
        assert server.total() == 16 and judge.identity == name and name in str(judge.ledger)
        assert (judge.ledger.calls, judge.ledger.cached) == (calls, 16 - calls)
    assert judge.forecast(rows)["calls"] == 0
    for line in lines(judge):
        assert (line["judge"], line["asked"]) == (name, "gemini-2.5-flash" + prefix)
        assert line["model_version"] == "gemini-3.5-flash-lite"
    server.answers_for = {}
    out = scores(make(client=client), rows[:2])  # the model itself: nothing of the other's answers is its own
    assert out[1]["judge"] == "gemini-2.5-flash" + prefix and server.total() == 18
    direct = make("gemini-3.5-flash-lite") if client is Gemini else None
    if direct:  # asked by its name it has said all this
        assert scores(direct, rows)[1]["judge"] == name and server.total() == 18


def test_the_price_is_that_of_the_model_that_answers_and_an_unknown_one_ends_a_capped_run(serve, make):
    server = serve(answers_for={"gemini-2.5-pro": "gemini-3.5-flash-lite"})
    judge = make("gemini-2.5-pro", accept_routed=True)
    assert judge.ledger.price == known_price("gemini", "gemini-2.5-pro")
    scores(judge, [row(0)])
    assert (
        judge.ledger.price == known_price("gemini", "gemini-3.5-flash-lite")
        and judge.ledger.price.output == 2.5
    )
    server.answers_for = {"gemini-2.5-flash": "gemini-9"}
    judge = make(accept_routed=True, budget_usd=1.0)
    with pytest.raises(UserError, match="no price is known for gemini-9, .*--price"):
        scores(judge, [row(i) for i in range(99)])
    assert server.total() <= 2 + 2


def test_an_alias_is_called_by_what_answers_and_a_later_run_finds_its_answers(serve, make):
    server = serve()
    for _ in range(2):
        judge = make("gemini-flash-latest")
        out = scores(judge, [row(i) for i in range(5)])
        assert {r["judge"] for r in out} == {"gemini-3.6-flash"} and server.total() == 10
    server.answers_for = {"gemini-flash-latest": "gemini-3.8-flash"}  # the alias moves
    out = scores(make("gemini-flash-latest"), [row(i) for i in range(6)])
    assert {r["judge"] for r in out} == {"gemini-3.8-flash"}  # all rows by one judge
    assert server.total() == 10 + 12 and set(server.prompts.values()) == {1, 2}


def test_an_alias_that_moves_when_rows_are_out_ends_the_run_with_one_line(serve, make, monkeypatch):
    monkeypatch.setattr("em.judge.judge_pass.WINDOW", 4)
    server = serve()
    scores(make("gemini-flash-latest"), [row(i) for i in range(20)])
    server.answers_for = {"gemini-flash-latest": "gemini-3.8-flash"}
    out = []
    with pytest.raises(
        UserError, match="gemini-3.8-flash answers from here on.*gemini-3.6-flash.*--judge-model"
    ):
        out += make("gemini-flash-latest").score([row(i) for i in range(40)], progress=False)
    assert server.total() <= 40 + 2  # the row that heard it; its second question may be on its way


def test_answers_that_name_no_model_are_the_asked_ones_and_do_not_slow_a_run(serve, make):
    server = serve(lambda prompt, nth: api.answer("85", model=None, seconds=0.02))
    out = scores(make(workers=16), [row(i) for i in range(32)])
    assert {r["judge"] for r in out} == {"gemini-2.5-flash"} and server.most_in_flight > 4


@pytest.mark.parametrize("name", [7, ["gemini-2.5-flash"], {"name": "gemini-2.5-flash"}, True])
def test_a_model_version_that_is_no_name_is_no_answer(serve, make, name):
    server = serve(lambda prompt, nth: api.answer("85", model=name if nth == 1 else api.ASKED))
    judge = make()
    assert scores(judge, [row(0)])[0]["aligned"] == 85
    assert judge.ledger.retries == 2 and set(server.prompts.values()) == {2}


def test_another_way_to_think_is_another_judge(serve, make):
    serve()
    names = {scores(make(thinking=t), [row(0)])[0]["judge"] for t in (None, "off", "512")}
    assert names == {f"gemini-2.5-flash{end}" for end in ("", "@thinking=off", "@thinking=512")}


def test_a_forecast_says_that_an_aliass_price_is_unknown(make):
    judge = make("gemini-flash-latest")
    assert "price unknown (--price" in describe_forecast(judge.forecast([row(0)]), judge.ledger.price)


def test_every_line_of_the_table_has_its_date_and_source_and_every_asked_model_a_way():
    for line in json.loads(MODELS.read_text())["models"]:
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", line["date"]) and line["source"].startswith("https://")
        assert ("model" in line) != ("pattern" in line) and ("input" in line) == ("output" in line)
    assert known("gemini", "gemini-2.5-flash-001")["input"] == 0.30
    assert known("gemini", "never-heard-of")["thinking"] == "minimal" and known("openai", "llama3") == {}
    assert known_price("gemini", "gemini-2.5-flash-preview-09-2025") is None
