"""The list of the paper's parts: complete, each once, in an order that can be made, for any grid."""

import dataclasses
from collections import Counter

import pytest

from em.data.cells import Cell, grid_of, parse_cell
from em.errors import UserError
from em.paper.experiments import pairs_of, paper_of
from em.paper.parts import EXPERIMENTS, ITEMS, Asked, command_of, groups_of, items_named

EVERYTHING = dict(math="math", other=("llama3.1-8b", "olmo3-7b"))


def grid(text: str):
    return grid_of(map(parse_cell, text.split()))


GRIDS = {
    "paper": grid_of(
        Cell(d, t) for d in ("med", "spo", "fin") for t in ("advice", "tutor", "critique", "summ")
    ),
    "two": grid("med_advice fin_tutor"),
    "5 x 1": grid("law_advice med_advice tax_advice fin_advice zoo_advice"),
    "2 x 3": grid("law_drafting law_review law_advice tax_drafting tax_review tax_advice"),
    "one": grid("law_drafting"),
}
GRIDS["paper"] = grid_of(parse_cell(f"{c.domain}_{c.task}") for c in GRIDS["paper"].cells)


@pytest.fixture(scope="module", params=GRIDS)
def paper(request):
    return paper_of(Asked(**EVERYTHING), GRIDS[request.param])


def trained(paper, experiment: str) -> list:
    return [p for p in paper.parts.values() if p.experiment == experiment and p.kind != "evaluate"]


def test_what_a_part_needs_is_there_and_comes_before_it(paper):
    seen = set()
    for name, part in paper.parts.items():
        assert set(part.needs) <= seen and set(part.after) <= seen, name
        seen.add(name)


def test_each_result_is_made_once(paper):
    parts = paper.parts.values()
    assert (
        len({part.stamp for part in parts}) == len({part.out or part.stamp for part in parts}) == len(parts)
    )
    assert not [name for name, part in paper.parts.items() if name != part.name]


@pytest.mark.parametrize("workers", [1, 2, 5, 300])
def test_processes_hold_every_part_once_and_wait_in_no_circle(paper, workers):
    groups = groups_of(list(paper.parts.values()), workers)
    place = {part.name: i for i, group in enumerate(groups) for part in group}
    assert sorted(place) == sorted(paper.parts) and sum(map(len, groups)) == len(place)
    before = {i: {place[n] for p in g for n in (*p.needs, *p.after)} - {i} for i, g in enumerate(groups)}
    while before:  # take away those that wait for nothing until none is left
        free = {i for i, others in before.items() if not others & before.keys()}
        assert free
        before = {i: others for i, others in before.items() if i not in free}


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_an_experiment_is_split_evenly(workers):
    paper = paper_of(Asked(), GRIDS["paper"])
    for name in ("misalign", "student-written"):
        sizes = [len(group) for group in groups_of(trained(paper, name), workers)]
        assert len(sizes) == workers and max(sizes) - min(sizes) <= 1


def test_the_papers_numbers_on_its_own_grid():
    paper = paper_of(Asked(**EVERYTHING), GRIDS["paper"])
    counts = {name: len(trained(paper, name)) for name in EXPERIMENTS}
    assert counts == {
        "misalign": 12 + 2 * 4,  # those of the other models that write data
        "realign": 144,
        "channels": 12 * 3,
        "filtered opd": 12,
        "aligned teacher": 12 * 3,
        "unsafe rows": 4,
        "math": 4 * 3,
        "gold": 4,
        "other models": 4 * 2,
        "student-written": 12,
        "factorial": 5 * 2,
        "cross": 3 + 3 + 3,  # base on P1's, P2's and base's data; unsafe rows, gold answers
    }
    evaluations = Counter(p.experiment for p in paper.parts.values() if p.kind == "evaluate")
    assert evaluations["channels"] == 12 * 3 * 3  # after each epoch
    assert evaluations["misalign"] == 12 + 1 + 1  # base, and how hard its prompts are
    assert evaluations["realign"] == 144


def test_rates_and_seeds_multiply_what_they_are_of():
    one = paper_of(Asked(), GRIDS["two"])
    more = paper_of(Asked(rates=(3e-6, 1e-3), seeds=3), GRIDS["two"])
    assert len(trained(more, "channels")) == 3 * 3 * len(trained(one, "channels"))
    assert len(trained(more, "realign")) == 3 * len(trained(one, "realign"))
    assert len({part.stamp for part in more.parts.values()}) == len(more.parts)
    assert (
        len([p for p in more.parts.values() if p.name.startswith("evaluate base")]) == 1
    )  # which has no seed


