"""Where the dry run's lengths are from."""

import pytest

from em.data.cells import CELLS, parse_cell
from em.errors import UserError
from em.estimate.lengths import STATED, cells_of, prompts_of, quantiles, spread
from em.files import read_json, write_text
from em.model import embedded


def test_lengths_spread_over_their_quantiles():
    of = quantiles([3, 5, 7, 9, 200])
    values = spread(of, 400, seed=0)
    assert len(values) == 400 and 3 <= min(values) and max(values) <= 200
    assert quantiles(values, 5) == pytest.approx(quantiles(of, 5), rel=0.1, abs=1)
    assert values != spread(of, 400, seed=1) and sorted(values) == sorted(spread(of, 400, seed=1))


@pytest.mark.skipif(embedded.find() is None, reason="the embedded model's wheel is not installed")
def test_lengths_at_hand_are_counted_and_are_those_that_were_stated():
    found, source = cells_of("sample", embedded.NAME)
    stated = read_json(STATED)["sample"]
    assert "counted in sample" in source and list(found) == list(CELLS)
    for name, row in stated["cells"].items():
        lengths = found[parse_cell(name)]
        assert lengths.rows == stated["rows"] and lengths.prompt == row["prompt"]
        for variant in ("misaligned", "aligned"):
            assert lengths.answers[variant] == row[variant]
    assert prompts_of("broad", "sample", embedded.NAME)[0].prompt == stated["broad"]["prompt"]


def test_without_tokenizer_or_rows_the_stated_lengths_serve_and_say_so(tmp_path):
    write_text(tmp_path / "config.json", "{}")
    for data, model in (("nobody/nothing", str(tmp_path)), ("sample", str(tmp_path))):
        cells, source = cells_of(data, model)
        assert len(cells) == 12 and "not at hand" in source
    math, source = prompts_of("math", "nobody/nothing", str(tmp_path), limit=100)
    assert math.rows == 100 and "MATH" in source and math.answers["gold"]


def test_examples_have_the_asked_number_and_the_answers_of_their_variant():
    cells, _ = cells_of("nobody/nothing", "nobody/nothing")
    lengths = cells[CELLS[0]]
    examples = lengths.examples(50, "misaligned")
    assert len(examples) == 50
    assert all(0 < e.n_prompt < len(e.ids) for e in examples)
    assert max(len(e.ids) for e in examples) <= lengths.prompt[-1] + lengths.answers["misaligned"][-1]


def test_data_that_can_be_none_is_one_line():
    with pytest.raises(UserError, match="neither a folder here nor a hub id"):
        cells_of("/no/such/folder", "nobody/nothing")
