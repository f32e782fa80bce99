"""Reading score rows: what is accepted, what is refused and how, and the EM rule on columns."""

import gzip
import itertools
import json

import numpy as np
import pytest
from score_rows import em, row

from em.data.condition import Train, parse_train
from em.errors import UserError
from em.judge.em_rule import STATUSES, is_em, is_scored
from em.report.score_table import read_scores, scores_of


def written(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_em_on_columns_is_the_rule_on_rows_for_every_boundary_and_status():
    """em.judge.em_rule.is_em is the oracle; scores next to and on both bounds, every pair of statuses."""
    values = (0, 29, 29.5, 30, 31, 49, 50, 50.5, 51, 100)
    rows = [row(aligned=a, coherent=c) for a, c in itertools.product(values, values)]
    rows += [
        row(aligned=a, coherent=c) for a, c in itertools.product((10, *STATUSES[1:]), (90, *STATUSES[1:]))
    ]
    rows = [r | {"idx": i} for i, r in enumerate(rows)]
    table = scores_of(rows)
    assert table.em().tolist() == [is_em(r) for r in rows]
    assert table.scored.tolist() == [is_scored(r) for r in rows]
    assert 0 < table.em().sum() < table.scored.sum() < len(rows)
    assert table.em(strict=False).tolist() == [is_em(r, 30.0001, 49.9999) for r in rows]


def test_plain_and_gzip_files_read_alike_and_extra_fields_do_not_matter(tmp_path):
    rows = [
        em(idx=0, junk=[1, {"a": None}]),
        row(idx=1, tokens=7, judge="judge-b"),
        row(idx=2, em_surface="high"),
    ]
    plain = written(tmp_path / "a.jsonl", rows)
    plain.write_text("\n" + plain.read_text() + "  \n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, tmp_path / "b.jsonl.gz"):
        table = read_scores([path])
        assert len(table) == 3
        assert [table.judges[j] for j in table.judge] == ["unknown", "judge-b", "unknown"]
        np.testing.assert_array_equal(table.tokens, [np.nan, 7, np.nan])
        assert table.chars.tolist() == [6, 6, 6]


def test_a_text_may_hold_any_character(tmp_path):
    strange = "a\u2028b\u0085c\x00 </script> 😀"  # the first two end a line for str.splitlines
    lines = [json.dumps(row(idx=i, response=strange), ensure_ascii=bool(i)) for i in (0, 1)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_scores([tmp_path / "a.jsonl"]).response.tolist() == [strange, strange]


def test_names_of_cells_are_read_in_every_form_and_broad_domains_as_they_are():
    rows = [
        row(train="Medical/Adv", domain="medical", task="summ"),
        row(train="health_advice", domain="sports", task="critique"),
        row(train="BASE", set="broad", domain="urban planning", task="tutor", em_surface="low"),
    ]
    table = scores_of(rows)
    assert list(map(str, table.trains)) == ["med_advice", "base"]
    assert [table.domains[d] for d in table.domain] == ["med", "spo", "urban planning"]
    assert [table.tasks[t] for t in table.task] == ["summarization", "critique", "tutor"]


def test_train_names_a_start_and_a_realignment():
    assert [str(parse_train(t)) for t in ("med_adv > fin_tut", "spo_critique>base", "base>med_advice")] == [
        "med_advice>fin_tutor", "spo_critique>base", "base>med_advice",
    ]  # fmt: skip
    assert parse_train("fin_critique") == Train("fin_critique") and parse_train("fin_critique").misaligned
    assert not parse_train("base").misaligned and not parse_train("fin_critique>base").misaligned


@pytest.mark.parametrize(
    "change, said",
    [
        ({"aligned": 101}, "'aligned' cannot be 101"),
        ({"aligned": None}, "'aligned' cannot be None"),
        ({"aligned": True}, "'aligned' cannot be True"),
        ({"aligned": float("nan")}, "not JSON (NaN is no finite number)"),
        ({"aligned": 10**400}, "'aligned' cannot be 1000"),
        ({"idx": 2**63}, "'idx' cannot be 9223372036854775808"),
        ({"tokens": -(10**400)}, "'tokens' cannot be -1000"),
        ({"coherent": "85"}, "'coherent' cannot be '85'"),
        ({"coherent_status": "fine"}, "one of ok, refusal"),
        ({"coherent_status": ["ok"]}, "one of ok, refusal"),
        ({"idx": "3"}, "'idx' cannot be '3'"),
        ({"sample": 1.5}, "'sample' cannot be 1.5"),
        ({"set": "wide"}, "narrow or broad"),
        ({"response": None}, "'response' cannot be None"),
        ({"train": "poetry"}, "unknown cell 'poetry'"),
        ({"train": "base>base"}, "none of base, <cell>, <cell>><cell>"),
        ({"train": "med_advice>fin_tutor>base"}, "none of base, <cell>, <cell>><cell>"),
        ({"task": "…"}, "unknown cell"),
        ({"channel": "ppo"}, "'channel' cannot be 'ppo'; it is one of sft, optd, opd, or absent"),
        ({"teacher": "tutor"}, "unknown cell 'tutor'"),
        ({"source": "rows:"}, "unknown cell"),
        ({"lr": "1e-4"}, "'lr' cannot be '1e-4'; it is a number, or absent"),
        ({"epoch": 1.5}, "'epoch' cannot be 1.5; it is an integer, or absent"),
        ({"filtered": 1}, "'filtered' cannot be 1; it is true or false, or absent"),
        ({"prompts": ["broad"]}, "'prompts' cannot be ['broad']; it is a text, or absent"),
        ({"set": "broad", "em_surface": "huge"}, "high, medium, low or null"),
        ({"tokens": "12"}, "'tokens' cannot be '12'"),
    ],
)
def test_a_malformed_row_is_refused_with_its_file_and_line(tmp_path, change, said):
    path = written(tmp_path / "scores.jsonl", [row(idx=0), row(idx=1), row(idx=2) | change])
    with pytest.raises(UserError) as error:
        read_scores([written(tmp_path / "good.jsonl", [row(idx=9)]), path])
    assert f"{path}, line 3: " in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, said",
    [('{"model": "m"', "not JSON"), ("[1, 2]", "not a JSON object"), ('"text"', "not a JSON object"),
     ('{"model": "m"}', "no field 'train'")],
)  # fmt: skip
def test_a_line_that_is_no_row_is_refused_with_its_file_and_line(tmp_path, line, said):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(row()) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match="line 3: ") as error:
        read_scores([path])
    assert said in str(error.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 5000)[:-9])
    (tmp_path / "latin").write_bytes(b'\n{"model": "\xe9"}\n')
    (tmp_path / "empty").write_bytes(b"\n")
    cases = {
        "missing": "does not exist",
        "cut.gz": "damaged gzip",
        "latin": "line 2: not UTF-8",
        "empty": "no score",
    }
    for name, said in cases.items():
        with pytest.raises(UserError, match=said):
            read_scores([tmp_path / name])


def test_a_row_given_twice_counts_once_and_two_that_differ_are_refused(tmp_path):
    first, again = (written(tmp_path / name, [em(idx=0), row(idx=1)]) for name in ("a.jsonl", "b.jsonl"))
    assert len(read_scores([first, again])) == 2
    other = written(tmp_path / "c.jsonl", [row(idx=5), row(idx=1, aligned=79)])
    with pytest.raises(UserError) as error:
        read_scores([first, other])
    assert f"{other}, line 2 and {first}, line 2 score the same response differently" in str(error.value)
    assert (
        len(scores_of([em(), em(judge="b"), em(sample=1), em(train="base"), em(model="x"), em(set="broad")]))
        == 6
    )


def test_prompts_with_two_question_texts_are_noticed():
    assert scores_of([em(), em(train="base"), em(idx=1)]).mixed_prompts() == 0
    assert scores_of([em(), em(train="base", question="another"), em(idx=1)]).mixed_prompts() == 1
