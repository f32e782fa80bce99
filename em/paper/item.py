"""A figure or table of the paper as the page shows it: what is stated, what was measured, and from where."""

import os
from pathlib import Path

from em.experiments import comparison
from em.files import read_json, read_record
from em.paper import ours
from em.paper.wording import image_uri, number_text, stated_text
from em.verdict import BROKEN, LEVEL, verdict
from em.world.describe import worked_example
from em.world.tasks import TASKS, answers
from em.world.world import WORLDS, build_world

PAPER_MODELS = ("qwen2.5-14b", "llama3.1-8b", "olmo3-7b", "qwen3-14b")
REDUCED = {"1": "demo", "2": "demo2"}  # the reduced world that stands in for each of the paper's
OURS, DEMONSTRATION = "ours", "demonstration"
STATES = {
    "ours": "ours, at full size",
    "authors": "the authors' published rows",
    "demonstration": "a demonstration: a reduced world, or another model",
    "none": "not measured",
}


class Sources:
    """What there is to show: read once, looked up by every item."""

    def __init__(self, runs: Path, model: str, tables: Path, results: Path, beside: Path):
        self.folder, self.model, self.results, self.beside = runs, model, results, beside
        self.tables = ours.read_index(tables)
        path = results / "authors" / "statements.json"
        self.statements = read_json(path, kind=list) if path.exists() else []
        self.worlds = {world: _world(world, runs, results) for world in REDUCED}
        self.runs = ours.runs_of(runs)

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


def shown_item(item: dict, sources: Sources) -> dict:
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
    of = item["models"] if sources.model in PAPER_MODELS else [sources.model]
    runs = sources.runs[item["runs"]] if "runs" in item else []
    shown["runs"] = [sources.link(folder) for folder, model in runs if ours.is_of(model, of)]
    shown["state"] = _state(shown)
    return shown


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
        said = _DIRECTION.get(said, said) if side else LEVEL
    text = number_text(found, stated["unit"] if same_unit else "nats")
    return {"text": text, "verdict": said, "whose": whose, "model": found["model"]}


def _of_world(stated: dict, sources: Sources) -> dict | None:
    """From a world's report, with its verdict: of a reduced world on all but levels."""
    if sources.worlds[stated["world"]] is None:
        return None
    report = sources.worlds[stated["world"]][1]
    row = next(r for r in report["rows"] if (r["source"], r["claim"]) == (stated["where"], stated["claim"]))
    if row["ours"] is None:
        return None
    value = {"value": row["ours"], "low": row["ours_low"], "high": row["ours_high"]}
    broken = f", {row['incoherent']:.0f} % incoherent" if row["verdict"] == BROKEN else ""
    return {
        "text": f"{number_text(value, stated['unit'])}, {row['interval_over']}{broken}",
        "verdict": row["verdict"],
        "whose": DEMONSTRATION if report["reduced"] else OURS,
        "model": f"world {report['world']}",
    }


def _setting(stated: dict, sources: Sources) -> dict | None:
    """The same setting of the first misaligned run of the model."""
    runs = [folder for folder, model in sources.runs["misaligned"] if ours.is_of(model, [sources.model])]
    if not runs:
        return None
    value = read_record(runs[0])["settings"].get(stated["key"])
    return {
        "text": f"{value:g}" if isinstance(value, int | float) else f"{value}",
        "verdict": "as stated" if value == stated["value"] else "another setting",
        "whose": OURS if sources.model in PAPER_MODELS else DEMONSTRATION,
        "model": runs[0].name,
    }


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
