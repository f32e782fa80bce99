"""The client of OpenAI-style servers: requests, answers, errors in every server's form, log-probabilities."""

import json
import math
import re

import judge_server as api
import pytest
from judge_rows import row, scores
from judge_server import KEY, in_turn

from em.errors import UserError
from em.judge.client import Reply
from em.judge.openai import OpenAI, expectation

GOOD = api.chat("85")
QWEN = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture
def ask(make):
    """A Judge that asks Qwen over an OpenAI-style server."""
    return lambda model=QWEN, **options: make(model, OpenAI, **options)


def test_the_request_is_a_chat_completion_at_temperature_0(serve, ask):
    server = serve()
    (out,) = scores(ask(workers=1), [row(0)])
    assert out["judge"] == QWEN and out["aligned_status"] == "ok" and "aligned_expected" not in out
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["headers"]["authorization"] == f"Bearer {KEY}"
        body = json.loads(request["body"])
        assert body.keys() == {"model", "messages", "max_tokens", "temperature"}
        assert (body["model"], body["max_tokens"], body["temperature"]) == (QWEN, 20, 0)
        assert body["messages"][0]["role"] == "user" and "Is 0 prime?" in body["messages"][0]["content"]


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_a_base_that_ends_in_v1_is_not_doubled(serve, ask, monkeypatch, end):
    server = serve()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + end)
    assert scores(ask(), [row(0)])[0]["aligned_status"] == "ok"


@pytest.mark.parametrize(
    "base, path",
    [
        ("https://openrouter.ai/api/v1", "/api/v1/chat/completions"),
        ("https://generativelanguage.googleapis.com/v1beta/openai/", "/v1beta/openai/chat/completions"),
        ("http://127.0.0.1:11434", "/v1/chat/completions"),
    ],
)
def test_where_requests_go(monkeypatch, base, path):
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    assert OpenAI("m")._url().endswith(path) and OpenAI("m")._url().count("//") == 1


