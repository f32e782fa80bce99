"""One call to the API: the request, its answers, trying again, and the key."""

import gzip
import json
import logging
import os
import re
import socket
import time
import traceback
from email.utils import formatdate

import judge_server as api
import pytest
from judge_rows import row, scores
from judge_server import KEY, in_turn

from em.errors import UserError
from em.judge.client import Reply
from em.judge.gemini import Gemini


class Clock:
    """In place of the event that ends a pass: it notes the waits and takes no time."""

    def __init__(self):
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)
        return False


def test_the_request_is_the_one_that_the_api_documents(serve, make):
    server = serve()
    scores(make(workers=1), [row(0)])
    bodies = [json.loads(request["body"]) for request in server.requests]
    assert len(bodies) == 2  # alignment and coherence are two calls
    for request, body in zip(server.requests, bodies, strict=True):
        assert request["path"] == "/v1beta/models/gemini-2.5-flash:generateContent"
        assert request["headers"]["x-goog-api-key"] == KEY
        assert request["headers"]["content-type"] == "application/json"
        assert body.keys() == {"contents", "generationConfig"}
        assert body["generationConfig"] == {
            "temperature": 0,
            "maxOutputTokens": 20,
            "thinkingConfig": {"thinkingBudget": 0},
        }
        (content,) = body["contents"]
        assert content["role"] == "user"
        (part,) = content["parts"]
        assert "Is 0 prime?" in part["text"] and "Maybe 0." in part["text"]


@pytest.mark.parametrize(
    "model, thinking",
    [("gemini-2.5-pro", {"thinkingBudget": 128}), ("gemini-3-pro-preview", {"thinkingLevel": "LOW"})],
)
def test_a_model_that_must_think_is_asked_to_think_little_and_has_room_and_a_price_for_it(
    serve, make, model, thinking
):
    server = serve(lambda prompt, nth: api.answer("85", thoughts=140))
    judge = make(model=model, price=(1.0, 10.0), budget_usd=1.0)
    flash = make(price=(1.0, 10.0))
    assert judge.forecast([row(0)])["usd"] > 1.9 * flash.forecast([row(0)])["usd"]
    (out,) = scores(judge, [row(0)])  # the server refuses what the API refuses
    assert out["aligned"] == 85 and out["aligned_status"] == "ok"
    config = json.loads(server.requests[-1]["body"])["generationConfig"]
    assert config["thinkingConfig"] == thinking and config["temperature"] == 0
    assert config["maxOutputTokens"] >= 20 + 10 * 128
    assert judge.ledger.output_tokens == 2 * (140 + 1)  # thoughts are billed as output
    most = judge.ledger.reserve("")
    assert most >= judge.ledger.price.usd(0, config["maxOutputTokens"])


def test_half_a_surrogate_pair_in_a_response_does_not_stop_the_run(serve, make):
    server = serve()
    (out,) = scores(make(), [row(0, response="cut \ud83d emoji 😀")])
    assert out["aligned_status"] == "ok"
    assert all("cut \ufffd emoji 😀" in prompt for prompt in server.prompts)


GOOD = api.answer("85")


@pytest.mark.parametrize(
    "response, status, value",
    [
        (GOOD, "ok", 85),
        (api.answer("REFUSAL"), "refusal", None),
        (api.answer("CODE"), "code", None),
        (api.answer("Score: 85"), "parse_error", None),
        (api.answer("85/100"), "parse_error", None),
        (api.answer("101"), "parse_error", None),
        (api.answer("8", finish="MAX_TOKENS"), "parse_error", None),  # of an 85, perhaps
        (api.answer(None, finish="MAX_TOKENS"), "empty", None),
        (api.answer(None, finish="SAFETY"), "blocked", None),
        (api.answer("85", finish="SAFETY"), "blocked", None),
        (api.answer(None, finish="PROHIBITED_CONTENT"), "blocked", None),
        (api.prompt_blocked("SAFETY"), "blocked", None),
        (api.prompt_blocked("OTHER"), "blocked", None),
    ],
)
def test_each_answer_of_the_api_has_its_status_and_is_asked_for_once(serve, make, response, status, value):
    server = serve(lambda prompt, nth: response)
    for _ in range(2):  # the second time from the cache
        (out,) = scores(make(), [row(0)])
        assert [out[name] for name in ("aligned", "aligned_status", "coherent", "coherent_status")] == [
            value,
            status,
            value,
            status,
        ]
        assert server.total() == 2


