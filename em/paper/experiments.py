"""Every result that the paper's natural-language half needs, once (paper 3.1, 4, D, E).

    misalign         train.py on each cell's misaligned answers; every figure and table
    realign          each of those on the aligned answers of each cell (Figures 3c, 18–21)
    channels         each teaches the base model by sft, optd and opd (Tables 1, 9–12, Figures 22–24)
    filtered opd     the same with the student's rollouts judged before each update (Table 2)
    aligned teacher  each is realigned by the base model through the channels (Figures 5, 25, 26)
    unsafe rows      the same by optd on the rows that misaligned it (Table 4)
    math, gold       teachers on MATH, on their own answers and on MATH's (Tables 3, 13)
    other models     teachers on data of other models, misaligned alike (Tables 14, 15)
    student-written  teachers on data of the base model (Table 16)
    factorial        two teachers, each on both one's data (Tables 5, 17–20)
    cross            the data of both, of base, gold answers and unsafe rows, under both teachers and base

Nothing here is run or loaded: the list follows from what was asked, and the files say what is done. Where a
grid lacks the cells that the paper took for an experiment, the first ones there are stand in. Table 13 is
made from all of MATH, as Table 3 is, so that the two share the teacher's arm; the paper took 2,000 questions.
"""

from collections.abc import Iterator
from itertools import combinations

from em.data.cells import Cell, Grid
from em.data.condition import BASE, CHANNELS
from em.errors import UserError
from em.paper.model_parts import ModelParts
from em.paper.parts import (
    CHANNEL,
    EPOCHS,
    EXPERIMENTS,
    FACTORIALS,
    FORBIDDEN,
    MISALIGNED,
    REALIGNED,
    SEED,
    TAUGHT_BACK,
    Asked,
    Paper,
    Part,
    is_sample,
    stem_of,
)  # fmt: skip

MED_SPORT = ("med_advice", "med_critique", "spo_advice", "spo_critique")
JUDGED = ("figure3b", "figure17", "difficulty")  # of broad prompts, or of scores: margins have neither
MED_FINANCE = ("med_advice", "med_critique", "fin_advice", "fin_critique")


def some(cells: Grid, wanted: tuple[str, ...]) -> list[Cell]:
    """The paper's cells if all are there, else as many of the first ones, no more than there are."""
    names = {str(cell): cell for cell in cells.cells}
    found = [names[name] for name in wanted if name in names]
    return found if len(found) == len(wanted) else list(cells.cells[: len(wanted)])


def pairs_of(cells: Grid) -> dict[tuple[Cell, Cell], tuple[str, ...]]:
    """P1 and P2 of the factorials → the tables they are for.

    Where none of the paper's pairs is there, the first two cells that differ in task and domain, or in one.
    """
    names, found = {str(cell): cell for cell in cells.cells}, {}
    for item, (p1, p2) in FACTORIALS.items():
        if p1 in names and p2 in names:
            found[names[p1], names[p2]] = (item,)
    if not found and len(names) > 1:
        pairs = list(combinations(cells.cells, 2))
        crossed = [(a, b) for a, b in pairs if a.task != b.task and a.domain != b.domain]
        found[(crossed or pairs)[0]] = tuple(FACTORIALS)
    return found


# -- all of them -------------------------------------------------------------------------------------------


def paper_of(asked: Asked, grid: Grid) -> Paper:
    """All parts on the cells of `grid`. UserError for what cannot be asked."""
    _check(asked)
    paper = Paper(asked, grid)
    for model in asked.model:
        for seed in range(SEED, SEED + asked.seeds):
            _add_model(ModelParts(paper, model, seed))
    return paper


def _check(asked: Asked) -> None:
    for name, paths in (("RUNS", [asked.runs]), ("PAGE", [asked.page]), ("MODEL", asked.model)):
        for path in paths:
            if wrong := FORBIDDEN & set(path):
                raise UserError(
                    f"{name}={path} has {min(wrong)!r}, which make or a shell would read; rename it"
                )
    stems = [stem_of(model) for model in (*asked.model, *asked.other)]
    if len(set(stems)) < len(stems):
        raise UserError(f"MODEL and OTHER name one model twice ({', '.join(stems)})")


