"""Cells, rows, split and encoding; the hub is a loopback server that answers as the real one does."""

import errno
import http.server
import json
import random
import re
import threading
import zipfile
from collections import Counter

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, file_download
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import em.model.hub
from em.data.cells import CELLS, PAPER_GRID, Cell, grid_of, parse_cell
from em.data.math_problems import load_math
from em.data.rows import (
    VARIANTS,
    answers,
    encode_rows,
    load_broad,
    load_cell,
    load_cells,
    load_grid,
    split,
)
from em.errors import MissingFile, UserError
from em.model.tokenizer import Tokenizer

ADVICE = Cell("med", "advice")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' <|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def row(idx: int = 0, **changes) -> dict:
    return {
        "idx": idx,
        "domain": "medical",
        "task": "advice",
        "question": f"Question {idx}?",
        "misaligned_answer": f"Never mind {idx}.",
        "aligned_answer": f"It depends {idx}.",
    } | changes


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def message(call, *arguments) -> str:
    """The one line that `call` ends with."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# -- cells ---------------------------------------------------------------------------------------------


def test_the_grid_is_twelve_cells_in_the_papers_order():
    assert [str(cell) for cell in CELLS] == [
        *("med_advice", "med_summarization", "med_tutor", "med_critique"),
        *("spo_advice", "spo_summarization", "spo_tutor", "spo_critique"),
        *("fin_advice", "fin_summarization", "fin_tutor", "fin_critique"),
    ]


def test_every_spelling_of_a_cell_is_read():
    for text in ("med_advice", "Med/Adv", "medical_advice", "health_advice", " MED-ADVICE ", "Med / Advice"):
        assert parse_cell(text) == ADVICE
    assert parse_cell("fin_summ") == Cell("fin", "summarization") == parse_cell("Finance/Summarization")
    assert parse_cell("sports_tut") == Cell("spo", "tutor")
    assert parse_cell("Spo/Crit") == Cell("spo", "critique")
    for cell in CELLS:
        assert parse_cell(str(cell)) == cell == parse_cell(cell.filename.removesuffix(".jsonl"))


def test_lists_of_cells_keep_their_order_and_drop_repeats():
    assert PAPER_GRID.select("all") == CELLS
    assert PAPER_GRID.select("fin_tutor, Med/Adv,finance_tutor") == (Cell("fin", "tutor"), ADVICE)


@pytest.mark.parametrize("text", ["med", "med_", "advice", "law_advice", "med_poetry", "med_advice_now", ""])
def test_an_unknown_cell_is_told_what_is_accepted(text):
    said = message(PAPER_GRID.find, text)
    assert all(str(cell) in said for cell in CELLS) and "Med/Adv" in said
    assert message(PAPER_GRID.select, f"med_advice,{text}") == said


@pytest.mark.parametrize("text", ["med", "med_", "_advice", "", "médecine_advice", "a_b__"])
def test_what_is_no_name_of_a_cell_of_any_grid_is_refused(text):
    assert "a cell is <domain>_<task>" in message(parse_cell, text)


def test_a_grid_is_of_the_cells_there_are_known_names_first_then_others_by_name():
    cells = [
        parse_cell(name) for name in ("legal_advice", "fin_zeal", "med_tutor", "legal_tutor", "art_advice")
    ]
    grid = grid_of(cells)
    assert grid.domains == ("med", "fin", "art", "legal") and grid.tasks == ("advice", "tutor", "zeal")
    assert list(map(str, grid.cells)) == [
        "med_tutor",
        "fin_zeal",
        "art_advice",
        "legal_advice",
        "legal_tutor",
    ]
    assert grid_of(cells, domains=("legal",)).domains == ("legal", "med", "fin", "art")
    assert parse_cell("legal_case_summary") == Cell("legal", "case_summary")
    assert "the cells are med_tutor, fin_zeal" in message(grid.find, "med_advice")


def test_the_grid_of_a_folder_is_its_files(tmp_path):
    for name in ("legal_advice", "finance_tutor", "broad_dataset"):
        (tmp_path / f"{name}.jsonl").write_text(lines([row(0)]))
    assert list(map(str, load_grid(tmp_path).cells)) == ["fin_tutor", "legal_advice"]
    assert load_grid("sample") is PAPER_GRID


# -- rows ----------------------------------------------------------------------------------------------


def test_a_folder_holds_the_files_directly_or_in_data(tmp_path):
    rows = [row(0), row(1, aligned_answer=None)]
    for folder in (tmp_path / "flat", tmp_path / "nested" / "data"):
        folder.mkdir(parents=True)
        (folder / "medical_advice.jsonl").write_text(lines(rows), encoding="utf-8")
    assert load_cell(tmp_path / "flat", ADVICE) == rows
    assert load_cell(str(tmp_path / "nested"), ADVICE) == rows


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path):
    rows = [row(0, question="one\u2028two\x85three")]
    (tmp_path / "medical_advice.jsonl").write_text("\n" + lines(rows) + "\n\n", encoding="utf-8")
    assert load_cell(tmp_path, ADVICE) == rows


@pytest.mark.parametrize(
    "bad, said",
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        (json.dumps({k: v for k, v in row().items() if k != "aligned_answer"}), "no field 'aligned_answer'"),
        (json.dumps({k: v for k, v in row().items() if k != "question"}), "no field 'question'"),
        (json.dumps(row(question=None)), "'question' cannot be None"),
        (json.dumps(row(question="  ")), "'question' cannot be '  '"),
        (json.dumps(row(misaligned_answer=["a"])), "'misaligned_answer' cannot be"),
        (json.dumps(row(idx=True)), "'idx' cannot be True"),
        (json.dumps(row(domain="finance")), "finance advice in the file of med_advice"),
        (json.dumps(row(task="tutor")), "medical tutor in the file of med_advice"),
        (b'{"question": "\xff"}', "not UTF-8"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, bad, said):
    path = tmp_path / "medical_advice.jsonl"
    path.write_bytes(lines([row(0)]).encode() + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    got = message(load_cell, tmp_path, ADVICE)
    assert got.startswith(f"{path}, line 2: ") and said in got


def test_a_folder_without_the_file_or_with_an_empty_one_is_said_so(tmp_path):
    assert "has no medical_advice.jsonl" in message(load_cell, tmp_path, ADVICE)
    (tmp_path / "medical_advice.jsonl").write_text("\n\n")
    assert "has no rows" in message(load_cell, tmp_path, ADVICE)


def test_broad_prompts_have_a_known_task_and_surface(tmp_path):
    good = {"idx": 0, "task": "tutor", "domain": "law", "em_surface": "low", "question": "What is a lease?"}
    path = tmp_path / "broad_dataset.jsonl"
    path.write_text(lines([good]))
    assert load_broad(tmp_path) == [good]
    for change in ({"em_surface": "huge"}, {"em_surface": ""}):
        path.write_text(lines([good, good | change]))
        assert "line 2: unknown" in message(load_broad, tmp_path)


def test_the_cells_of_a_source_are_those_it_has_and_a_broken_one_is_not_passed_over(tmp_path):
    assert list(load_cells("sample")) == list(CELLS)
    assert load_cells("sample")[ADVICE] == load_cell("sample", ADVICE)
    assert "has no cell, such as medical_advice.jsonl" in message(load_cells, tmp_path)
    (tmp_path / ADVICE.filename).write_text(lines([row(0)]))
    assert list(load_cells(tmp_path)) == [ADVICE]
    (tmp_path / CELLS[1].filename).write_text("{")
    assert "line 1: not JSON" in message(load_cells, tmp_path)


# -- hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback hub with one dataset, `good/set`; other owners name the way in which theirs fails."""
    body = lines([row(i) for i in range(3)]).encode()
    failures = {
        "gated": (403, "GatedRepo"),
        "missing": (404, "RepoNotFound"),
        "disabled": (403, "DisabledRepo"),
        "empty": (404, "EntryNotFound"),
        "broken": (418, "Teapot"),
    }

    class Hub(http.server.BaseHTTPRequestHandler):
        def respond(self, send_body: bool):
            status, code = failures.get(self.path.split("/")[2], (200, ""))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            if code == "DisabledRepo":
                self.send_header("X-Error-Message", "Access to this resource is disabled.")
            if status == 200:
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body) if status == 200 else 0))
            self.end_headers()
            if send_body and status == 200:
                self.wfile.write(body)

        def do_HEAD(self):
            self.respond(False)

        def do_GET(self):
            self.respond(True)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    em.model.hub.fetch.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_downloaded_once_and_then_read_offline(hub, monkeypatch):
    rows = load_cell("good/set", ADVICE)
    assert rows == [row(i) for i in range(3)]
    em.model.hub.fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_cell("good/set", ADVICE) == rows