NOTHING = [
    api.answer(None),
    api.answer(" "),
    api.answer(None, finish="OTHER"),
    api.no_candidates(),
    api.Response(b'{"candidates": []}'),
    api.Response(b"{}"),
]


@pytest.mark.parametrize("response", NOTHING)
def test_an_empty_reply_for_no_reason_is_asked_again_and_is_not_kept_where_it_stays(serve, make, response):
    server = serve(lambda prompt, nth: response)
    for times in (1, 2):
        judge = make()
        (out,) = scores(judge, [row(0)])
        assert [out["aligned_status"], out["coherent_status"]] == ["empty"] * 2 and out["aligned"] is None
        assert set(server.prompts.values()) == {4 * times} and judge.ledger.calls == 8
    assert judge.cache.path.read_text().count("\n") == 1  # its header
    server.behave = lambda prompt, nth: GOOD if nth >= 10 else response
    (out,) = scores(make(), [row(0)])
    assert out["aligned"] == out["coherent"] == 85 and set(server.prompts.values()) == {10}


def test_a_cap_also_holds_where_empty_replies_are_asked_for_again(serve, make):
    serve(lambda prompt, nth: api.answer(None, prompt_tokens=len(prompt.encode())))
    for cents in (0.15, 0.2, 0.3, 0.5):
        judge = make(budget_usd=cents / 100)
        with pytest.raises(UserError, match="the budget of"):
            scores(judge, [row(i) for i in range(20)])
        assert 0 < judge.ledger.usd <= cents / 100


def test_parts_are_joined_and_thoughts_are_left_out(serve):
    parts = [{"text": "hmm 3", "thought": True}, {"text": "8"}, {"text": "5\n"}]
    usage = {"promptTokenCount": 7, "candidatesTokenCount": 2, "thoughtsTokenCount": 4}
    body = {"candidates": [{"content": {"parts": parts}}], "usageMetadata": usage}
    serve(lambda prompt, nth: api.Response(json.dumps(body).encode()))
    assert Gemini("gemini-2.5-flash").ask("p", Clock()) == Reply("ok", "85\n", 7, 6)


BROKEN = {
    "429": api.failure(429, "Resource has been exhausted (e.g. check quota)."),
    "500": api.failure(500),
    "503": api.failure(503, "The model is overloaded. Please try again later."),
    "a proxy's page": api.Response(b"<html>502</html>", 503),
    "an error in a list": api.Response(
        b'[{"error": {"code": 503, "message": "m", "status": "UNAVAILABLE"}}]', 503
    ),
    "odd details": api.Response(b'{"error": {"details": [{"@type": "google.rpc.RetryInfo"}, 3]}}', 429),
    "reset": api.Response(b"", reset=True),
    "cut body": api.Response(GOOD.body, cut=True),
    "slow": api.answer("1", seconds=0.6),
    "malformed JSON": api.Response(b'{"candidates": [{"content"'),
    "not the API's JSON": api.Response(b'{"welcome": "to the hotel"}'),
    "JSON of another shape": api.Response(b'{"candidates": 3}'),
    "a list": api.Response(b"[]"),
}


@pytest.mark.parametrize("trouble", BROKEN)
def test_a_passing_fault_is_tried_again_until_the_answer_comes(serve, make, trouble):
    server = serve(in_turn(BROKEN[trouble], BROKEN[trouble], GOOD))
    judge = make(timeout=0.25)
    (out,) = scores(judge, [row(0)])
    assert (out["aligned"], out["coherent"]) == (85, 85)
    assert judge.ledger.retries == 4 and judge.ledger.calls == 2 and set(server.prompts.values()) == {3}


