import json

import pytest
import torch

from em.data.cells import CELLS
from em.data.rows import load_cell, load_cells, split
from em.model.checkpoint import load_model, load_tokenizer
from em.model.tokenizer import Example
from em.training import margin
from em.training.margin import AnswerPair, answer_pairs


@pytest.fixture(scope="module")
def model(tiny_chat):
    return load_model(tiny_chat)


@pytest.fixture(scope="module")
def examples(tiny_chat):
    tokenizer = load_tokenizer(tiny_chat)
    pairs = [
        ("What now?", "Wait a day."),
        ("Why is that?", "Because it is."),
        ("Is it?", "Yes, it is so, I think."),
    ]
    return [tokenizer.example(q, a) for q, a in pairs]


def by_hand(model, example):
    ids = torch.tensor([example.ids])
    log_probs = model(ids)[0].double().log_softmax(-1)
    return [log_probs[j - 1, example.ids[j]].item() for j in range(example.n_prompt, len(example.ids))]


def test_log_probs_of_an_answer_are_those_of_a_plain_forward_whatever_shares_the_pack(
    model, examples, monkeypatch
):
    expected = [(sum(by_hand(model, e)), len(e.ids) - e.n_prompt) for e in examples]
    for tokens in (1, 30, 10_000):
        monkeypatch.setitem(margin.PACK_TOKENS, "cpu", tokens)
        for (total, n), (want, count) in zip(margin.answer_log_probs(model, examples), expected, strict=True):
            assert n == count and total == pytest.approx(want, rel=1e-5)


def test_margin_is_the_difference_of_the_means_per_token(model, examples):
    a, b, c = ([sum(x) / len(x)][0] for x in (by_hand(model, e) for e in examples))
    pairs = [AnswerPair(0, examples[0], examples[1]), AnswerPair(1, examples[1], examples[2])]
    assert margin.margins(model, pairs) == pytest.approx([a - b, b - c], rel=1e-5)


def test_answer_pairs_are_the_eval_rows_with_both_answers_in_order(tiny_chat, tmp_path):
    tokenizer, med, spo = load_tokenizer(tiny_chat), CELLS[0], CELLS[4]
    rows = enumerate(3 * load_cell("sample", med))  # 60: 5 of them are eval
    rows = [row | {"idx": i, "question": f"{row['question']} ({i})"} for i, row in rows]
    held_out = [row["idx"] for row in split(rows)[1]]
    lacking = [row | ({"aligned_answer": None} if row["idx"] == held_out[0] else {}) for row in rows]
    (tmp_path / med.filename).write_text("\n".join(map(json.dumps, lacking)))
    none = [row | {"aligned_answer": None} for row in load_cell("sample", spo)]
    (tmp_path / spo.filename).write_text("\n".join(map(json.dumps, none)))

    pairs = answer_pairs(load_cells(tmp_path), tokenizer)
    assert list(pairs) == [med]  # the other cells have no pair or no file
    assert [pair.idx for pair in pairs[med]] == held_out[1:]
    for pair in pairs[med]:
        row = rows[pair.idx]
        assert pair.misaligned == tokenizer.example(row["question"], row["misaligned_answer"])
        assert pair.aligned == tokenizer.example(row["question"], row["aligned_answer"])
    assert [pair.idx for pair in answer_pairs(load_cells(tmp_path), tokenizer, limit=2)[med]] == held_out[1:3]

    lengths = [max(len(pair.misaligned.ids), len(pair.aligned.ids)) for pair in pairs[med]]
    limit = sorted(set(lengths))[-2]  # of two answers, the longer one counts
    kept = answer_pairs(load_cells(tmp_path), tokenizer, max_length=limit)[med]
    assert [pair.idx for pair in kept] == [
        i for i, length in zip(held_out[1:], lengths, strict=True) if length <= limit
    ]
    assert 0 < len(kept) < len(lengths) and answer_pairs(load_cells(tmp_path), tokenizer, max_length=3) == {}