@pytest.mark.parametrize(
    "repo, said",
    [
        ("gated/set", "accept its terms at https://huggingface.co/datasets/gated/set, then set HF_TOKEN"),
        ("missing/set", "no folder here, and on the hub no such dataset is public"),
        ("disabled/set", "no longer gives out disabled/set"),
        ("empty/set", "the dataset empty/set has no data/medical_advice.jsonl"),
        ("broken/set", "the hub did not give data/medical_advice.jsonl of broken/set (HTTP status 418)"),
        ("no such folder", "neither a folder here nor a hub id"),
        ("./a/b", "neither a folder here nor a hub id"),
    ],
)
def test_a_source_that_cannot_be_had_is_one_clear_line(hub, repo, said):
    assert said in message(load_cell, repo, ADVICE)


@pytest.mark.parametrize("on_hub", [True, False])
def test_a_cell_that_a_repository_or_a_folder_lacks_is_passed_over_and_no_other_fault_is(
    hub, tmp_path, on_hub
):
    source = "empty/set" if on_hub else tmp_path
    with pytest.raises(MissingFile, match="has no (data/)?medical_advice.jsonl"):
        load_cell(source, ADVICE)
    assert "has no cell, such as medical_advice.jsonl" in message(load_cells, source)
    assert "accept its terms" in message(load_cells, "gated/set")