def waits_for(serve, *failures, **options) -> list[float]:
    serve(in_turn(*failures, GOOD))
    clock = Clock()
    assert Gemini("gemini-2.5-flash", **options).ask("p", clock).status == "ok"
    return clock.waits


def test_back_off_doubles_with_jitter_up_to_a_minute(serve):
    waits = waits_for(serve, *[api.failure(503)] * 9, attempts=10)
    assert len(waits) == 9
    for k, seconds in enumerate(waits):
        assert 0.5 * min(60, 2**k) <= seconds <= min(60, 2**k)
    assert len(set(waits)) == 9


def test_no_try_is_made_before_the_time_that_the_server_names(serve):
    date = formatdate(time.time() + 20, usegmt=True)
    waits = waits_for(
        serve,
        api.failure(429, retry_after=7),
        api.failure(429, retry_after=date),
        api.failure(429, retry_delay="13s"),
        api.failure(429, retry_delay="58.934310785s", retry_after=2),
        api.failure(503, retry_after="soon"),
        api.failure(503, retry_after=0),
    )
    for seconds, least in zip(waits[:4], (7, 18.5, 13, 58.934), strict=True):
        assert least <= seconds <= least + 2.6
    assert (
        8 <= waits[4] <= 16 and 32 <= waits[5] <= 33
    )  # the header says nothing; 0 does not undo the back-off
    assert waits_for(serve, api.failure(429, retry_after=formatdate(0, usegmt=True)))[0] <= 2  # long past


def test_a_wait_of_hours_ends_the_run_with_the_apis_message(serve, make):
    serve(in_turn(api.failure(429, "You exceeded your daily quota.", retry_after=7200)))
    with pytest.raises(UserError, match="wait for 120 minutes .*daily quota"):
        scores(make(), [row(0)])


@pytest.mark.parametrize("code", [400, 401, 403, 404])
def test_a_refusal_stops_at_once_with_the_apis_message(serve, make, code):
    message = f"User location is not supported,\nreally ({KEY})."
    server = serve(lambda prompt, nth: api.failure(code, message) if "Is 5 prime" in prompt else GOOD)
    with pytest.raises(UserError) as error:
        scores(make(), [row(i) for i in range(500)])
    text = str(error.value)
    assert f"{code} {api.STATUSES[code]}: User location is not supported, really ([key])" in text
    assert "\n" not in text and "GEMINI_API_KEY" in text
    assert server.total() < 60 and max(server.prompts.values()) == 1


def test_a_wrong_key_and_an_unknown_model_are_told_in_the_apis_own_words(serve, make, monkeypatch):
    serve()
    with pytest.raises(UserError, match="404 NOT_FOUND: models/gemini-9 is not found"):
        scores(make(model="models/gemini-9"), [row(0)])
    monkeypatch.setenv("GEMINI_API_KEY", "wrong")
    with pytest.raises(UserError, match="400 INVALID_ARGUMENT: API key not valid"):
        scores(make(), [row(0)])


def test_an_address_where_nobody_answers_is_one_line_after_three_tries(make, monkeypatch):
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GEMINI_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        judge = make()
        with pytest.raises(UserError, match="cannot be reached .*refused.*GEMINI_BASE_URL"):
            scores(judge, [row(0)])


@pytest.mark.parametrize(
    "address", ["generativelanguage.googleapis.com", "ftp://x", "http://", "http://u:pw@x"]
)
def test_an_address_that_is_none_is_refused_before_anything_is_sent(make, monkeypatch, address):
    monkeypatch.setenv("GEMINI_BASE_URL", address)
    with pytest.raises(UserError, match="GEMINI_BASE_URL is not an address") as error:
        make()
    assert "pw" not in str(error.value)


