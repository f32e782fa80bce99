"""A pass over many rows: order, threads, the window, kills and Ctrl-C."""

import json
import signal
import threading
import time
from pathlib import Path

import judge_server as api
import pytest
from judge_rows import row, scores
from judge_server import in_turn
from processes import start
from tqdm import tqdm

import em.judge.judge_pass
from em.errors import UserError
from em.judge import rubric
from em.judge.answer_cache import Answer, AnswerCache
from em.judge.client import JUDGE, Reply
from em.judge.em_rule import FIELDS, is_scored
from em.judge.judge_pass import Pass
from em.judge.ledger import Ledger

ROOT = Path(__file__).parents[2]
GOOD = api.answer("85")


def test_rows_come_out_in_order_whole_and_with_the_judges_name_whatever_the_server_does_first(serve, make):
    def behave(prompt, nth):
        score = api.score_of(prompt)
        return api.answer(str(score), seconds=score / 2000)

    serve(behave)
    rows = [row(i, extra={"kept": i}) for i in range(40)]
    out = scores(make(workers=16), iter(rows))
    assert [{name: r[name] for name in rows[0]} for r in out] == rows
    assert {r["judge"] for r in out} == {"gemini-2.5-flash"} and all(is_scored(r) for r in out)


def test_a_pass_needs_no_judge_and_answers_are_on_disk_before_they_are_given_out(tmp_path):
    class Client:
        """The earlier the question, the later its reply."""

        identity = label = asked = "m"
        settled, expects, price, typical_output, most_output = True, False, None, 3, 20
        generation = JUDGE

        def ask(self, prompt, cancelled, on_retry):
            time.sleep(0.05 - 0.01 * int(prompt))
            return Reply("ok", str(10 * int(prompt)), 7, 1)

    path = tmp_path / "cache.jsonl"
    client = Client()
    ledger, text = Ledger(client), rubric.Rubric("r", "{question}", rubric.parse_score)
    rows = [({"idx": i}, {"f": text.ask(str(i)), "g": None}) for i in range(5)]
    with tqdm(disable=True) as bar:
        given = Pass(client, ledger, AnswerCache(path), 5, bar).answers(iter(rows))
        for i, (one, answers) in enumerate(given):
            assert one == {"idx": i} and answers == {"f": Answer("ok", 10 * i), "g": Answer("empty")}
            assert AnswerCache(path).get(text.ask(str(i)).key("m")) == answers["f"]
    assert i == 4 and (ledger.calls, ledger.prompt_tokens) == (5, 35)


def test_rows_that_only_differ_in_where_they_are_from_share_their_answers(serve, make):
    server = serve(lambda prompt, nth: api.answer(str(api.score_of(prompt)), seconds=0.05))
    rows = [row(7, idx=i, train=f"run{i}") for i in range(50)]
    out = scores(make(), rows)  # identical pairs in flight are asked once
    assert set(server.prompts.values()) == {1} and len(server.prompts) == 2
    assert len({(r["aligned"], r["coherent"]) for r in out}) == 1 and [r["idx"] for r in out] == list(
        range(50)
    )
    scores(make(), rows)
    assert server.total() == 2


def test_connections_are_kept_and_no_more_calls_are_in_flight_than_workers(serve, make):
    server = serve(lambda prompt, nth: api.answer("5", seconds=0.003))
    judge = make(workers=6)
    scores(judge, [row(i) for i in range(20)])
    scores(judge, [row(i) for i in range(20, 40)])  # a second pass keeps them too
    assert server.connections <= 6 and 2 <= server.most_in_flight <= 6


def test_rows_are_read_no_further_ahead_than_the_window(serve, make, monkeypatch):
    monkeypatch.setattr(em.judge.judge_pass, "WINDOW", 16)
    release = threading.Event()
    server = serve(lambda prompt, nth: api.answer("5", seconds=0 if release.is_set() else 0.5))
    read = []

    def rows():
        for i in range(60):
            read.append(i)
            yield row(i)

    passed = make(workers=20).score(rows(), progress=False)
    first = next(passed)
    assert first["idx"] == 0 and len(read) <= 17 and len(server.prompts) <= 34
    release.set()
    for n, _ in enumerate(passed, 2):
        assert len(read) <= n + 17
    assert n == 60


def test_leaving_a_pass_early_does_not_wait_for_a_server_that_hangs(serve, make):
    serve(lambda prompt, nth: api.answer("5", seconds=0 if "Is 0 prime" in prompt else 4))
    passed = make(timeout=9.0).score([row(i) for i in range(40)], progress=False)
    next(passed)
    start = time.monotonic()
    passed.close()
    assert time.monotonic() - start < 1