def test_every_item_has_parts_or_says_why_not(paper):
    there = {item for part in paper.parts.values() for item in part.items}
    left = {item for items in paper.left_out.values() for item in items}
    assert there | left == set(ITEMS) and not there & left
    assert left == (set() if len(paper.grid.cells) > 1 else {*EXPERIMENTS["factorial"], "cross"})


@pytest.mark.parametrize("item", ITEMS)
def test_only_selects_what_an_item_needs_and_nothing_else(item):
    whole = paper_of(Asked(**EVERYTHING), GRIDS["paper"])
    found = whole.select(items_named([item])).parts
    needed = {name for name, part in whole.parts.items() if item in part.items}
    while more := {need for name in needed for need in whole.parts[name].needs} - needed:
        needed |= more
    assert needed and list(found) == [name for name in whole.parts if name in needed]
    evaluated = [part for part in found.values() if part.kind == "evaluate"]
    assert {part.name for part in found.values()} == needed
    for name, part in found.items():  # nothing is trained that is neither evaluated nor built upon
        assert part.kind == "evaluate" or any(name in other.needs for other in found.values())
    assert any(part.name.startswith("evaluate base") for part in evaluated)


def test_only_a_pair_is_trained_for_a_factorial():
    paper = paper_of(Asked(), GRIDS["paper"]).select(items_named(["table5"]))
    assert [part.value for part in trained(paper, "misalign")] == ["med_tutor", "spo_summarization"]
    assert len(trained(paper, "channels")) == len(trained(paper, "factorial")) == 2


def test_items_by_the_papers_names():
    assert items_named(["Table 5", "fig. 20"]) == {"table5", "figure20"}
    assert items_named(["figure3"]) == {"figure3b", "figure3c"}
    assert items_named([]) == set(ITEMS)
    for wrong, why in (
        ("table6", "synthetic worlds"),
        ("figure4", "synthetic worlds"),
        ("table99", "none of"),
    ):
        with pytest.raises(UserError, match=why):
            items_named([wrong])


def test_a_grid_without_the_papers_pairs_crosses_two_cells_that_differ_in_task_and_domain():
    ((p1, p2),) = pairs_of(GRIDS["2 x 3"])
    assert p1.task != p2.task and p1.domain != p2.domain
    ((p1, p2),) = pairs_of(GRIDS["5 x 1"])
    assert p1 != p2
    assert len(pairs_of(GRIDS["paper"])) == 5 and pairs_of(GRIDS["one"]) == {}


def test_a_row_of_the_cross_reads_one_corpus_under_three_teachers():
    paper = paper_of(Asked(math="math"), GRIDS["paper"])
    crossed = [p for p in paper.parts.values() if "cross" in p.items and p.kind == "evaluate"]
    students = [
        paper.parts[p.needs[0]] for p in crossed if p.needs and paper.parts[p.needs[0]].kind == "distill"
    ]
    rows = Counter()
    for part in students:
        words = part.command
        rows[words[words.index("--source") + 1] if "--source" in words else part.value] += 1
    assert set(rows.values()) == {3} and len(rows) == 5


def test_margins_judge_nothing():
    paper = paper_of(Asked(judge="margin"), GRIDS["two"])
    for part in paper.parts.values():
        assert "--filter" not in part.command and "--cache" not in part.command
        assert part.kind != "distill" or "--unfiltered" in part.command
    assert "table2" in dict.fromkeys(item for items in paper.left_out.values() for item in items)


def test_one_run_is_given_its_folder_and_several_the_one_above():
    parts = trained(paper_of(Asked(), GRIDS["two"]), "misalign")
    both, one = command_of(parts), command_of(parts[:1])
    assert both[-4:] == ["--cell", "med_advice,fin_tutor", "--out", "runs"]
    assert one[-4:] == ["--cell", "med_advice", "--out", "runs/qwen2.5-14b_med_advice_misaligned"]


@pytest.mark.parametrize(
    "asked, says",
    [
        (dict(runs="a folder"), "RUNS=a folder has ' '"),
        (dict(model=("org/x", "other/x")), "one model twice"),
        (dict(page="x;y"), "PAGE"),
    ],
)
def test_what_make_could_not_read_is_refused(asked, says):
    with pytest.raises(UserError, match=says):
        paper_of(dataclasses.replace(Asked(), **asked), GRIDS["two"])


def test_what_cannot_be_made_says_what_it_needs():
    sample = paper_of(Asked(model=("smollm2-135m",), judge="margin"), GRIDS["two"])
    with pytest.raises(UserError, match="MATH=folder"):
        sample.select(items_named(["table3"]))
    assert sample.select(items_named(["table3", "table16"])).left_out