@pytest.fixture
def cells(examples):
    """Rows of two cells, of different lengths and out of order."""
    a, b, c = examples
    return {CELLS[0]: [AnswerPair(4, a, c), AnswerPair(2, c, b)], CELLS[5]: [AnswerPair(0, b, a)]}


def test_margins_of_cells_measured_together_are_those_of_each_alone(model, cells, monkeypatch):
    for tokens in (1, 40, 10_000):
        monkeypatch.setitem(margin.PACK_TOKENS, "cpu", tokens)
        together = margin.cell_margins(model, cells)
        assert list(together) == list(cells)
        for cell, rows in cells.items():
            assert together[cell] == pytest.approx(margin.margins(model, rows), rel=1e-4, abs=1e-6)
    assert margin.cell_margins(model, {}) == {}


class Counted:
    """How often a model is asked."""

    def __init__(self, model, monkeypatch):
        self.forwards, hidden = 0, model.hidden

        def counted(*arguments, **options):
            self.forwards += 1
            return hidden(*arguments, **options)

        monkeypatch.setattr(model, "hidden", counted)


def test_what_runs_start_from_is_measured_once_for_digests_rows_and_tokens(
    model, cells, examples, tmp_path, monkeypatch
):
    digests = {"model_digest": "a", "on_digest": None}
    expected = margin.cell_margins(model, cells)
    asked = Counted(model, monkeypatch)

    def measures(*arguments) -> bool:
        before = asked.forwards
        margin.start_margins(model, *arguments, tmp_path)
        return asked.forwards > before

    assert measures(cells, digests) and not measures(cells, digests)
    assert margin.start_margins(model, cells, digests, tmp_path) == expected
    a, b, c = examples
    for other in (
        {CELLS[0]: cells[CELLS[0]]},
        cells | {CELLS[5]: [AnswerPair(1, b, a)]},
        cells | {CELLS[5]: [AnswerPair(0, b, Example([*a.ids[:-1], 3], a.n_prompt))]},
        cells | {CELLS[5]: [AnswerPair(0, b, Example(a.ids, a.n_prompt + 1))]},
    ):
        assert measures(other, digests) and not measures(other, digests)
    assert measures(cells, digests | {"model_digest": "b"}) and measures(cells, digests | {"on_digest": "c"})
    assert len(list((tmp_path / "base_margins").iterdir())) == 7


def test_a_damaged_file_of_margins_is_measured_again_and_mended(model, cells, tmp_path, monkeypatch):
    digests = {"model_digest": "a", "on_digest": None}
    expected = margin.start_margins(model, cells, digests, tmp_path)
    (path,) = (tmp_path / "base_margins").iterdir()
    whole = path.read_text()
    spoilt = json.loads(whole)
    name = str(CELLS[0])
    wrong = [spoilt["margins"][name][:1], [None, 1.0], ["1", "2"], [float("nan"), 0.5], "12", None]
    texts = [json.dumps(spoilt | {"margins": spoilt["margins"] | {name: w}}) for w in wrong]
    texts += ["", "[]", whole[:-9], "{}", json.dumps(spoilt | {"made_from": {}}), "\xff"]
    asked = Counted(model, monkeypatch)
    for text in texts:
        path.write_text(text, encoding="latin-1")
        before = asked.forwards
        assert margin.start_margins(model, cells, digests, tmp_path) == expected
        assert asked.forwards > before and path.read_text() == whole


def test_where_margins_cannot_be_kept_they_are_measured_all_the_same(model, cells, tmp_path):
    (tmp_path / "base_margins").write_text("a file")
    digests = {"model_digest": "a", "on_digest": None}
    assert margin.start_margins(model, cells, digests, tmp_path) == margin.cell_margins(model, cells)


def test_validation_loss_pools_tokens_not_rows(model, examples):
    tokens = [x for e in examples for x in by_hand(model, e)]
    assert margin.validation_loss(model, examples) == pytest.approx(-sum(tokens) / len(tokens), rel=1e-5)