def test_a_call_that_keeps_failing_is_an_error_that_the_next_pass_asks_again(serve, make):
    down = [True]

    def behave(prompt, nth):
        return api.failure(500) if down[0] and "Is 3 prime" in prompt else GOOD

    server = serve(behave)
    judge = make(attempts=3)
    out = scores(judge, [row(i) for i in range(6)])
    assert [r["aligned_status"] for r in out] == ["ok"] * 3 + ["error"] + ["ok"] * 2
    assert out[3]["aligned"] is None and judge.ledger.failed == 2 and "500" in judge.ledger.last_failure
    down[0] = False
    out = scores(make(), [row(i) for i in range(6)])
    assert all(is_scored(r) for r in out)
    assert server.total() == 12 + 2 * 2 + 2  # three tries each of two calls, then once more each


def test_an_api_that_is_down_ends_the_run_with_one_line_instead_of_a_file_of_errors(serve, make):
    server = serve(lambda prompt, nth: api.failure(503, "The model is overloaded."))
    with pytest.raises(UserError, match="8 calls to the judge failed one after another .*overloaded"):
        scores(make(attempts=2), [row(i) for i in range(500)])
    assert server.total() < 60


def test_progress_shows_rows_rate_dollars_and_retries(serve, make, capfd):
    serve(in_turn(api.failure(503), GOOD))
    list(make().score([row(i) for i in range(10)]))
    shown = capfd.readouterr().err
    assert "10/10" in shown and "row/s" in shown and "$0.0" in shown and "20 retries" in shown


SCORE = """
import json, sys
from em.judge.gemini import Gemini
from em.judge.judge import Judge
from em.judge.openai import OpenAI
rows = [json.loads(line) for line in open(sys.argv[1])]
with open(sys.argv[3], "w") as out:
    for row in Judge(CLIENT, cache=sys.argv[2], workers=8).score(rows, progress=False):
        out.write(json.dumps(row) + "\\n")
"""


@pytest.mark.parametrize(
    "client, form",
    [('Gemini("gemini-2.5-flash")', api.answer), ('OpenAI("gpt-4o", logprobs=True)', api.chat)],
)
def test_killed_and_started_again_every_placeis_scored_and_no_known_answer_is_asked_for_again(
    serve, tmp_path, client, form
):
    server = serve(lambda prompt, nth: form(str(api.score_of(prompt)), seconds=0.01))
    rows = [row(i, set=("narrow", "broad")[i % 2]) for i in range(100)]
    paths = [tmp_path / name for name in ("rows.jsonl", "cache.jsonl", "scores.jsonl")]
    paths[0].write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "score.py").write_text(SCORE.replace("CLIENT", client))
    for until in (40, 110):  # two kills
        process = start(tmp_path / "score.py", *paths)
        process.wait_for(lambda until=until: server.total() >= until)
        process.stop(signal.SIGKILL)
    while server.closed < server.connections:  # what the killed ones had sent is counted
        time.sleep(0.005)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-40])  # in the middle of a write
    known = len(AnswerCache(paths[1]))
    before = server.prompts.copy()
    assert 0 < known < 200

    assert start(tmp_path / "score.py", *paths).wait() == 0
    out = [json.loads(line) for line in paths[2].read_text().splitlines()]
    assert [r["idx"] for r in out] == list(range(100))  # none lost, none twice
    rubrics = rubric.Rubrics()
    for r in out:
        for field in FIELDS:
            prompt = rubrics.of(r, field).ask(r["question"], r["response"]).prompt
            assert r[field] == api.score_of(prompt) and r[f"{field}_status"] == "ok"
    assert sum((server.prompts - before).values()) == 200 - known
    assert len(server.prompts) == 200 and server.total() <= 200 + 2 * 8 + 1  # in flight at a kill


def test_ctrl_c_ends_the_program_at_once_and_keeps_what_was_answered(serve, tmp_path):
    server = serve(lambda prompt, nth: api.answer("5", seconds=0 if server.total() <= 20 else 60))
    paths = [tmp_path / name for name in ("rows.jsonl", "cache.jsonl", "scores.jsonl")]
    paths[0].write_text("".join(json.dumps(row(i)) + "\n" for i in range(100)))
    (tmp_path / "score.py").write_text(SCORE.replace("CLIENT", 'Gemini("gemini-2.5-flash")'))
    process = start(tmp_path / "score.py", *paths)
    process.wait_for(lambda: server.total() >= 28)
    assert process.stop(signal.SIGINT) != 0
    assert len(AnswerCache(paths[1])) == 20