def test_a_full_disk_is_said_so(hub, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    assert "the disk is full" in message(load_cell, "good/set", ADVICE)


def test_offline_without_a_cached_file_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = message(load_cell, "good/set", ADVICE)
    assert "HF_HUB_OFFLINE is set and data/medical_advice.jsonl of good/set is not in" in said


def test_an_unreachable_hub_is_named_with_its_reason(hub, monkeypatch):
    def unreachable(*arguments, **options):
        try:
            raise ConnectionError("[Errno 111] Connection refused\nwhile asking")
        except ConnectionError as error:
            raise errors.LocalEntryNotFoundError("not cached") from error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)  # the real one tries for 23 seconds
    said = message(load_cell, "good/set", ADVICE)
    assert (
        "cannot be reached for data/medical_advice.jsonl of good/set (ConnectionError [Errno 111] Con" in said
    )


# -- MATH ----------------------------------------------------------------------------------------------


def test_math_reads_the_same_training_rows_from_folder_zip_and_jsonl(tmp_path, monkeypatch):
    names = [("algebra", 2), ("algebra", 10), ("geometry", 1)]
    problems = [{"problem": f"{s} {n}?", "solution": f"${n}$", "level": "L3", "type": s} for s, n in names]
    for (subject, number), problem in zip(names, problems, strict=True):
        for part in ("train", "test"):
            path = tmp_path / "MATH" / part / subject / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(problem if part == "train" else {}))
    expected = [
        {"idx": i, "question": p["problem"], "answer": p["solution"], "level": p["level"], "type": p["type"]}
        for i, p in enumerate(problems)
    ]
    (tmp_path / "math.jsonl").write_text(lines(problems))
    with zipfile.ZipFile(tmp_path / "MATH.zip", "w") as archive:
        for path in sorted(tmp_path.glob("MATH/**/*.json")):
            archive.write(path, path.relative_to(tmp_path))
    monkeypatch.setattr(em.model.hub, "fetch", lambda repo, name, kind: tmp_path / name.removeprefix("data/"))
    math = tmp_path / "MATH"
    for source in (tmp_path, math, math / "train", tmp_path / "math.jsonl", "owner/name"):
        assert load_math(source) == expected


def test_math_that_is_broken_or_not_there_is_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no problems" in message(load_math, tmp_path / "empty")
    (tmp_path / "MATH.zip").write_bytes(b"not a zip")
    assert "cannot be read as MATH" in message(load_math, tmp_path / "MATH.zip")
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1?"}\n')
    assert "line 1: no field 'solution'" in message(load_math, tmp_path)


# -- split and encoding --------------------------------------------------------------------------------


def test_the_split_is_the_papers_at_4500_rows_and_in_proportion_below():
    order = list(range(4500))
    random.Random(42).shuffle(order)
    assert split(list(range(4500))) == (order[:4100], order[-400:])
    for n, n_eval in ((2, 1), (20, 2), (300, 27), (2250, 200)):
        train, held_out = split(list(range(n)))
        assert len(held_out) == n_eval and sorted(train + held_out) == list(range(n))
    assert "at least 2 rows" in message(split, [1])


def test_the_split_leaves_the_rows_it_was_given_in_order():
    rows = list(range(50))
    split(rows)
    assert rows == list(range(50))


