"""The page: every figure and table of the paper in order, the authors' published rows and ours beside it.

    python -m em.paper.page --runs runs --model qwen2.5-14b --out results/paper.html

One file, no script, nothing loaded from elsewhere. What is ours comes from three places: the tables that
`evaluate.py compare --paper` writes for the natural-language half, the reports of the synthetic worlds, and
the pages of this repository's `results/` where there is no run of full size, which are said to be reduced.
"""

import base64
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from em.cli import command_line, knob
from em.errors import UserError
from em.experiments import comparison
from em.files import read_json, read_text, write_text
from em.paper import ours
from em.paper.stated import NOT_MEASURED, VERDICTS, read_items, verdict
from em.world.describe import worked_example
from em.world.tasks import TASKS, answers
from em.world.world import WORLDS, build_world

RESULTS = Path(__file__).parents[2] / "results"
TEMPLATE = Path(__file__).with_name("page.html")
WIDEST = 1200  # pixels of an image on the page
PAPER_MODELS = ("qwen2.5-14b", "llama3.1-8b", "olmo3-7b", "qwen3-14b")
REDUCED = {"1": "demo", "2": "demo2"}  # the reduced world that stands in for each of the paper's


@dataclass
class Config:
    runs: str = knob("runs", "folder of the runs", "what")
    model: str = knob("qwen2.5-14b", "model of the natural-language runs", "what")
    tables: str | None = knob(
        None, "folder that `evaluate.py compare --paper` wrote (default: RUNS/paper)", "what"
    )
    out: str = knob(str(RESULTS / "paper.html"), "the page", "what")


def main(cfg: Config) -> None:
    tables = Path(cfg.tables) if cfg.tables else Path(cfg.runs) / "paper"
    items = write_page(Path(cfg.runs), cfg.model, Path(cfg.out), tables)
    states = [item["state"] for item in items]
    for state, words in STATES.items():
        print(f"{states.count(state):3d}  {words}")
    print(f"page: {cfg.out}")


OURS, DEMONSTRATION = "ours", "demonstration"
STATES = {
    "ours": "ours, at full size",
    "authors": "the authors' published rows",
    "demonstration": "a demonstration: a reduced world, or another model",
    "none": "not measured",
}


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
    items = [_item(item, sources) for item in read_items()]
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


class Sources:
    """What there is to show: read once, looked up by every item."""

    def __init__(self, runs: Path, model: str, tables: Path, results: Path, beside: Path):
        self.folder, self.model, self.results, self.beside = runs, model, results, beside
        self.tables = ours.read_index(tables)
        path = results / "authors" / "statements.json"
        self.statements = read_json(path, kind=list) if path.exists() else []
        self.worlds = {world: _world(world, runs, results) for world in REDUCED}
        self.runs = ours.runs_of(runs, model)

    def link(self, path: Path) -> dict:
        return {"href": Path(os.path.relpath(path, self.beside)).as_posix(), "text": path.name}


def _world(world: str, runs: Path, results: Path) -> tuple[Path, dict] | None:
    """(folder, report) of a world of the paper: at full size if anything of it is there, else reduced."""
    places = [(runs, world), (runs, REDUCED[world]), (results / "worlds_demo", REDUCED[world])]
    for folder, name in places:
        report = comparison.compare(folder, name)
        if report["figures"] or any(row["ours"] is not None for row in report["rows"]):
            return folder, report
    return None


# -- one item ----------------------------------------------------------------------------------------------


def _item(item: dict, sources: Sources) -> dict:
    """An item as the template shows it."""
    shown = item | {"images": [], "tables": [], "links": [], "notes": [], "text": "", "runs": []}
    shown["command"] = item.get("command") or _command(item, sources.model)
    shown["statements"] = [_statement(stated, item, sources) for stated in item["stated"]]
    _add_authors(shown, sources)
    _add_worlds(shown, sources)
    _add_tables(shown, sources)
    _add_settings(shown)
    for file, caption in item.get("also", []):
        path = sources.results / file
        if path.exists():
            shown["images"].append({"caption": caption, "whose": DEMONSTRATION, "src": image_uri(path)})
            shown["links"].append(sources.link(path))
    if item.get("runs") and sources.model in item["models"]:
        shown["runs"] = [sources.link(folder) for folder, _ in sources.runs[item["runs"]]]
    shown["state"] = _state(shown)
    return shown


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
            found.append(_item(about | {"id": name, "name": title, "title": rest.rstrip(".")}, sources))
    whose = OURS if sources.model in PAPER_MODELS else DEMONSTRATION
    for name, (title, what) in BEYOND.items():
        for report in sorted((sources.folder / name).rglob("*.md")):
            place = report.parent.relative_to(sources.folder).as_posix().replace("/", "-")
            item = about | {"id": place, "name": title, "title": what, "command": f"make paper ONLY={name}"}
            shown = _item(item, sources) | {"text": read_text(report), "links": [sources.link(report)]}
            shown["images"] = [
                {"caption": path.parent.name, "whose": whose, "src": image_uri(path)}
                for path in sorted(report.parent.rglob("*.png"))
            ]
            found.append(shown | {"state": whose})
    return found


