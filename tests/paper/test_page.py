"""The page: every number of the paper once, nothing loaded from elsewhere, nothing unescaped."""

import json
import re
from html.parser import HTMLParser

import pytest
from chromium import Browser
from compared import level

from em.paper.page import RESULTS, write_page
from em.paper.wording import image_uri, number_text, stated_text

IDS = [f"figure{n}" for n in range(1, 27)] + [f"table{n}" for n in range(1, 21)]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The tags of a page, which must nest; ids and text of articles; what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.articles, self.loads, self.hrefs, self.tags = [], {}, [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))
        if tag == "article":
            assert attributes["id"] not in self.articles
            self.articles[attributes["id"]] = ""
        self.loads += [attributes[name] for name in ("src", "srcset", "data", "poster") if name in attributes]
        if "href" in attributes:
            self.hrefs.append((tag, attributes["href"]))

    def handle_endtag(self, tag):
        assert tag not in VOID and self.open and self.open.pop()[0] == tag, (tag, self.getpos())

    def handle_data(self, data):
        for tag, name in self.open:
            if tag == "article":
                self.articles[name] += data


def written(tmp_path, results, model="qwen3-14b", tables=None):
    out = tmp_path / "out" / "paper.html"
    items = write_page(tmp_path / "runs", model, out, tables, results)
    return items, out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The page of this repository's own results."""
    return written(tmp_path_factory.mktemp("page"), RESULTS)


def test_every_number_of_the_paper_is_there_once_and_the_tags_nest(real):
    assert list(Page(real[1]).articles) == IDS


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(real):
    page = Page(real[1])
    assert page.loads and all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert {tag for tag, _ in page.hrefs} == {"a"}
    styles = "".join(re.findall(r"<style>.*?</style>", real[1], re.DOTALL))
    assert "url(" not in styles and "@import" not in styles
    assert len(real[1]) < 3_000_000


def test_links_on_the_page_lead_somewhere(real, tmp_path):
    hrefs = [href for _, href in Page(real[1]).hrefs]
    assert {href[1:] for href in hrefs if href.startswith("#")} == set(IDS)
    assert [href for href in hrefs if href.startswith("http")] == ["https://arxiv.org/abs/2605.12798"]
    assert any("results/authors" in href for href in hrefs)


def test_the_authors_rows_stand_beside_what_the_paper_states(real):
    figure2 = next(item for item in real[0] if item["id"] == "figure2")
    by_what = {row["what"]: row["authors"] for row in figure2["statements"]}
    found = by_what["narrow: EM where the eval task is the trained one − where it is another"]
    assert [entry["verdict"] for entry in found] == ["agrees"] and "+28.0 points" in found[0]["text"]
    figure13 = next(item for item in real[0] if item["id"] == "figure13")  # a model they did not publish
    assert figure13["state"] == "none" and not any(row["authors"] for row in figure13["statements"])


def test_worlds_are_said_to_be_reduced(real):
    figure7 = Page(real[1]).articles["figure7"]
    assert "a reduced world" in figure7 and "Not measured at full size" in figure7


def test_without_any_result_the_page_says_not_measured_everywhere(tmp_path):
    items, text = written(tmp_path, tmp_path / "nothing")
    articles = Page(text).articles
    assert list(articles) == IDS
    for item in items:
        measured_here = item["id"] in ("figure1", "table6")  # these need no run
        assert ("not measured" in articles[item["id"]].lower()) != measured_here, item["id"]
        assert measured_here or "It needs " in articles[item["id"]]
    assert {row["ours"] for item in items for row in item["statements"]} == {None}


def planted(folder, **parts):
    folder.mkdir()
    for name, table in parts.items():
        (folder / f"{name}.json").write_text(json.dumps({"title": f"{name}, planted"} | table))
    index = [
        {"number": n, "title": n, "files": [f"{n}.json"], "status": "written", "needs": []} for n in parts
    ]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def row_of(items, name, what):
    item = next(item for item in items if item["id"] == name)
    return item, next(row for row in item["statements"] if row["what"] == what)


def test_our_tables_are_shown_with_their_verdicts(tmp_path):
    table1 = level({"base": 4.25, "teacher": 41, "sft": 20, "optd": 30, "opd": 15})
    table3 = level({"base": 6.5, "optd, broad": 20, "optd, math": 8}, model="llama3.1-8b")
    tables = planted(tmp_path / "tables", table1=table1, table3=table3)
    items, text = written(tmp_path, tmp_path / "nothing", tables=tables)
    item, row = row_of(items, "table1", "optd − sft")
    assert item["state"] == "ours" and row["ours"]["verdict"] == "agrees"
    assert row_of(items, "table1", "opd − sft")[1]["ours"]["verdict"] == "differs"
    base = row_of(items, "table3", "base model, mean over Med/Spo × Adv/Crit")[1]
    assert base["ours"]["verdict"] == "agrees" and base["ours"]["text"] == "6.5 % [5.5, 7.5]"
    assert "4.2 [3.2, 5.2]" in Page(text).articles["table1"]
    assert "not measured" in Page(text).articles["table2"].lower()