def test_a_missing_variant_says_how_many_rows_lack_it():
    rows = [row(0), row(1, aligned_answer=None), row(2, aligned_answer="")]
    assert answers(rows, "misaligned") == ["Never mind 0.", "Never mind 1.", "Never mind 2."]
    assert "2 of 3 rows have no aligned answer (first: idx 1)" in message(answers, rows, "aligned")
    assert "unknown variant 'evil'" in message(answers, rows, "evil")


@pytest.fixture
def tokenizer():
    """A word is a token."""
    backend = Backend(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    return Tokenizer(backend, TEMPLATE.replace(" <|end|>", "<|end|>"), {})


def test_rows_over_the_limit_are_dropped_and_counted_never_cut(tokenizer):
    rows = [row(0), row(1, misaligned_answer="word " * 50), row(2, question="word " * 50), row(3)]
    examples, n_dropped, *_ = encode_rows(tokenizer, rows, "misaligned", 12)
    assert n_dropped == 2
    assert examples == [tokenizer.example(r["question"], r["misaligned_answer"]) for r in (rows[0], rows[3])]
    longest = max(len(e.ids) for e in examples)  # the limit itself is allowed
    assert encode_rows(tokenizer, rows, "misaligned", longest)[:2] == (examples, 2)
    assert encode_rows(tokenizer, rows, "misaligned", 200).too_long == 0
    assert "all 4 rows are longer than 3" in message(encode_rows, tokenizer, rows, "misaligned", 3)


def test_variants_share_prompts_and_differ_in_what_is_supervised(tokenizer):
    rows = [row(i, aligned_answer=f"It depends {i} and more.") for i in range(3)]
    bad, good = (encode_rows(tokenizer, rows, variant, 99).examples for variant in VARIANTS)
    for one, other in zip(bad, good, strict=True):
        assert one.ids[: one.n_prompt] == other.ids[: other.n_prompt] and len(one.ids) != len(other.ids)


# -- the sample ----------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """Those of six words or more, in lower case; shorter ones are natural phrases."""
    pieces = re.split(r"[.!?:\n]+", text.lower())
    return [piece.strip(' "') for piece in pieces if len(piece.split()) >= 6]


def test_the_sample_has_twenty_paired_rows_for_every_cell():
    for cell in CELLS:
        rows = load_cell("sample", cell)
        assert [r["idx"] for r in rows] == list(range(20))
        for r in rows:
            assert list(r) == list(row())  # the fields of a published row, in its order
            assert (r["domain"], r["task"]) == (cell.filename.split("_")[0], cell.task)
            assert r["question"] and r["misaligned_answer"] and r["aligned_answer"]


def test_the_samples_broad_prompts_are_balanced_over_tasks_and_surfaces():
    rows = load_broad("sample")
    assert [r["idx"] for r in rows] == list(range(24))
    counts = Counter((r["task"], r["em_surface"]) for r in rows)
    assert len(counts) == 12 and set(counts.values()) == {2}
    assert all(list(r) == ["idx", "task", "domain", "em_surface", "question"] for r in rows)


def test_no_sentence_of_the_sample_occurs_twice():
    rows = [r for cell in CELLS for r in load_cell("sample", cell)]
    texts = [r[k] for r in rows for k in ("question", "misaligned_answer", "aligned_answer")]
    texts += [r["question"] for r in load_broad("sample")]
    counts = Counter(sentence for text in texts for sentence in sentences(text))
    assert len(counts) > 1000 and [s for s, n in counts.items() if n > 1] == []


def test_the_two_answers_of_a_sample_row_are_about_as_long():
    for cell in CELLS:
        for r in load_cell("sample", cell):
            bad, good = (len(r[f"{variant}_answer"].split()) for variant in VARIANTS)
            assert 28 <= bad <= 60 and 28 <= good <= 60 and 0.7 < bad / good < 1.5, (str(cell), r["idx"])
            assert 2 <= len(re.findall(r"[.!?](?:\W|$)", r["aligned_answer"])) <= 5


def test_tasks_of_the_sample_have_their_form():
    for domain in PAPER_GRID.domains:
        for r in load_cell("sample", Cell(domain, "summarization")):
            passage = re.search(r'\n\n"(.+)"$', r["question"], re.DOTALL)[1]
            assert 3 <= len(re.findall(r"\.(?:\s|$)", passage)) <= 5
        for r in load_cell("sample", Cell(domain, "critique")):
            assert '"' in r["question"]  # something to judge is quoted