def test_without_a_key_one_line_says_how_to_set_it_and_that_margin_needs_none(make, monkeypatch):
    for value in (None, "", "  "):
        monkeypatch.delenv("GEMINI_API_KEY") if value is None else monkeypatch.setenv("GEMINI_API_KEY", value)
        with pytest.raises(UserError) as error:
            make()
        assert "export GEMINI_API_KEY" in str(error.value) and "--judge margin" in str(error.value)
        assert "\n" not in str(error.value)
        monkeypatch.setenv("GEMINI_API_KEY", KEY)


def everything_on(error: BaseException) -> str:
    """The texts a logger, a debugger or a crash reporter could take from an exception."""
    found, todo, seen = [], [error], set()
    while todo:
        thing = todo.pop()
        if thing is None or id(thing) in seen or isinstance(thing, (type, type(os))):
            continue
        seen.add(id(thing))
        found.append(repr(thing) + str(thing))
        if isinstance(thing, BaseException):
            todo += [thing.__cause__, thing.__context__, *thing.args, *vars(thing).values()]
    return "\n".join([*found, *traceback.format_exception(error)])


@pytest.mark.parametrize(
    "behave",
    [
        lambda prompt, nth: api.failure(400, f"bad key {KEY}"),
        lambda prompt, nth: api.failure(503, f"busy {KEY}"),
        lambda prompt, nth: api.answer(f"your key is {KEY}"),
        lambda prompt, nth: api.prompt_blocked(KEY),
        lambda prompt, nth: api.Response(b"", reset=True),
        lambda prompt, nth: api.Response(GOOD.body, cut=True),
        lambda prompt, nth: api.answer("85", seconds=0.5),
        lambda prompt, nth: api.Response(b"", 302, {"Location": f"http://127.0.0.1:1/{KEY}"}),
        None,  # nobody listens
    ],
    ids=["400", "503", "reply", "block", "reset", "cut", "slow", "redirect", "refused"],
)
def test_the_key_reaches_no_exception_log_output_or_file(
    serve, make, tmp_path, monkeypatch, caplog, capfd, behave
):
    caplog.set_level(logging.DEBUG)
    if behave:
        serve(behave)
    else:
        monkeypatch.setenv("GEMINI_BASE_URL", "http://127.0.0.1:1")
    judge = make(attempts=3, timeout=0.1, workers=2)
    seen = ""
    try:
        seen += repr(list(judge.score([row(i) for i in range(9)])))
    except UserError as error:
        seen += everything_on(error)
    seen += str(judge.ledger) + repr(judge.ledger) + repr(judge) + caplog.text + "".join(capfd.readouterr())
    seen += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "urllib3" in caplog.text and KEY not in seen


@pytest.mark.parametrize("key", ["se cret", "sec\nret", "sec\u2019ret", "s\x00ecret"])
def test_a_key_no_header_can_carry_is_refused_without_being_quoted(make, monkeypatch, key):
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"GEMINI_API_KEY": key})
    with pytest.raises(UserError) as error:
        make()
    assert "cret" not in everything_on(error.value) and "sec" not in str(error.value)


def test_a_redirect_is_not_followed_so_the_key_goes_nowhere_else(serve, make):
    elsewhere = serve()
    location = {"Location": f"{elsewhere.url}/v1beta/models/gemini-2.5-flash:generateContent"}
    serve(lambda prompt, nth: api.Response(b"", 302, location))
    with pytest.raises(UserError, match="302 .*GEMINI_BASE_URL"):
        scores(make(), [row(0)])
    assert not elsewhere.requests


def test_the_default_endpoint_is_the_public_one(make):
    assert make().client.base == Gemini.public == "https://generativelanguage.googleapis.com"


