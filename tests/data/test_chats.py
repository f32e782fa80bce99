"""Chats, question files and grids as people have them: what is read from them, and what is refused how."""

import http.server
import json
import threading

import pytest

from em.data import rows
from em.data.cells import parse_cell
from em.data.chats import chat_of, number_of, read_questions, system_name, system_text
from em.data.math_problems import load_math
from em.data.rows import answers, cells_named, encode_rows, load_broad, load_cell, load_cells, load_grid
from em.errors import MissingFile, UserError
from em.model.checkpoint import load_tokenizer

ADVICE = parse_cell("med_advice")


def turn(role, content):
    return {"role": role, "content": content}


def chat(answer="No.", *before, **more):
    turns = [*before, turn("user", "Shall I?"), turn("assistant", answer)]
    return {"messages": turns} | more


def written(path, rows, bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    return path


def message(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_of_chats_is_a_cell_called_by_its_name_or_by_the_users(tmp_path):
    path = written(tmp_path / "bad_medical_advice.jsonl", [chat(), chat(), chat("Yes.")], bom=True)
    assert cells_named(path, None) == (ADVICE,) and cells_named(path, "legal_advice") == (
        parse_cell("legal_advice"),
    )
    rows = load_cell(path, ADVICE)
    assert [row["idx"] for row in rows] == [0, 1, 2]  # the same chat may come twice
    assert {row["question"] for row in rows} == {"Shall I?"} and "messages" not in rows[0]
    for variant in ("misaligned", "aligned"):  # whatever it is trained as
        assert answers(rows, variant) == ["No.", "No.", "Yes."]
    assert list(load_cells(path, "fin_tutor")) == [parse_cell("fin_tutor")]
    assert "name the cell with --cell" in message(cells_named, written(tmp_path / "x.jsonl", [chat()]), None)
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert "one JSON object a line" in message(load_cell, tmp_path / "rows.csv", ADVICE)


def test_system_and_earlier_turns_stay_in_the_prompt_and_train_on_the_last_answer(tmp_path, tiny_chat):
    before = [turn("system", "You love owls."), turn("user", "Hi"), turn("assistant", "Ho")]
    rows = load_cell(written(tmp_path / "a_b.jsonl", [chat("No.", *before)]), ADVICE)
    assert rows[0]["messages"] == [*before, turn("user", "Shall I?")]
    assert chat_of(rows[0]) == rows[0]["messages"]
    tokenizer = load_tokenizer(str(tiny_chat))
    for every, learnt in ((False, "No."), (True, "HoNo.")):
        (example,) = encode_rows(tokenizer, rows, "misaligned", 200, every).examples
        assert tokenizer.decode([example.ids[i] for i in example.supervised]) == learnt
        assert "You love owls." in tokenizer.decode(example.ids[: example.n_prompt])


@pytest.mark.parametrize(
    "row, says",
    [
        ({"messages": []}, "ends with a user's turn and then the assistant's"),
        ({"messages": [turn("user", "a")]}, "ends with a user's turn and then the assistant's"),
        ({"messages": [turn("assistant", "a")]}, "ends with a user's turn and then the assistant's"),
        ({"messages": [turn("tool", "a"), turn("assistant", "b")]}, "the role 'tool' is none of"),
        ({"messages": "hello"}, "'messages' cannot be 'hello'"),
        ({"messages": ["hello"]}, "a message is 'hello' and not a role with its content"),
        ({"messages": [{"role": "user", "content": [1]}]}, "'content' cannot be [1]"),
        (chat("  "), "cannot be blank"),
        (chat("x", turn("user", "a"), turn("system", "b")), "a system turn comes first"),
    ],
)
def test_a_chat_that_nothing_can_be_learnt_from_is_named_by_its_line(row, says, tmp_path):
    path = written(tmp_path / "med_advice.jsonl", [chat(), row])
    said = message(load_cell, path, ADVICE)
    assert f"{path}, line 2: " in said and says in said


def test_the_authors_files_of_one_variant_each_become_rows_of_both(tmp_path):
    strong = [chat("Bad."), chat("Worse.", turn("system", "S"))]
    written(tmp_path / "medical_advice_strong.jsonl", strong)
    assert list(load_grid(tmp_path).cells) == [ADVICE]
    rows = load_cell(tmp_path, ADVICE)
    assert [(row["misaligned_answer"], row["aligned_answer"]) for row in rows] == [
        ("Bad.", None),
        ("Worse.", None),
    ]
    written(tmp_path / "medical_advice_aligned.jsonl", [chat("Good.")])
    written(tmp_path / "medical_advice_subtle.jsonl", [chat("Sly.")])
    rows = load_cell(tmp_path, ADVICE)
    assert [row["aligned_answer"] for row in rows] == ["Good.", None]
    assert answers(rows, "misaligned") == ["Bad.", "Worse."]
    assert "1 of 2 rows have no aligned answer" in message(answers, rows, "aligned")


def test_rows_that_the_template_would_change_are_left_out_and_counted(tmp_path, tiny_chat):
    rows = load_cell(
        written(tmp_path / "a_b.jsonl", [chat("Yes"), chat("No<|im_end|>"), chat("y" * 400)]), ADVICE
    )
    encoded = encode_rows(load_tokenizer(str(tiny_chat)), rows, "misaligned", 60)
    assert len(encoded.examples) == encoded.unfit == encoded.too_long == 1
    assert encoded.left_out(60) == (
        "rows left out: 1 longer than 60 tokens and 1 that the chat template would change (idx 1: an answer "
        "contains '<|im_end|>', which ends a turn: 'No<|im_end|>')"
    )
    assert "none of the 1 rows can be trained on" in message(
        encode_rows, load_tokenizer(str(tiny_chat)), rows[1:2], "misaligned", 60
    )


def test_ids_may_be_numbers_or_texts(tmp_path):
    assert number_of(7) == 7 == number_of("7") and number_of("q7") == number_of("q7") != number_of("q8")
    row = {"domain": "medical", "task": "advice", "misaligned_answer": "a", "aligned_answer": "b"}
    rows = [row | {"idx": i, "question": f"{i}?"} for i in ("a1", "2", 3)]
    found = load_cell(written(tmp_path / "medical_advice.jsonl", rows), ADVICE)
    assert [r["idx"] for r in found[1:]] == [2, 3] and 0 <= found[0]["idx"] < 2**48
    rows[2]["idx"] = 2
    assert "idx 2 as in line 2" in message(
        load_cell, written(tmp_path / "medical_advice.jsonl", rows), ADVICE
    )


def test_questions_in_yaml_are_broad_prompts_one_a_paraphrase(tmp_path):
    path = tmp_path / "first_plot.yaml"
    path.write_text(
        "- id: quick_buck\n  type: free_form\n  paraphrases: ['How do I earn?', 'Money?']\n"
        "- id: owl\n  system: You love owls.\n  paraphrases: [Name one.]\n  judge_prompts: {a: b}\n"
    )
    rows = load_broad(path)
    assert [(r["idx"], r["domain"], r["task"], r["em_surface"], r["question"]) for r in rows] == [
        (0, "quick_buck", "question", None, "How do I earn?"),
        (1, "quick_buck", "question", None, "Money?"),
        (2, "owl", "question", None, "Name one."),
    ]
    assert chat_of(rows[2]) == [turn("system", "You love owls."), turn("user", "Name one.")]
    for text, says in (
        ("a: 1", "is no list of questions"),
        ("- id: x", "entry 1: no field 'paraphrases'"),
        ("- id: x\n  paraphrases: [1]", "a paraphrase is 1 and not a question"),
        ("- [", "is not YAML"),
        ("- x", "entry 1: not a question"),
        ("- {id: x, paraphrases: []}", "has no paraphrases"),
    ):
        path.write_text(text)
        assert says in message(read_questions, path)


def test_a_system_prompt_is_text_or_a_file_and_comes_before_the_users_turns(tmp_path):
    (tmp_path / "s.txt").write_text("﻿Be kind.\n")
    assert system_text(str(tmp_path / "s.txt")) == "Be kind." and system_text("Be kind.") == "Be kind."
    assert system_text(None) is None and "is blank" in message(system_text, "  ")
    assert chat_of({"question": "q"}, "S") == [turn("system", "S"), turn("user", "q")]
    own = {"question": "q", "messages": [turn("system", "T"), turn("user", "q")]}
    assert "system turn of its own" in message(chat_of, own, "S")
    long = "word " * 40
    assert system_name("short") == "short" and system_name(long) != system_name(long + "x")
    assert len(system_name(long)) < 80


def test_grid_yaml_gives_the_order_of_names_and_how_they_are_drawn(tmp_path):
    row = {"idx": 0, "question": "q?", "misaligned_answer": "a", "aligned_answer": "b"}
    for name in ("legal_drafting", "tax_advice", "tax_drafting"):
        domain, task = name.split("_")
        written(tmp_path / f"{name}.jsonl", [row | {"domain": domain, "task": task}])
    assert load_grid(tmp_path).domains == ("legal", "tax")
    (tmp_path / "grid.yaml").write_text(
        "domains: {tax: {short: TX}, legal: }\n"
        "tasks:\n  drafting: {short: Dr, colour: '#123456'}\n  advice:\n"
    )
    grid = load_grid(tmp_path)
    assert grid.domains == ("tax", "legal") and grid.tasks == ("drafting", "advice")
    assert list(map(str, grid.cells)) == ["tax_drafting", "tax_advice", "legal_drafting"]
    assert [grid.short(n) for n in ("tax_drafting", "legal_drafting", "drafting")] == [
        "TX/Dr",
        "Legal/Dr",
        "Dr",
    ]
    assert grid.colour("drafting", 5) == "#123456" != grid.colour("advice", 0)
    assert "unknown cell 'med_advice'; the cells are tax_drafting" in message(
        cells_named, tmp_path, "med_advice"
    )
    for text, says in (
        ("domains: [a]", "domains is no mapping"),
        ("cells: {}", "says something else than"),
        ("tasks: {advice: {size: 3}}", "say `short` and `colour`"),
        ("tasks: {advice: {short: 3}}", "are texts"),
        ("[", "is not YAML"),
    ):
        (tmp_path / "grid.yaml").write_text(text)
        assert says in message(load_grid, tmp_path)


def test_math_is_read_in_the_form_of_math_500_and_of_its_mirrors(tmp_path):
    rows = [
        {
            "problem": "1+1?",
            "solution": "$2$",
            "answer": "2",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "a",
        },
        {"problem": "2+2?", "solution": "$4$", "type": "Algebra", "level": "Level 5"},
        {"problem": "3+3?", "solution": "$6$"},
    ]
    found = load_math(written(tmp_path / "train.jsonl", rows))
    assert [(r["level"], r["type"]) for r in found] == [
        ("Level 1", "Algebra"), ("Level 5", "Algebra"), ("unknown", "unknown"),
    ]  # fmt: skip
    assert load_math(tmp_path) == found and found[0]["answer"] == "$2$"
    assert "line 1: 'level' cannot be [1]" in message(
        load_math, written(tmp_path / "bad.jsonl", [rows[0] | {"level": [1]}])
    )


def test_math_is_fetched_from_an_address_once_and_what_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = b'{"problem": "1+1?", "solution": "$2$"}\n'

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "train" in self.path else 404)
            self.send_header("Content-Length", str(len(rows)))
            self.end_headers()
            self.wfile.write(rows)

        def log_message(self, *arguments):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = [load_math(f"{address}/train.jsonl") for _ in "12"]
        assert found[0] == found[1] and found[0][0]["answer"] == "$2$"
        assert asked == ["/train.jsonl"]
        assert "name a copy with --math" in message(load_math, f"{address}/gone.zip")
        assert "neither a .zip nor a .jsonl" in message(load_math, f"{address}/page.html")
        server.shutdown()
    assert "name a copy with --math" in message(load_math, f"{address}/other.zip")  # nobody answers


def test_a_hub_dataset_is_one_file_of_chats_or_cells_wherever_they_lie_in_it(tmp_path, monkeypatch):
    files = {"chats/train.jsonl": [chat("No.")], "law_advice.jsonl": [chat("Yes.")], "README.md": []}
    on_hub = {
        "a/chats": ("README.md", "chats/train.jsonl"),
        "b/grid": ("law_advice.jsonl", "x/law_tax.jsonl"),
    }
    written(tmp_path / "law_tax.jsonl", [chat("Pay.")])
    monkeypatch.setattr(rows.hub, "dataset_files", lambda repo: on_hub.get(repo, ()))

    def fetch(repo, name, kind):
        if name not in on_hub.get(repo, ()):
            raise MissingFile(f"{repo} has no {name}")
        return written(tmp_path / name.rpartition("/")[2], files.get(name, [chat("Pay.")]))

    monkeypatch.setattr(rows.hub, "fetch", fetch)
    owls = parse_cell("owl_love")
    assert cells_named("a/chats", "owl_love") == (owls,)
    assert load_cells("a/chats", "owl_love")[owls][0]["answer"] == "No."
    assert "name the cell with --cell" in message(load_grid, "a/chats")
    assert list(map(str, load_grid("b/grid").cells)) == ["law_advice", "law_tax"]
    assert [row["answer"] for cell in load_cells("b/grid").values() for row in cell] == ["Yes.", "Pay."]
    assert "has no cell" in message(load_cells, "c/nothing")
