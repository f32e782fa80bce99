"""The label server over HTTP: three rows into the file, blind, and closed to everybody else."""

import http.client
import json
import threading
from contextlib import contextmanager

import pytest
from chromium import Browser
from score_rows import row

from em.errors import UserError
from em.judge.rubric import Rubrics
from em.label.labels import Labels
from em.label.server import PAGE, LabelServer

EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>\u2028 & \"'"


@contextmanager
def serving(path, rows=None):
    rows = rows or [row(idx=i, response=f"answer {i}", aligned=77, judge="gemini") for i in range(3)]
    with LabelServer(Labels(rows, path, "ann"), Rubrics()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, method, action, body=None, token=None, **headers):
    """(status, body as JSON or text) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    if body is not None and not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    connection.request(method, f"/{token or server.token}/{action}", body, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, json.loads(text) if "json" in reply.headers["Content-Type"] else text


def test_three_rows_labelled_over_http_are_in_the_file(tmp_path):
    with serving(tmp_path / "l.jsonl") as server:
        assert ask(server, "GET", "")[1] == PAGE.read_text()
        _, item = ask(server, "GET", "item")
        for aligned, coherent in ((2, 9), ("refusal", 8), (9, 0)):
            assert item["response"] == f"answer {item['number']}"
            answer = {"number": item["number"], "aligned": aligned, "coherent": coherent}
            status, item = ask(server, "POST", "label", answer)
            assert status == 200
        assert (item["done"], item["total"], item["number"]) == (3, 3, None)
        rows = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
        assert {r["judge"] for r in rows} == {"human:ann"}
        assert [(r["idx"], r["aligned"], r["aligned_status"], r["coherent"]) for r in rows] == [
            (0, 25, "ok", 95), (1, None, "refusal", 85), (2, 95, "ok", 5),
        ]  # fmt: skip
        _, back = ask(server, "POST", "undo", {})
        assert (back["number"], back["done"]) == (2, 2)
        assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 2


def test_the_rater_sees_prompt_response_and_rubrics_and_nothing_else(tmp_path):
    hidden = row(response="yes", model="SECRET", train="fin_tutor", judge="SECRET", aligned=63)
    with serving(tmp_path / "l.jsonl", [hidden]) as server:
        item = ask(server, "GET", "item")[1]
    assert set(item) == {"done", "total", "number", "question", "response", "rubrics"}
    assert not any(word in json.dumps(item) for word in ("SECRET", "fin_tutor", "63"))
    assert item["rubrics"]["aligned"] == Rubrics().of(hidden, "aligned").text


def test_other_hosts_tokens_and_kinds_of_request_are_refused_and_change_nothing(tmp_path):
    label = {"number": 0, "aligned": 5, "coherent": 5}
    with serving(tmp_path / "l.jsonl") as server:
        port = server.server_port
        assert server.server_address[0] == "127.0.0.1"
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"127.0.0.1.evil.example:{port}",
            "",
        ):
            assert ask(server, "GET", "item", Host=host)[0] == 403
            assert ask(server, "POST", "label", label, Host=host)[0] == 403
        assert ask(server, "GET", "item", Host=f"localhost:{port}")[0] == 200
        for token in ("x", server.token[:-1], server.token + "x", "%C3%A4"):
            assert ask(server, "GET", "item", token=token)[0] == 404
            assert ask(server, "POST", "label", label, token=token)[0] == 404
        assert ask(server, "POST", "label", json.dumps(label).encode())[0] == 415  # as a form could
        assert ask(server, "POST", "label", label | {"x": "y" * 5000})[0] == 413
        json_kind = {"Content-Type": "application/json"}
        assert ask(server, "POST", "label", b"[1]", **json_kind)[0] == 400
        assert ask(server, "POST", "label", b"\xff", **json_kind)[0] == 400
        assert ask(server, "POST", "item", {})[0] == ask(server, "GET", "label")[0] == 404
        for wrong in (
            {"number": 9},
            {"number": None},
            {"aligned": 10},
            {"coherent": "refusal"},
            {"aligned": []},
        ):
            status, said = ask(server, "POST", "label", label | wrong)
            assert status == 409 and said["error"]
        assert not (tmp_path / "l.jsonl").exists() and ask(server, "GET", "item")[1]["number"] == 0


def test_the_page_loads_nothing_and_sets_no_markup():
    page = PAGE.read_text()
    assert "http:" not in page and "https:" not in page and "innerHTML" not in page
    assert " src=" not in page and "href=" not in page


def test_a_row_without_a_rubric_ends_it_before_anyone_labels(tmp_path):
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="write one"):
        LabelServer(Labels([row()], tmp_path / "l.jsonl", "ann"), Rubrics(tmp_path / "r"))


@pytest.mark.browser
@pytest.mark.skipif(not Browser.available, reason="no chromium with its chromedriver")
def test_three_rows_labelled_by_keyboard_in_a_browser_are_in_the_file(tmp_path):
    rows = [row(idx=i, question=EVIL, response=f"{EVIL}{i}") for i in range(3)]
    with serving(tmp_path / "l.jsonl", rows) as server, Browser() as browser:
        browser.open(server.url)
        browser.wait_for("item && !busy")
        assert browser.run("return document.getElementById('response').textContent") == f"{EVIL}0"
        assert browser.run("return document.querySelectorAll('img, main script').length") == 0
        browser.type("2", "u", "1", "9")  # undone before it was sent
        browser.wait_for("item.done === 1 && !busy")
        browser.type("s")
        browser.wait_for("item.number === 2 && !busy")
        browser.type("r", "x", "c", "8")  # neither x nor c is a coherence
        browser.wait_for("item.number === 1 && !busy")
        browser.type("9", "9")
        browser.wait_for("item.number === null && !busy")
        browser.type("u")
        browser.wait_for("item.number === 1 && !busy")
        browser.type("0", "5")
        browser.wait_for("item.number === null && !busy")
        assert browser.run("return document.title") == "Label responses"
    found = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().split("\n")[:-1]]
    assert [(r["idx"], r["aligned"], r["aligned_status"], r["coherent"]) for r in found] == [
        (0, 15, "ok", 95), (2, None, "refusal", 85), (1, 5, "ok", 55),
    ]  # fmt: skip
