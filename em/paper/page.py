"""The page: every figure and table of the paper in order, the authors' published rows and ours beside it.

    python -m em.paper.page --runs runs --model qwen2.5-14b --out results/paper.html

One file, no script, nothing loaded from elsewhere. What is ours comes from three places: the tables that
`evaluate.py compare --paper` writes for the natural-language half, the reports of the synthetic worlds, and
the pages of this repository's `results/` where there is no run of full size, which are said to be reduced.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2

from em.cli import command_line, knob
from em.errors import UserError
from em.files import read_json, read_text, write_text
from em.paper.item import DEMONSTRATION, OURS, PAPER_MODELS, STATES, Sources, shown_item
from em.paper.stated import read_items
from em.paper.wording import image_uri, number_text
from em.verdict import NOT_MEASURED, VERDICTS

RESULTS = Path(__file__).parents[2] / "results"
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Config:
    runs: str = knob("runs", "folder of the runs", "what")
    model: str = knob("qwen2.5-14b", "model of the natural-language runs", "what")
    tables: str | None = knob(
        None, "folder that `evaluate.py compare --paper` wrote (default: RUNS/paper)", "what"
    )
    out: str = knob("results/paper.html", "the page", "what")


def main(cfg: Config) -> None:
    tables = Path(cfg.tables) if cfg.tables else Path(cfg.runs) / "paper"
    items = write_page(Path(cfg.runs), cfg.model, Path(cfg.out), tables)
    states = [item["state"] for item in items]
    for state, words in STATES.items():
        print(f"{states.count(state):3d}  {words}")
    print(f"page: {cfg.out}")


def write_page(
    runs: Path, model: str, out: Path, tables: Path | None = None, results: Path = RESULTS
) -> list[dict]:
    """Write the page and return its items, as the template gets them.

    runs: folder of run folders. tables: of `compare --paper`; may be missing. results: of this repository.
    UserError where a file is damaged or `out` cannot be written.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; choose another --out")
    sources = Sources(runs, model, tables or runs / "paper", results, out.parent)
    items = [shown_item(item, sources) for item in read_items()]
    beyond = _beyond(sources, {item["id"] for item in items})
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        items=items, beyond=beyond, model=model, states=STATES, verdicts=VERDICTS, tally=_tally(items),
        effects=_effects(results / "authors"), measured=bool(sources.tables),
        demonstration=model not in PAPER_MODELS,
    )  # fmt: skip
    write_text(out, page)
    return items


BEYOND = {  # folders of reports under the runs' folder
    "cross": (
        "Data fixed, teacher varied",
        "what the teacher adds to misalignment, and what the data's author",
    ),
    "difficulty": ("Difficulty of the prompts", "what it leaves of the effect of task match"),
}


def _beyond(sources: Sources, known: set[str]) -> list[dict]:
    """Items of ours that the paper does not have: of compare's index, and the reports under BEYOND."""
    about = {"where": "", "needs": "", "models": PAPER_MODELS, "stated": []}
    found = []
    for name, entries in sources.tables.items():
        title, _, rest = entries[0]["title"].partition(". ")
        if name not in known:
            found.append(shown_item(about | {"id": name, "name": title, "title": rest.rstrip(".")}, sources))
    whose = OURS if sources.model in PAPER_MODELS else DEMONSTRATION
    for name, (title, what) in BEYOND.items():
        for report in sorted((sources.folder / name).rglob("*.md")):
            place = report.parent.relative_to(sources.folder).as_posix().replace("/", "-")
            item = about | {"id": place, "name": title, "title": what, "command": f"make paper ONLY={name}"}
            shown = shown_item(item, sources) | {"text": read_text(report), "links": [sources.link(report)]}
            shown["images"] = [
                {"caption": path.parent.name, "whose": whose, "src": image_uri(path)}
                for path in sorted(report.parent.rglob("*.png"))
            ]
            found.append(shown | {"state": whose})
    return found


def _tally(items: list[dict]) -> dict[str, dict[str, int]]:
    """How often each verdict was given, on the authors' rows and on ours."""
    rows = [row for item in items for row in item["statements"] if row["open"]]
    found = {"the authors' rows": [entry["verdict"] for row in rows for entry in row["authors"]]}
    found["ours"] = [row["ours"]["verdict"] if row["ours"] else NOT_MEASURED for row in rows]
    return {
        whose: {verdict: said.count(verdict) for verdict in dict.fromkeys([*VERDICTS, *said])}
        for whose, said in found.items()
    }


_LOGIT = {"value": "", "low": "_low", "high": "_high"}


def _effects(folder: Path) -> list[dict]:
    """What matching the task and the domain adds in the authors' rows, a row a model."""
    rows = []
    for path in sorted(folder.glob("*/effects.json"), reverse=True):
        found, row = read_json(path), {"model": path.parent.name}
        for name in ("task_match", "domain_match", "task_minus_domain"):
            effect = found[name]
            row[name] = number_text(effect | {"value": effect["points"]}, "points")
            logit = {key: effect.get(f"logit{end}") for key, end in _LOGIT.items()}
            row[f"{name}_logit"] = number_text(logit, "log odds")
            if effect.get("p") is not None:
                row[f"{name}_p"] = f"p = {effect['p']:.2g}, of {effect['permutations']} ways"
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