def _command(item: dict, model: str) -> str:
    paper = item["models"][0] if item["models"] else "llama3.1-8b"
    return f"make paper MODEL={model if model in item['models'] else paper} ONLY={item['id']}"


def _state(shown: dict) -> str:
    """The best that there is of an item, a key of STATES."""
    whose = {part["whose"] for kind in ("images", "tables") for part in shown[kind]}
    whose |= {row["ours"]["whose"] for row in shown["statements"] if row["ours"]}
    whose |= {OURS} if shown["text"] else set()
    return next((state for state in STATES if state in whose), "none")


def _statement(stated: dict, item: dict, sources: Sources) -> dict:
    """A row of an item's table: what is stated, and both measurements with their verdicts."""
    row = {"what": stated["what"], "words": stated.get("words", ""), "where": stated["where"]}
    row |= {"stated": stated_text(stated), "authors": [], "ours": None, "open": "low" in stated}
    for found in sources.statements:
        if (found["figure"], found["what"]) == (item["name"], stated["what"]):
            value = {key: found[f"authors_{key}"] for key in ("value", "low", "high")}
            value |= {"of": found.get("authors_of")}
            text = number_text(value, found["unit"])
            row["authors"].append({"model": found["model"], "text": text, "verdict": found["verdict"]})
    if "world" in stated:
        row["ours"] = _of_world(stated, sources)
    elif "key" in stated:
        row["ours"] = _setting(stated, sources)
    elif "measure" in stated:
        row["ours"] = _measured(stated, item, sources)
    return row


_DIRECTION = {
    "agrees": "same direction",
    "differs": "opposite direction",
    "not resolved": "direction not resolved",
}


def _measured(stated: dict, item: dict, sources: Sources) -> dict | None:
    """From the tables of compare. Another model than the paper's, or margins, are held to a side only."""
    found = ours.measured(stated["measure"], item["id"], sources.tables)
    if found is None:
        return None
    same_unit, said = found["unit"] in ("%", "r"), verdict(stated, found)
    whose = OURS if same_unit and ours.is_of(found["model"], item["models"]) else DEMONSTRATION
    if whose == DEMONSTRATION:
        side = None in (stated["low"], stated["high"])
        said = _DIRECTION.get(said, said) if side else "a level, not compared"
    text = number_text(found, stated["unit"] if same_unit else "nats")
    return {"text": text, "verdict": said, "whose": whose, "model": found["model"]}


def _of_world(stated: dict, sources: Sources) -> dict | None:
    """From a world's report, whose verdict stands where the world is a reduced one: the direction only."""
    if sources.worlds[stated["world"]] is None:
        return None
    report = sources.worlds[stated["world"]][1]
    row = next(r for r in report["rows"] if (r["source"], r["claim"]) == (stated["where"], stated["claim"]))
    if row["ours"] is None:
        return None
    value = {"value": row["ours"], "low": row["ours_low"], "high": row["ours_high"]}
    reduced = report["reduced"]
    return {
        "text": f"{number_text(value, stated['unit'])}, {row['interval_over']}",
        "verdict": row["verdict"] if reduced else verdict(stated, value),
        "whose": DEMONSTRATION if reduced else OURS,
        "model": f"world {report['world']}",
    }


def _setting(stated: dict, sources: Sources) -> dict | None:
    """The same setting of the first misaligned run of the model."""
    for folder, settings in sources.runs["misaligned"][:1]:
        value = settings.get(stated["key"])
        said = "as stated" if value == stated["value"] else "another setting"
        whose = OURS if sources.model in PAPER_MODELS else DEMONSTRATION
        return {"text": f"{value:g}" if isinstance(value, int | float) else f"{value}", "verdict": said,
                "whose": whose, "model": folder.name}  # fmt: skip
    return None


# -- what an item is given -----------------------------------------------------------------------------------


def _add_authors(shown: dict, sources: Sources) -> None:
    for model in shown["models"]:
        for name in shown.get("authors", []):
            path = sources.results / "authors" / model / f"{name}.png"
            if path.exists():
                caption = f"The authors' judged rows, {model}, with our intervals"
                shown["images"].append({"caption": caption, "whose": "authors", "src": image_uri(path)})
                shown["links"].append(sources.link(path.with_suffix(".json")))


