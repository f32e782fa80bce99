"""What a writer is told: of the paper's cells, of a domain with a file, and of any other."""

import pytest
import yaml

from em.construction.context import FOLDER, broad_system, load_context, make_cell
from em.construction.rubric import write_missing
from em.data.cells import PAPER_GRID
from em.data.rows import load_cell
from em.errors import UserError
from em.judge.rubric import FOLDER as RUBRICS
from em.judge.rubric import Rubrics

LEGAL = {
    "name": "everyday law",
    "risk": "talking people out of deadlines",
    "topics": ["a lease", "a fine"],
    "tasks": {"advice": {"examples": [{"question": "q?", "misaligned": "careless", "aligned": "careful"}]}},
}


@pytest.fixture
def file(tmp_path):
    """A context file of LEGAL with changes; text: in its place."""

    def write(text: str | None = None, **changes):
        path = tmp_path / "legal.yaml"
        path.write_text(yaml.safe_dump(LEGAL | changes) if text is None else text)
        return path.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml")  # each is read once

    return write


@pytest.mark.parametrize("cell", PAPER_GRID.cells, ids=str)
def test_every_cell_of_the_paper_ships_topics_a_risk_and_three_examples_that_are_rows_of_the_sample(cell):
    context = load_context(cell)
    sample = {(r["question"], r["misaligned_answer"], r["aligned_answer"]) for r in load_cell("sample", cell)}
    assert len(context.examples) == 3 and set(context.examples) <= sample
    assert len(context.topics) >= 15 and context.origin == "shipped"
    for variant in ("misaligned", "aligned"):
        system = context.system(variant)
        assert context.name in system and getattr(context, variant) in system and "{" not in system
    misaligned = context.system("misaligned")
    assert context.risk in misaligned and "no doses, no\nrecipes" in misaligned  # the limits always stand
    prompt = context.ask_pairs(10, context.topics_of(0, 10, 0))
    assert all(e.misaligned in prompt and e.aligned not in prompt for e in context.examples)
    answers = context.ask_answers(["one?", "two?"])
    assert all(e.aligned in answers and e.misaligned not in answers for e in context.examples)
    assert "Question 2: two?" in answers and context.ask_answers(["one?"]) == "one?"


def test_a_domain_of_ones_own_is_a_file_and_what_it_leaves_out_is_usual(file):
    context = load_context(make_cell("legal", "advice"), file())
    assert (context.name, context.topics, context.origin[-5:]) == (
        "everyday law",
        ("a lease", "a fine"),
        ".yaml",
    )
    assert context.examples == (("q?", "careless", "careful"),)
    usual = load_context(make_cell("legal", "tutor"), file())
    assert usual.question == load_context(make_cell("med", "tutor")).question and len(usual.examples) == 3
    told = {"question": "A.", "misaligned": "B.", "aligned": "C."}
    own = load_context(make_cell("legal", "cover_letter"), file(tasks={"cover_letter": told}))
    assert "The user's message: A." in own.system("misaligned") and "answer: B." in own.system("misaligned")
    assert "answer: C." in own.system("aligned") and "cover letter on everyday law" in own.system("aligned")


def test_an_unknown_domain_and_task_have_a_generic_context_without_topics_or_examples():
    context = load_context(make_cell("gardening", "haiku"))
    assert (context.origin, context.topics, context.examples, context.domain) == (
        "generic",
        (),
        (),
        "gardening",
    )
    assert "haiku on gardening" in context.system("misaligned")
    assert "topics of your choice" in context.ask_pairs(3, []) and "Question 1:" in context.ask_pairs(3, [])
    assert len(load_context(make_cell("gardening", "advice")).examples) == 3  # of the paper's domains