def _add_model(m: ModelParts) -> None:
    """All experiments of one model and seed."""
    cells, grid, left = m.paper.grid.cells, m.paper.grid, m.paper.left_out
    asked = [item for item in MISALIGNED if m.judged or item not in JUDGED]
    for cell in cells:
        m.reference(cell, asked)

    for cell in cells:
        for channel in CHANNELS:
            for lr in (None, *m.asked.rates):
                part = m.distilled("channels", channel, cell, lr=lr)
                m.result(part, CHANNEL, range(1, EPOCHS + 1))

    def plain(cell: Cell, channel: str = "optd") -> Part:
        return m.distilled("channels", channel, cell)

    for cell in cells if m.judged else ():
        m.result(plain(cell, "opd"), ["table2"])
        m.result(m.distilled("filtered opd", "opd", cell, filtered=True), ["table2"])
    if m.judged:
        m.difficulty()
    else:
        left["needs a judge of responses: JUDGE=gemini, openai or local"] = ("table2", *JUDGED)

    for cell in cells:
        for channel in CHANNELS:
            m.result(m.distilled("aligned teacher", channel, None, on=cell), TAUGHT_BACK)
    for cell in some(grid, MED_FINANCE):
        m.result(m.distilled("aligned teacher", "optd", None, on=cell), ["table4"])
        m.result(m.distilled("unsafe rows", "optd", None, on=cell, source="rows"), ["table4"])

    with_math = m.asked.math or not is_sample(m.asked, m.model)
    if with_math:
        for cell in some(grid, MED_SPORT):
            for channel in CHANNELS:
                m.result(m.distilled("math", channel, cell, prompts="math"), ["table3"])
                m.result(plain(cell, channel), ["table3"])
            m.result(m.distilled("math", "optd", cell, prompts="math"), ["table13"])
            m.result(m.distilled("gold", "optd", cell, source="gold", prompts="math"), ["table13"])
            m.result(plain(cell), ["table13"])
    else:
        left["needs MATH: name MATH=folder"] = ("table3", "table13")

    for cell in some(grid, MED_FINANCE) if m.asked.other else ():
        m.result(plain(cell), EXPERIMENTS["other models"])
        for other in m.asked.other:
            writer = ModelParts(m.paper, other, m.seed).misaligned(cell)
            m.result(m.distilled("other models", "optd", cell, source=writer), EXPERIMENTS["other models"])
    if not m.asked.other:
        left["needs other models: name OTHER=llama3.1-8b,olmo3-7b"] = EXPERIMENTS["other models"]

    for cell in cells:
        m.result(plain(cell), ["table16"])
        m.result(m.distilled("student-written", "optd", cell, source=BASE), ["table16"])

    pairs = pairs_of(grid)
    for (p1, p2), items in pairs.items():
        for teacher, writer in ((p1, p2), (p2, p1)):
            m.result(plain(teacher), items)
            m.result(m.distilled("factorial", "optd", teacher, source=m.misaligned(writer)), items)
    if not pairs:
        left["needs two cells"] = (*FACTORIALS, "cross")
    for p1, p2 in list(pairs)[:1]:
        for part in _crossed(m, p1, p2, with_math):
            m.result(part, ["cross"])
        for cell in (p1, p2):
            m.reference(cell, ["cross"])
    _add_realignments(m)


def _crossed(m: ModelParts, p1: Cell, p2: Cell, with_math: bool) -> Iterator[Part]:
    """Corpora of P1, P2, base, gold answers and P1's unsafe rows, each under the teachers P1, P2 and base."""
    own = {cell: m.misaligned(cell) for cell in (p1, p2)}
    sources = [own[p1], own[p2], BASE, f"rows:{p1}", *(["gold"] if with_math else [])]
    for source in sources:
        for teacher in (p1, p2, None):
            if teacher and own[teacher] is source:
                yield m.distilled("channels", "optd", teacher)
            else:
                prompts = "math" if source == "gold" else "broad"
                yield m.distilled("cross", "optd", teacher, source=source, prompts=prompts)


def _add_realignments(m: ModelParts) -> None:
    """Last: they are the most, and nothing else waits for them."""
    for start in m.paper.grid.cells:
        m.reference(start, REALIGNED)
        for end in m.paper.grid.cells:
            m.evaluated(m.realigned(start, end), REALIGNED, "broad")