def _add_worlds(shown: dict, sources: Sources) -> None:
    for world, name in shown.get("worlds", []):
        if sources.worlds[world] is None:
            continue
        folder, report = sources.worlds[world]
        of_name = [file for file in report["figures"] if Path(file).stem == name]
        for file in of_name[:1]:
            caption = f"World {report['world']}" + (", a reduced world" if report["reduced"] else "")
            caption += f", the first of {len(of_name)} world seeds" if len(of_name) > 1 else ""
            whose = DEMONSTRATION if report["reduced"] else OURS
            shown["images"].append({"caption": caption, "whose": whose, "src": image_uri(folder / file)})
        shown["links"] += [sources.link((folder / file).parent) for file in of_name]


def _add_tables(shown: dict, sources: Sources) -> None:
    """What compare wrote: a table's grids, a figure's image."""
    for entry in sources.tables.get(shown["id"], []):
        parts, images = entry["parts"], [path for path in entry["files"] if path.suffix == ".png"]
        same = all(p["unit"] in ours.UNITS and ours.is_of(p["model"], shown["models"]) for p in parts)
        whose = OURS if same else DEMONSTRATION
        for path in images:
            caption = f"Ours: {entry['title']}"
            shown["images"].append({"caption": caption, "whose": whose, "src": image_uri(path)})
        shown["tables"] += [ours.grid(part) | {"whose": whose} for part in parts if not images]
        shown["links"] += [sources.link(path) for path in entry["files"]]
        shown["notes"] += entry["notes"] + [f"Still missing: {what}." for what in entry["needs"]]


def _add_settings(shown: dict) -> None:
    """What needs no run: Figure 1's example and Table 6's functions."""
    if shown["id"] == "figure1":
        shown["text"] = worked_example(build_world(WORLDS["1"], seed=0), cell=0)
        shown["notes"].append("World 1 of ours, seed 0. The model sees the words only, never the steps.")
    elif shown["id"] == "table6":
        walk, set1 = (5, 2, 5, 9, 7, 2), (2, 7)
        rows = [
            [f"T{i}", function, *(" ".join(map(str, steps)) for steps in answers(function, walk, set1))]
            for i, function in enumerate(TASKS[:8])
        ]
        title = f"Our reconstruction, on the walk {' '.join(map(str, walk))} with set 1 = {{2, 7}}"
        header = ["task", "function", "variant 1", "variant 2"]
        shown["tables"].append({"title": title, "header": header, "rows": rows, "whose": OURS})
    if "ours" in shown:
        shown["notes"].append(f"Ours: {shown.pop('ours')}.")


# -- text and images -----------------------------------------------------------------------------------------


_SIGN = {"%": " %", "points": " points", "nats": " nats"}  # the others are numbers alone


def number(value: float, unit: str) -> str:
    """`6.7`, points and margins with their sign, ratios and correlations with two places."""
    places = {"%": ".1f", "points": "+.1f", "nats": "+.2f"}.get(unit, ".2f")
    return f"{value:{places}}".replace("-", "−")


def number_text(value: dict, unit: str) -> str:
    """`6.7 % [5.1, 8.4]`; where a share counts rows, `8 of 12: 66.7 % [39.1, 86.2]`."""
    if value["value"] is None:
        return "n/a"
    text = f"{value['of']}: " if value.get("of") else ""
    text += number(value["value"], unit) + _SIGN.get(unit, "")
    if value["low"] is not None:
        text += f" [{number(value['low'], unit)}, {number(value['high'], unit)}]"
    return text


def stated_text(stated: dict) -> str:
    """The stated figure: a value, a range, a side, or words."""
    if "text" in stated:
        return stated["text"]
    if "value" in stated:
        return f"{stated['value']:g}"
    low, high, unit = stated["low"], stated["high"], stated["unit"]
    sign = _SIGN.get(unit, "")
    if low is None and high is None:
        return "no value in the text"
    if high is None or (unit == "%" and high == 100):
        return f"{'>' if low == 0 else '≥'} {low:g}{sign}"
    if low is None or (unit == "%" and low == 0 and high > 0):
        return f"≤ {high:g}{sign}"
    if low == high:
        return f"{low:g}{sign}"
    return (f"±{high:g}" if low == -high else f"{low:g} … {high:g}") + sign


def image_uri(path: Path) -> str:
    """A PNG file as a data URI: no wider than WIDEST, 64 colours, which is enough for charts."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is no image that can be read ({error}); write it again") from error
    if picture.width > WIDEST:
        size = WIDEST, round(picture.height * WIDEST / picture.width)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.quantize(64, Image.Quantize.FASTOCTREE).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


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
            if "p" in effect:
                row[f"{name}_p"] = f"p = {effect['p']:.2g}, of {effect['permutations']} ways"
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