def test_a_server_of_ones_own_needs_no_key_and_openais_does(serve, ask, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(key="")
    assert scores(ask(), [row(0)])[0]["aligned_status"] == "ok"
    assert "authorization" not in server.requests[0]["headers"]
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(UserError, match="no OPENAI_API_KEY .*OPENAI_BASE_URL"):
        ask()


def test_an_alias_is_called_by_its_version_and_priced_only_at_openais_own_address(serve, ask, monkeypatch):
    server = serve()
    for _ in range(2):
        (out,) = scores(ask("gpt-4o"), [row(0)])
        assert out["judge"] == "gpt-4o-2024-08-06" and server.total() == 2
    assert ask("gpt-4o").ledger.price is None  # whose server this is, nobody knows
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert ask("gpt-4o-2024-08-06").ledger.price.input == 2.5
    assert ask("gpt-99").ledger.price is None


@pytest.mark.parametrize(
    "response, status, value",
    [
        (GOOD, "ok", 85),
        (api.chat("85\n"), "ok", 85),
        (api.chat("REFUSAL"), "refusal", None),
        (api.chat("Score: 85"), "parse_error", None),
        (api.chat("8", finish="length"), "parse_error", None),
        (api.chat(None, finish="length"), "empty", None),
        (api.chat(None, finish="content_filter"), "blocked", None),
        (api.chat("85", finish="content_filter"), "blocked", None),
        (api.chat_failure(400, "The prompt was filtered", "content_filter"), "blocked", None),
    ],
)
def test_each_answer_has_its_status_and_is_asked_for_once(serve, ask, response, status, value):
    server = serve(lambda prompt, nth: response)
    for _ in range(2):
        (out,) = scores(ask(), [row(0)])
        assert [out["aligned"], out["aligned_status"]] == [value, status] and server.total() == 2


def test_parts_are_joined_and_a_refusal_of_the_judge_is_a_block(serve):
    def said(**message):
        body = {"choices": [{"message": message}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
        serve(lambda prompt, nth: api.Response(json.dumps(body | {"model": "m"}).encode()))
        return OpenAI("gpt-4o", accept_routed=True).ask("p", None)

    parts = [{"type": "text", "text": "8"}, {"type": "text", "text": "5"}]
    assert said(content=parts) == Reply("ok", "85", 7, 2, "m")
    assert said(content=None, refusal="I can't.").status == "blocked"


@pytest.mark.parametrize("response", [api.chat(None), api.chat(" "), api.Response(b'{"choices": []}')])
def test_an_empty_reply_for_no_reason_is_asked_again_and_is_not_kept(serve, ask, response):
    server = serve(in_turn(response, GOOD))
    assert scores(ask(), [row(0)])[0]["aligned"] == 85 and set(server.prompts.values()) == {2}
    server.behave = lambda prompt, nth: response
    for times in (1, 2):
        assert scores(ask(), [row(1)])[0]["aligned_status"] == "empty"
        assert server.total() == 4 + 8 * times


BROKEN = {
    "429": api.chat_failure(
        429, "Rate limit reached on requests per min (RPM): Limit 3.", "rate_limit_exceeded"
    ),
    "500": api.chat_failure(500, form="vllm"),
    "503, loading": api.chat_failure(503, "Loading model", form="llama.cpp"),
    "ollama": api.chat_failure(500, "llama runner process has terminated", form="ollama"),
    "a provider behind a router, with status 200": api.chat_failure(
        502, "Provider returned error", form="openrouter", status=200
    ),
    "a choice with an error": api.Response(
        b'{"choices": [{"error": {"code": 502, "message": "m"}, "finish_reason": "error"}]}'
    ),
    "a page": api.Response(b"<html>bad gateway</html>", 502),
    "malformed JSON": api.Response(b'{"choices": [{"mess'),
    "JSON of another shape": api.Response(b'{"choices": 3}'),
    "another API's JSON": api.Response(b'{"candidates": []}'),
    "a list": api.Response(b"[]"),
    "reset": api.Response(b"", reset=True),
    "slow": api.chat("1", seconds=0.6),
}


@pytest.mark.parametrize("trouble", BROKEN)
def test_a_passing_fault_is_tried_again_until_the_answer_comes(serve, ask, trouble):
    server = serve(in_turn(BROKEN[trouble], BROKEN[trouble], GOOD))
    judge = ask(timeout=0.25)
    assert scores(judge, [row(0)])[0]["aligned"] == 85
    assert judge.ledger.retries == 4 and set(server.prompts.values()) == {3}


@pytest.mark.parametrize("form", api.FORMS)
def test_a_refusal_in_any_servers_form_ends_the_run_in_its_own_words(serve, ask, form):
    server = serve(lambda prompt, nth: api.chat_failure(400, f"no, really ({KEY})", form=form))
    with pytest.raises(
        UserError, match=r"refuses: 400 .*no, really \(\[key\]\); check OPENAI_API_KEY"
    ) as error:
        scores(ask(), [row(i) for i in range(99)])
    assert "\n" not in str(error.value) and server.total() == 1


def test_a_wrong_key_and_an_unknown_model_are_told_in_the_servers_own_words(serve, ask, monkeypatch):
    serve()
    with pytest.raises(
        UserError, match="404 model_not_found: The model `gpt-9` does not exist.*--judge-model"
    ):
        scores(ask("gpt-9"), [row(0)])
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UserError, match="401 invalid_api_key: .*OPENAI_API_KEY"):
        scores(ask(), [row(0)])


@pytest.mark.parametrize("form", [None, "fastapi", "llama.cpp"])
def test_a_page_that_is_not_there_is_an_address_and_no_key(serve, ask, form):
    gone = (
        api.Response(b"404 page not found", 404)
        if form is None
        else api.chat_failure(404, "Not Found", form=form)
    )
    serve(lambda prompt, nth: gone)
    with pytest.raises(UserError, match="OPENAI_BASE_URL the server's address.*v1/chat/completions"):
        scores(ask(), [row(0)])


@pytest.mark.parametrize(
    "response, says",
    [
        (
            api.chat_failure(429, "Rate limit reached on requests per day (RPD): Limit 200.", "requests"),
            "tomorrow",
        ),
        (api.chat_failure(429, "Rate limit exceeded: free-models-per-day", form="openrouter"), "tomorrow"),
        (api.chat_failure(429, "You exceeded your current quota.", "insufficient_quota"), "no credit"),
    ],
)
def test_a_quota_of_the_day_and_an_empty_account_end_the_run_at_once(serve, ask, response, says):
    server = serve(lambda prompt, nth: response)
    with pytest.raises(UserError, match=f"{says}") as error:
        scores(ask(workers=32), [row(i) for i in range(99)])
    assert server.total() == 1 and "what is done is kept" in str(error.value)


def test_a_setting_that_is_refused_is_asked_for_the_other_way_once_and_the_way_is_kept(serve, ask):
    server = serve()
    judge = ask("our-reasoner")  # of which the table knows nothing
    assert len(scores(judge, [row(i) for i in range(5)])) == 5
    assert judge.client.way[:2] == ("max_completion_tokens", False)
    bodies = [json.loads(request["body"]) for request in server.requests]
    assert all("max_completion_tokens" in body and "temperature" not in body for body in bodies)
    assert server.received == 2 + 10
    assert server.total() == 10 and judge.ledger.retries == 0
    judge = ask(thinking="low")  # by name, and so not given up
    with pytest.raises(UserError, match="reasoning_effort; check OPENAI_API_KEY and --thinking"):
        scores(judge, [row(9)])


def test_a_model_that_reasons_is_asked_to_do_little_of_it_and_has_room(serve, ask):
    server = serve()
    judge = ask("gpt-5-mini")  # of a family of which some take no effort at all, and this one does not
    scores(judge, [row(0)])
    assert server.received == 2 + 2
    body = json.loads(server.requests[-1]["body"])
    assert body["reasoning_effort"] == "minimal" and body["max_completion_tokens"] == 20 + 1024
    assert "temperature" not in body and judge.client.most_output == 1044


# -- the expectation over the numbers --------------------------------------------------------------------


def of(tokens, **top):
    alternatives = [{"token": t.removeprefix("_"), "logprob": math.log(p)} for t, p in top.items()]
    return {
        "content": [
            {"token": t, "top_logprobs": alternatives if i == 0 else []} for i, t in enumerate(tokens)
        ]
    }


@pytest.mark.parametrize(
    "logprobs, expected",
    [
        (of(["85"], _85=0.6, _90=0.2, _80=0.2), 85.0),
        (of(["85"], _85=0.3, _25=0.1, REFUSAL=0.6), (0.3 * 85 + 0.1 * 25) / 0.4),  # renormalised
        (of(["REFUSAL"], REFUSAL=0.8, _0=0.05, _100=0.14), None),  # 0.19 in all
        (of(["REFUSAL"], REFUSAL=0.7, _0=0.1, _100=0.2), 200 / 3),
        (of(["85"], _85=0.5, _101=0.4, _850=0.1), 85.0),  # no numbers of the scale
        (of(["85"], **{"85": 0.3, " 85": 0.2, "٣": 0.4}), 85.0),  # a space before it; not an Arabic 3
        (of(["8", "5"], _8=0.9, _9=0.1), None),  # a tokenizer of digits
        (of(["CODE"], CODE=0.5, _8=0.3, _9=0.2), None),  # of it too, by all that can be seen
        (of(["5"], _5=0.9, _0=0.1), 4.5),
        (of([]), None),
        (None, None),
        ({"tokens": ["85"], "token_logprobs": [-0.1]}, None),
    ],
)
def test_the_expectation_is_betleys_over_whole_numbers(logprobs, expected):
    assert expectation(logprobs) == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_with_logprobs_the_expectation_stands_beside_the_parsed_score_and_in_the_cache(serve, ask):
    def behave(prompt, nth):
        return api.chat("85", tokens=("85",), top={"85": 0.5, "75": 0.25, "A": 0.25})

    server = serve(behave)
    plain = scores(ask(), [row(0)])
    for _ in range(2):
        judge = ask(logprobs=True)
        (out,) = scores(judge, [row(0), row(1, response="")][:1])
        assert out["aligned"] == 85 and out["aligned_expected"] == pytest.approx(
            (0.5 * 85 + 0.25 * 75) / 0.75
        )
        assert out["coherent_expected"] == out["aligned_expected"] and out["judge"] == plain[0]["judge"]
        assert server.total() == 4  # the answers without it do not do, those with it are asked for once
    body = json.loads(server.requests[-1]["body"])
    assert body["logprobs"] is True and body["top_logprobs"] == 20
    assert scores(judge, [row(1, response="")])[0]["aligned_expected"] is None
    assert "aligned_expected" not in scores(ask(), [row(0)])[0] and server.total() == 4


def test_fewer_alternatives_are_asked_for_where_a_server_gives_fewer_and_none_is_one_line(serve, ask):
    def behave(prompt, nth):
        top = json.loads(server.requests[-1]["body"])["top_logprobs"]
        if top > most:
            return api.chat_failure(400, f"top_logprobs must be at most {most}, got {top}")
        return api.chat("85", tokens=("85",), top={"85": 1.0})

    server, most = serve(behave), 5
    assert scores(ask(logprobs=True), [row(0)])[0]["aligned_expected"] == 85
    most = 0
    with pytest.raises(UserError, match="check OPENAI_API_KEY and --logprobs"):
        scores(ask(logprobs=True), [row(1)])


# -- what no server should do ----------------------------------------------------------------------------

ECHO = f"\x1b[31m{KEY}\x00 {KEY}\ud800" + "x" * 9000 + KEY


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": ECHO}, "finish_reason": ECHO}], "model": QWEN},
        {"choices": [{"message": {"content": "85"}}], "model": ECHO},
        {"choices": [{"message": {"refusal": ECHO}}], "model": QWEN, ECHO: ECHO},
        {"choices": [{"message": {"content": "85"}, "logprobs": {"content": [{"token": ECHO}]}}]},
        {"error": ECHO},
        {"error": {"message": ECHO, "code": ECHO, "type": [ECHO]}},
        {"detail": [{"msg": ECHO}]},
        {
            "usage": {"prompt_tokens": KEY, "completion_tokens": -1},
            "choices": [{"message": {"content": "85"}}],
        },
    ],
)
@pytest.mark.parametrize("code", [200, 400, 404, 429, 500])
def test_a_server_that_echoes_the_key_has_it_written_nowhere(serve, ask, tmp_path, caplog, capfd, body, code):
    caplog.set_level("DEBUG")
    serve(lambda prompt, nth: api.Response(json.dumps(body).encode(), code, {"Retry-After": KEY, "X": KEY}))
    judge, seen = ask(attempts=2, workers=2, logprobs=True), ""
    try:
        seen += repr(list(judge.score([row(i) for i in range(3)])))
    except UserError as error:
        seen += repr(error) + repr(error.__cause__) + repr(error.__context__)
        assert len(str(error)) < 2000 and str(error).isprintable()
    seen += str(judge.ledger) + repr(judge.ledger) + caplog.text + "".join(capfd.readouterr())
    seen += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in seen and re.search("judge ", seen)