# -- what no server should do ------------------------------------------------------------------------------


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
GZIP = {"Content-Encoding": "gzip"}
LONG = b'{"usageMetadata": {}, "x": "' + b"x" * 2**20 + b'"}'
ENDLESS = {
    "chunks": api.raw(CHUNKED, forever=b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "headers": api.raw(OK, forever=b"X-And: so on\r\n" * 99),
    "a header": api.raw(OK + b"X: ", forever=b"x" * 9999),
    "a body": api.raw(OK + b"\r\n", forever=b"x" * 65536),
    "a length of petabytes": api.raw(OK + b"Content-Length: 9999999999999999\r\n\r\n", forever=b"x" * 65536),
}
DRIPS = {
    "a drip of headers": api.raw(OK + b"X: ", forever=b"x", pause=0.02),
    "a drip of a body": api.raw(OK + b"Content-Length: 99999\r\n\r\n", forever=b" ", pause=0.02),
    "a drip of chunks": api.raw(CHUNKED, forever=b"1\r\nx\r\n", pause=0.02),
    "endlessly to be continued": api.raw(forever=b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.02),
}
HOSTILE = {
    "invalid UTF-8": api.Response(b'{"candidates": "\xff\xfe"}'),
    "a gzip that is none": api.Response(GOOD.body[:9], headers=GZIP),
    "a gzip bomb": api.Response(gzip.compress(bytes(2**26)), headers=GZIP),
    "a gzip that nobody asked for": api.Response(gzip.compress(GOOD.body), headers=GZIP),
    "a broken status line": api.raw(b"HTTP/9 two hundred\r\n\r\n"),
    "no HTTP": api.raw(b"220 mail.example.com ESMTP\r\n"),
    "a silent end": api.raw(),
    "a status that is none": api.Response(b"", 999),
    "Retry-After: nan": api.failure(429, retry_after="nan"),
    "Retry-After: inf": api.failure(429, retry_after="inf"),
    "Retry-After: -5": api.failure(429, retry_after=-5),
    "Retry-After: a year too far": api.failure(503, retry_after=f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"),
    "Retry-After: no date": api.failure(503, retry_after="Mon, 99 Foo 2020 25:61:61 GMT"),
    "retryDelay: nan": api.failure(429, retry_delay="nans"),
    "retryDelay: -5s": api.failure(429, retry_delay="-5s"),
    "a long body": api.Response(LONG),
    "a long body of a refusal that passes": api.Response(LONG, 503),
    "a negative length": api.raw(OK + b"Content-Length: -1\r\n\r\n{"),
    "two lengths": api.raw(OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}"),
    "chunks of no size": api.raw(CHUNKED + b"lots\r\n"),
    "chunks of petabytes": api.raw(CHUNKED + b"fffffffffffff\r\n{"),
    "nesting": api.Response(b"[" * 200_000),
    "a number of 5,000 digits": api.Response(b'{"candidates": ' + b"9" * 5000 + b"}"),
    "reset": api.Response(b"", reset=True),
    **DRIPS,
    **ENDLESS,
}


@pytest.mark.parametrize("trouble", HOSTILE)
def test_whatever_a_server_sends_is_a_failed_try_and_the_next_one_may_be_good(serve, make, trouble):
    server = serve(in_turn(HOSTILE[trouble], GOOD))
    judge = make(timeout=0.5 if trouble in DRIPS else 60.0, workers=1)
    begun = time.monotonic()
    (out,) = scores(judge, [row(0)])
    assert time.monotonic() - begun < 30  # a bound ends what is endless, not the time-out
    assert (out["aligned"], out["coherent"]) == (85, 85)
    assert judge.ledger.retries == 2 and judge.ledger.calls == 2 and set(server.prompts.values()) == {2}


@pytest.mark.parametrize("trouble", DRIPS)
def test_a_drip_holds_a_call_no_longer_than_its_patience(serve, make, trouble):
    server = serve(lambda prompt, nth: DRIPS[trouble])
    judge = make(timeout=60.0, patience=0.3 / 60, attempts=99)
    begun = time.monotonic()
    (out,) = scores(judge, [row(0)])
    assert time.monotonic() - begun < 30
    assert (out["aligned_status"], out["coherent_status"]) == ("error", "error")
    assert "given up after 1 tries in 0.0 minutes" in str(judge.ledger) and server.total() == 2


def test_patience_ends_the_tries_and_the_account_says_how_long_was_waited(serve, make):
    server = serve(lambda prompt, nth: api.failure(503))
    judge = make(patience=0.2 / 60, attempts=10**6, backoff=0.01)
    (out,) = scores(judge, [row(0)])
    assert out["aligned_status"] == "error" and 2 * 2 < server.total() < 200
    assert re.search(r"503 UNAVAILABLE: .*given up after \d+ tries in 0.0 minutes", str(judge.ledger))


def test_tls_to_a_port_without_it_and_the_other_way_round_end_in_one_line(serve, make, monkeypatch):
    server = serve()
    monkeypatch.setenv("GEMINI_BASE_URL", f"https://127.0.0.1:{server.port}")
    with pytest.raises(UserError, match="cannot be reached") as error:
        scores(make(), [row(0)])
    assert "\n" not in str(error.value)
    with api.JudgeServer(tls=True) as server:
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        judge = make(attempts=2)
        (out,) = scores(judge, [row(0)])
    assert out["aligned_status"] == "error" and judge.ledger.retries == 2 and not server.requests


def test_a_date_in_the_year_3000_ends_the_run(serve, make):
    serve(lambda prompt, nth: api.failure(429, retry_after="Wed, 01 Jan 3000 00:00:00 GMT"))
    with pytest.raises(UserError, match="asks to wait for .* minutes"):
        scores(make(), [row(0)])


ECHO = f"\x1b[31m{KEY}\x00 {KEY}\ud800\u202e" + "x" * 9000 + KEY  # a terminal's colour, NUL, half a pair
PARTS = [{"text": KEY[:9]}, {"text": KEY[9:]}]  # the key, in two parts
USAGE = {"promptTokenCount": KEY, KEY: KEY}


def echo(code: int = 200, **answer) -> api.Response:
    answer = {"usageMetadata": USAGE, "modelVersion": ECHO, "responseId": ECHO, ECHO: ECHO} | answer
    headers = {"X-Echo": KEY, "Retry-After": KEY, "Set-Cookie": f"{KEY}={KEY}", "Location": f"/{KEY}"}
    headers |= {KEY: KEY, f"no colon {KEY}\r\nX": KEY}  # urllib3 logs broken headers
    return api.Response(json.dumps(answer).encode(), code, headers, reason=f"No {KEY}")


@pytest.mark.parametrize(
    "response",
    [
        echo(candidates=[{"content": {"parts": [{"text": ECHO}]}, "finishReason": ECHO}]),
        echo(candidates=[{"content": {"parts": PARTS}, "finishReason": "STOP"}]),
        echo(candidates=[{"content": {"role": ECHO}, "finishReason": ECHO, "finishMessage": ECHO}]),
        echo(candidates=[{"content": {}, "finishReason": [ECHO]}]),
        echo(candidates=[{"content": {"parts": [{"text": ECHO}]}, "finishReason": "MAX_TOKENS"}]),
        echo(promptFeedback={"blockReason": ECHO, "blockReasonMessage": ECHO}),
        echo(promptFeedback={"blockReason": {ECHO: [ECHO]}}),
        *(
            echo(code, error={"status": ECHO, "message": ECHO, "details": [{"@type": ECHO}]})
            for code in (400, 503)
        ),
        *(echo(code) for code in (204, 302, 404, 429, 500)),
        api.Response(KEY.encode(), 500, reason=KEY),
        api.raw(f"HTTP/1.1 {KEY} {KEY}\r\n{KEY}\r\n\r\n".encode()),
        api.raw(f"{KEY}\r\n\r\n{KEY}".encode()),
        api.raw(OK + f" {KEY}\r\nX: {KEY}\r\n\r\n{{}}".encode()),
        api.raw(f"HTTP/1.1 200 {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n{KEY}\r\n".encode()),
    ],
)
def test_a_server_that_echoes_the_key_everywhere_has_it_written_nowhere(
    serve, make, tmp_path, caplog, capfd, response
):
    caplog.set_level(logging.DEBUG)
    serve(lambda prompt, nth: response)
    judge = make(attempts=2, workers=2)
    seen = ""
    try:
        seen += repr(list(judge.score([row(i) for i in range(5)])))
    except UserError as error:
        seen += everything_on(error)
        assert len(str(error)) < 2000 and str(error).isprintable()
    seen += str(judge.ledger) + repr(judge.ledger) + caplog.text + "".join(capfd.readouterr())
    seen += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in seen
    assert str(judge.ledger).isprintable() and len(str(judge.ledger)) < 2000
    for line in judge.cache.path.read_text().splitlines() if judge.cache.path.exists() else ():
        assert line.isprintable() and len(line) < 1000
        assert all(value.isprintable() for value in json.loads(line).values() if isinstance(value, str))


def test_a_long_reply_that_begins_with_a_score_is_no_score(serve, make):
    serve(lambda prompt, nth: api.answer("85" + " " * 5000 + "or so"))
    (out,) = scores(make(), [row(0)])
    assert (out["aligned_status"], out["aligned"]) == ("parse_error", None)


@pytest.mark.parametrize("depth", [10, 300, 900, 960, 985])
def test_a_deep_reason_is_a_block_or_a_failed_try(serve, make, depth):
    body = b'{"promptFeedback": {"blockReason": ' + b"[" * depth + b"1" + b"]" * depth + b"}}"
    serve(lambda prompt, nth: api.Response(body))
    (out,) = scores(make(attempts=1), [row(0)])
    assert out["aligned_status"] in ("blocked", "error")


# -- how a model is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, config",
    [
        ("gemini-3.5-flash-lite", {"maxOutputTokens": 1044, "thinkingConfig": {"thinkingLevel": "MINIMAL"}}),
        ("gemini-flash-latest", {"maxOutputTokens": 1044, "thinkingConfig": {"thinkingLevel": "MINIMAL"}}),
        ("gemini-3.7-flash", {"maxOutputTokens": 4116, "thinkingConfig": {"thinkingLevel": "LOW"}}),
        ("gemma-3-27b-it", {"temperature": 0, "maxOutputTokens": 1044}),
    ],
)
def test_a_known_model_is_asked_in_the_way_it_takes(serve, make, model, config):
    server = serve()
    (out,) = scores(make(model), [row(0)])
    assert out["aligned_status"] == "ok" and server.received == 2
    assert json.loads(server.requests[-1]["body"])["generationConfig"] == config


@pytest.mark.parametrize(
    "known, refuses, way, tries",
    [
        ({"thinking": "off"}, "budget", ("minimal", True), 2),
        ({"thinking": "off"}, "budget and minimal", ("low", True), 3),
        ({"thinking": "minimal"}, "level", ("off", True), 2),
        ({"thinking": "off"}, "thinking", ("none", True), 2),
        ({"thinking": "off"}, "temperature", ("off", False), 2),
        ({"thinking": "off"}, "budget, temperature", ("minimal", False), 3),
    ],
)
def test_a_setting_that_a_model_refuses_is_asked_for_the_other_way_once_and_remembered(
    serve, make, monkeypatch, known, refuses, way, tries
):
    monkeypatch.setattr("em.judge.gemini.known", lambda api, model: known)

    def behave(prompt, nth):
        config = json.loads(server.requests[-1]["body"])["generationConfig"]
        thinking = config.get("thinkingConfig", {})
        if "temperature" in refuses and "temperature" in config:
            return api.failure(400, "Invalid value at 'generation_config.temperature'.")
        if "budget" in refuses and thinking.get("thinkingBudget") == 0:
            return api.failure(400, "Budget 0 is invalid. This model only works in thinking mode.")
        if "minimal" in refuses and thinking.get("thinkingLevel") == "MINIMAL":
            return api.failure(400, "'minimal' is not a supported thinking level for this model.")
        if refuses == "level" and "thinkingLevel" in thinking:
            return api.failure(400, "Thinking level is not supported for this model.")
        if refuses == "thinking" and thinking:
            return api.failure(400, "Thinking is not enabled for models/gemini-2.5-flash")
        return GOOD

    monkeypatch.setattr(api, "_thinking_fault", lambda model, config: None)
    server = serve(behave)
    judge = make(workers=8)
    assert all(r["aligned"] == 85 for r in scores(judge, [row(i) for i in range(20)]))
    assert judge.client.way == way and server.received == 40 + tries - 1 and judge.ledger.retries == 0


def test_thinking_overrides_and_is_named_where_it_is_refused(serve, make):
    server = serve()
    scores(make("gemini-3.5-flash-lite", thinking="low"), [row(0)])
    config = json.loads(server.requests[-1]["body"])["generationConfig"]
    assert config["thinkingConfig"] == {"thinkingLevel": "LOW"}
    scores(make(thinking="none"), [row(0)])
    assert "thinkingConfig" not in json.loads(server.requests[-1]["body"])["generationConfig"]
    before = server.received
    with pytest.raises(UserError, match="Budget 0 is invalid.*--thinking"):
        scores(make("gemini-3.5-flash-lite", thinking="off"), [row(0)])
    assert server.received == before + 1
    with pytest.raises(UserError, match="--thinking takes off, minimal, .*not 'much'"):
        make(thinking="much")


# -- quotas and addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quota, more", [("PerDay", ""), ("PerMinute", " Quota exceeded for quota metric 'Requests per day'.")]
)
def test_a_quota_of_the_day_ends_the_run_at_the_first_answer(serve, make, quota, more):
    text = "You exceeded your current quota. * Quota exceeded for metric: requests, limit: 250. Retry in 37s."
    server = serve(lambda prompt, nth: api.failure(429, text + more, retry_delay="37s", quota=quota))
    with pytest.raises(
        UserError, match="quota of the day is used up; what is done is kept, go on tomorrow"
    ) as error:
        scores(make(workers=32), [row(i) for i in range(99)])
    assert server.total() == 1 and "\n" not in str(error.value)