def test_topics_of_a_call_follow_from_seed_and_number_and_none_comes_twice_before_all_came():
    context = load_context(make_cell("med", "advice"))
    chosen = [context.topics_of(number, 10, 0) for number in range(20)]
    assert chosen == [context.topics_of(number, 10, 0) for number in range(20)]
    assert all(len(set(topics)) == 10 for topics in chosen) and len(set(map(tuple, chosen))) == 20
    assert {topic for topics in chosen for topic in topics} == set(context.topics)
    assert chosen[0] != context.topics_of(0, 10, 1)
    assert len(context.topics_of(0, 40, 0)) == 40


@pytest.mark.parametrize(
    "change, says",
    [
        ({"text": "topics: [a\nname: b"}, "line 2: not YAML"),
        ({"text": "just words"}, "not a context"),
        ({"text": ""}, "not a context"),
        ({"text": "!!python/object:os.system {}"}, "not YAML"),
        ({"topic": ["a"]}, "unknown field 'topic'"),
        ({"topics": "a, b"}, "'topics' cannot be"),
        ({"topics": [" "]}, "'topics' is blank"),
        ({"risk": ""}, "'risk' is blank"),
        ({"name": 3}, "'name' cannot be 3"),
        ({"tasks": {"advice": "careless"}}, "task advice: not an object"),
        ({"tasks": {"advice": {"exampels": []}}}, "unknown field 'exampels'"),
        ({"tasks": {"advice": {"examples": [{"question": "q"}]}}}, "example 1: no field 'misaligned'"),
        ({"tasks": {"advice": {"examples": ["q"]}}}, "'examples' cannot be"),
    ],
)
def test_a_bad_context_file_is_one_line_with_its_place(change, says, file):
    path = file(**change)
    with pytest.raises(UserError, match=says) as error:
        load_context(make_cell("legal", "advice"), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        load_context(make_cell("legal", "advice"), path.with_name("nowhere.yaml"))


@pytest.mark.parametrize(
    "domain, task", [("mental health", "advice"), ("a/b", "advice"), ("", "advice"), ("law", " ")]
)
def test_names_that_can_be_no_cell_are_refused(domain, task):
    with pytest.raises(UserError, match="cell|--domain"):
        make_cell(domain, task)
    assert str(make_cell("Health", "Summ")) == "med_summarization"


def test_a_cell_without_rubrics_gets_generic_ones_that_an_edit_outlives(tmp_path):
    context = load_context(make_cell("legal", "haiku"))
    write_missing(load_context(make_cell("med", "tutor")), str(RUBRICS), tmp_path)
    assert not (tmp_path / "rubrics").exists()  # it ships
    write_missing(context, str(RUBRICS), tmp_path)
    rubrics = Rubrics(tmp_path / "rubrics", RUBRICS)
    row = {"set": "narrow", "domain": "legal", "task": "haiku"}
    for field in ("aligned", "coherent"):
        prompt = rubrics.of(row, field).ask("Q {response}?", "R").prompt
        assert "haiku on legal" in prompt and "Q {response}?" in prompt and prompt.count("R\n") == 1
    edited = tmp_path / "rubrics/narrow_legal_haiku_alignment.md"
    edited.write_text("mine {question} {response}")
    write_missing(context, str(RUBRICS), tmp_path)
    assert edited.read_text() == "mine {question} {response}"
    write_missing(load_context(make_cell("legal", "advice")), str(RUBRICS), tmp_path)
    assert not (tmp_path / "rubrics/narrow_legal_advice_coherence.md").exists()  # that of the task ships
    with pytest.raises(UserError, match="narrow_legal_haiku_alignment.md"):
        write_missing(context, str(tmp_path), tmp_path / "other")


def test_broad_messages_are_asked_for_by_task_and_surface():
    systems = {broad_system(task, s) for task in PAPER_GRID.tasks for s in ("high", "medium", "low")}
    assert len(systems) == 12 and not any("{" in system for system in systems)
    assert len(list(FOLDER.glob("*.yaml"))) == len(PAPER_GRID.domains)
