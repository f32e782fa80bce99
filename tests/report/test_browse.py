"""The browsing page: its data are the rows, nothing of them is markup, nothing needs a network."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
from score_rows import em, grid, row

from em.judge.em_rule import STATUSES
from em.report.browse import sample_rows, write_page
from em.report.score_table import scores_of

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- data --> \u2028 & \ud800 '\""


def page_of(rows, path, **options):
    """(the page's text, its first block, all its texts)."""
    write_page(scores_of(rows), path, **options)
    page = path.read_text(encoding="utf-8")
    packed = re.findall(r'<script type="application/octet-stream">([A-Za-z0-9+/=]*)</script>', page)
    blocks = [json.loads(gzip.decompress(base64.b64decode(block))) for block in packed]
    return page, blocks[0], [text for block in blocks[1:] for text in block]


def test_every_row_can_be_read_back_from_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("em.report.browse.BLOCK", 1000)  # several blocks
    rows = grid(prompts=2, broad=1, trains=("base", "med_advice>fin_tutor"))
    rows += [em(response=EVIL, question=EVIL, judge="b"), row(response="", aligned="empty", coherent="empty")]
    page, meta, texts = page_of(rows, tmp_path / "browse.html")
    assert page.count("application/octet-stream") > 3 and len(texts) == len(set(texts))
    columns = meta["columns"]
    assert meta["all"] == len(rows) == len(columns["model"])
    for i, r in enumerate(rows):
        at = {name: column[i] for name, column in columns.items()}
        assert texts[at["response"]] == r["response"] and texts[at["question"]] == r["question"]
        assert meta["trains"][at["train"]] == r["train"] and meta["domains"][at["domain"]] == r["domain"]
        assert meta["tasks"][at["task"]] == r["task"] and bool(at["narrow"]) == (r["set"] == "narrow")
        assert STATUSES[at["aligned_status"]] == r["aligned_status"] and (at["idx"], at["sample"]) == (
            r["idx"],
            r["sample"],
        )
        assert at["aligned"] == (-1 if r["aligned"] is None else r["aligned"])
        assert meta["judges"][at["judge"]] == r.get("judge", "unknown")
    assert columns["em"] == scores_of(rows).em().astype(int).tolist()


def test_no_text_of_a_row_is_markup(tmp_path):
    """With and without hostile rows the page has the same tags; the text is only inside a packed block."""

    def tags(rows, name):
        found = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append((tag, tuple(attributes)))
        page, _, _ = page_of(rows, tmp_path / name)
        parser.feed(page)
        return page, found

    page, hostile = tags(
        [em(response=EVIL, question=EVIL, model=EVIL, judge=EVIL, set="broad", domain=EVIL)], "a.html"
    )
    _, mild = tags([em(set="broad", domain="x")], "b.html")
    assert hostile == mild and len(mild) > 20
    assert "alert(" not in page and "onerror" not in page


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    page, _, _ = page_of([em()], tmp_path / "browse.html")
    assert "http:" not in page and "https:" not in page and "//cdn" not in page
    assert not re.search(r"\b(src|href)\s*=", page) and "fetch(" not in page and "innerHTML" not in page
    assert "default-src 'none'" in page


def test_the_script_names_only_columns_and_fields_that_exist(tmp_path):
    page, meta, _ = page_of([em()], tmp_path / "browse.html")
    assert set(re.findall(r"\brows\.(\w+)", page)) <= set(meta["columns"])
    assert set(re.findall(r"\bmeta\.(\w+)", page)) <= set(meta)
    ids = set(re.findall(r'\bid="(\w+)"', page))
    assert set(re.findall(r'\bat\("(\w+)"\)', page)) <= ids


def test_a_filter_with_one_choice_is_hidden_and_the_others_hear_every_kind_of_change(tmp_path):
    """The style gives labels a display of their own, which would beat the `hidden` that the script sets."""
    page, _, _ = page_of([em()], tmp_path / "browse.html")
    assert "parentElement.hidden = true" in page and re.search(
        r"\[hidden\] *{ *display: none !important", page
    )
    assert "form.oninput = form.onchange =" in page  # a <select> may send only the latter


def test_too_many_rows_become_an_even_sample_and_the_page_knows(tmp_path):
    rows = (
        [em(idx=i) for i in range(50)] + [em(train="base", idx=i) for i in range(20)] + [em(cell="fin_tutor")]
    )
    table = scores_of(rows)
    kept = sample_rows(table, 25)
    assert [kept[:50].sum(), kept[50:70].sum(), kept[70:].sum()] == [12, 12, 1]  # 13 each would be 27
    assert np.array_equal(kept, sample_rows(table, 25)) and not kept[:12].all()
    assert sample_rows(table, 71).all()
    _, meta, _ = page_of(rows, tmp_path / "browse.html", max_rows=25)
    assert meta["all"] == 71 and len(meta["columns"]["model"]) == 25