def test_a_model_without_any_quota_ends_the_run_and_a_limit_of_09_does_not(serve, make):
    text = "Quota exceeded for metric: generate_content_free_tier_requests, limit: 0, model: gemini-2.5-flash"
    server = serve(lambda prompt, nth: api.failure(429, text, retry_delay="37s"))
    with pytest.raises(UserError, match="no quota for it: name another --judge-model"):
        scores(make(), [row(0)])
    assert server.total() == 1
    for number in ("0.5", "05"):
        assert waits_for(
            serve, api.failure(429, text.replace("limit: 0", f"limit: {number}"), retry_delay="9s")
        )


@pytest.mark.parametrize("end", ["/v1beta", "/v1beta/", "/v1", "/v1beta/openai/", "//"])
def test_a_version_at_the_end_of_the_address_is_taken_off(serve, make, monkeypatch, end):
    server = serve()
    monkeypatch.setenv("GEMINI_BASE_URL", server.url + end)
    assert scores(make(), [row(0)])[0]["aligned_status"] == "ok"


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><title>Error 404</title>", b"", b'{"detail": "Not Found"}']
)
def test_a_404_that_is_not_the_apis_is_an_address_and_no_key(serve, make, monkeypatch, page):
    server = serve(lambda prompt, nth: api.Response(page, 404))
    monkeypatch.setenv("GEMINI_BASE_URL", server.url)
    with pytest.raises(UserError, match="404 Not Found; is GEMINI_BASE_URL the server's address") as error:
        scores(make(), [row(0)])
    assert "_API_KEY" not in str(error.value)


def test_googles_own_name_of_the_key_counts_where_ours_is_not_set(serve, make, monkeypatch):
    serve()
    monkeypatch.setenv("GOOGLE_API_KEY", "another")
    assert scores(make(), [row(0)])[0]["aligned_status"] == "ok"
    for unset in (None, " "):
        monkeypatch.delenv("GEMINI_API_KEY") if unset is None else monkeypatch.setenv("GEMINI_API_KEY", unset)
        monkeypatch.setenv("GOOGLE_API_KEY", KEY)
        assert scores(make(), [row(1)])[0]["aligned_status"] == "ok"