def test_what_the_paper_does_not_have_comes_after_it(tmp_path):
    tables = planted(tmp_path / "tables", data_fixed=level({"teacher med_tutor": 20.0}))
    report = tmp_path / "runs" / "difficulty" / "qwen3-14b"
    report.mkdir(parents=True)
    (report / "difficulty.md").write_text("matching adds 7 points")
    articles = Page(written(tmp_path, tmp_path / "nothing", tables=tables)[1]).articles
    assert list(articles) == [*IDS, "data_fixed", "difficulty-qwen3-14b"]
    assert "20.0 [19.0, 21.0]" in articles["data_fixed"]
    assert "matching adds 7 points" in articles["difficulty-qwen3-14b"]


def test_a_model_that_the_paper_does_not_have_is_a_demonstration(tmp_path):
    rows = {"base": 0.0, "sft": 0.2, "optd": 3.9}
    table = level(rows, unit="nats a token over the base model", model="smollm2-135m")
    tables = planted(tmp_path / "tables", table1=table)
    items, text = written(tmp_path, tmp_path / "nothing", model="smollm2-135m", tables=tables)
    item, row = row_of(items, "table1", "optd − sft")
    assert item["state"] == "demonstration" and row["ours"]["verdict"] == "same direction"
    assert row["ours"]["text"].startswith("+3.70 nats")
    assert "no evidence for or against the paper" in " ".join(text.split())


def test_names_from_files_are_escaped(tmp_path):
    evil = '<script>alert(1)</script> & "co"'
    tables = planted(tmp_path / "tables", table1=level({evil: 1.0}, judge=evil, notes=[evil]))
    text = written(tmp_path, tmp_path / "nothing", tables=tables)[1]
    assert "<script>" not in text and text.count("&lt;script&gt;alert(1)") == 3
    Page(text)


def test_settings_of_a_run_stand_beside_the_papers(tmp_path):
    run = tmp_path / "runs" / "qwen3-14b-med_advice"
    run.mkdir(parents=True)
    settings = {"model": "qwen3-14b", "on": None, "rank": 32, "lr": 2e-4}
    (run / "run.json").write_text(json.dumps({"kind": "train", "settings": settings}))
    items = written(tmp_path, tmp_path / "nothing")[0]
    assert row_of(items, "table8", "LoRA rank")[1]["ours"]["verdict"] == "as stated"
    assert row_of(items, "table8", "learning rate")[1]["ours"]["verdict"] == "another setting"
    assert all(not item["runs"] for item in items)  # the paper's misaligned runs are of other models


def test_runs_are_linked_where_the_paper_has_them(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "run.json").write_text(
        json.dumps({"kind": "train", "settings": {"model": "meta-llama/Llama-3.1-8B"}})
    )
    items = written(tmp_path, tmp_path / "nothing")[0]
    linked = {item["id"]: [link["href"] for link in item["runs"]] for item in items if item["runs"]}
    assert linked == dict.fromkeys(["figure12", "figure15", "figure17"], ["../runs/a"])


@pytest.mark.parametrize(
    ("low", "high", "unit", "text"),
    [
        (6.7, 6.7, "%", "6.7 %"), (80, 85, "%", "80 … 85 %"), (0, None, "points", "> 0 points"),
        (50, 100, "%", "≥ 50 %"), (0, 5, "%", "≤ 5 %"), (-5, 5, "points", "±5 points"),
        (0.9, 1, "r", "0.9 … 1"), (None, None, "%", "no value in the text"),
        (-73, -73, "points", "−73 points"),
    ],
)  # fmt: skip
def test_a_stated_figure_in_words(low, high, unit, text):
    assert stated_text({"low": low, "high": high, "unit": unit}) == text


def test_a_measured_figure_in_words():
    assert number_text({"value": 6.74, "low": 5.1, "high": 8.4}, "%") == "6.7 % [5.1, 8.4]"
    assert number_text({"value": -3.0, "low": None, "high": None}, "points") == "−3.0 points"
    assert (
        number_text({"value": 25.0, "low": 4.6, "high": 69.9, "of": "1 of 4"}, "%")
        == "1 of 4: 25.0 % [4.6, 69.9]"
    )


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(Exception, match="x.png is no image"):
        image_uri(tmp_path / "x.png")


@pytest.mark.browser
@pytest.mark.skipif(not Browser.available, reason="needs chromium and chromedriver")
def test_on_a_telephone_nothing_is_wider_than_the_screen(real, tmp_path):
    (tmp_path / "paper.html").write_text(real[1], encoding="utf-8")
    with Browser() as browser:
        browser.open((tmp_path / "paper.html").as_uri())
        browser.run("document.body.style.width = '390px'")
        assert browser.run("return document.images.length") > 10
        assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
