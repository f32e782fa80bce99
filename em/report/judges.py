"""Several judges on one sample of responses: how far they agree, before anyone believes one of them.

    agreement.json            everything below
    judges.csv                each judge: its EM rate on the sample, what it could not score, its share
    agreement.csv             each pair of judges (`em.report.agreement.compare`), confusion.csv its verdicts
    thresholds.csv            each judge's EM rate as a function of either threshold
    agreement.md, agreement.png

Rates are in percent with the intervals of em/report/confusion.py.
"""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.errors import UserError
from em.figures import heatmap, save, title_of
from em.files import write_csv, write_json, write_text
from em.judge.em_rule import ALIGNED_BELOW, COHERENT_ABOVE, STATUSES
from em.report.agreement import compare, judge_share
from em.report.confusion import DRAWS, VERDICTS, PromptDraws, by_prompt, rate_entry, verdicts
from em.report.score_table import ScoreTable
from em.report.text import number_text, rate_text, share_text

THRESHOLDS = range(0, 101, 5)
FILES = [f"agreement.{kind}" for kind in ("json", "csv", "md", "png")]
FILES += ["judges.csv", "confusion.csv", "thresholds.csv"]


def write_agreement(
    table: ScoreTable, in_sample: np.ndarray, about: str, out: str | Path, draws: int = DRAWS
) -> dict:
    """Write the comparison of the judges of `table` into the folder `out` and return it.

    in_sample: (n,) bool, the rows that are compared; the others are what judges know beside it, which the
    re-scaled rates use. about: what the sample is, in a sentence. {"about", "judges", "pairs", "thresholds",
    "text"}. UserError where `out` cannot be written, or no two judges have a response in common.
    """
    known = [table.select(table.judge == judge) for judge in np.unique(table.judge)]
    sampled = [table.select((table.judge == judge) & in_sample) for judge in np.unique(table.judge)]
    pairs = []
    for i, j in itertools.combinations(range(len(known)), 2):
        pair = compare(sampled[i], sampled[j], (known[i], known[j]), draws)
        if pair:
            pairs.append(pair)
    if not pairs:
        raise UserError("no two of the judges have a response in common; name files of the same responses")
    judges, curves = [], []
    for rows, all_rows in zip(sampled, known, strict=True):
        prompts, place = np.unique(rows.prompt, return_inverse=True)
        sampler = PromptDraws(len(prompts), draws)
        name = rows.judges[rows.judge[0]]
        statuses = dict(
            zip(STATUSES, np.bincount(rows.status, minlength=len(STATUSES)).tolist(), strict=True)
        )
        entry = {
            "judge": name,
            "rows": len(rows),
            "scored": int(rows.scored.sum()),
            "em": int(rows.em().sum()),
        }
        entry |= rate_entry(by_prompt(place, verdicts(rows), (3,), len(prompts)), sampler)
        entry |= {"known": len(all_rows)} | {status: statuses[status] for status in STATUSES[1:]}
        judges.append(entry | (judge_share(pairs, name) or {}))
        for field, threshold in itertools.product(("aligned", "coherent"), THRESHOLDS):
            bound = {"below": threshold} if field == "aligned" else {"above": threshold}
            counts = by_prompt(place, verdicts(rows, **bound), (3,), len(prompts))
            where = {"judge": name, "field": field, "threshold": threshold, "em": int(counts[:, 0].sum())}
            curves.append(where | rate_entry(counts, sampler))
    result = {"about": about, "judges": judges, "pairs": pairs, "thresholds": curves}
    result["text"] = agreement_text(result)
    out = Path(out)
    write_json(out / "agreement.json", {k: v for k, v in result.items() if k != "text"})
    write_csv(out / "judges.csv", judges)
    write_csv(out / "agreement.csv", [_flat(pair) for pair in pairs])
    write_csv(out / "confusion.csv", list(itertools.chain.from_iterable(map(_cells, pairs))))
    write_csv(out / "thresholds.csv", curves)
    write_text(out / "agreement.md", result["text"])
    agreement_figure(result, out / "agreement.png")
    return result


def _flat(pair: dict) -> dict:
    return {key: value for key, value in pair.items() if not isinstance(value, list)}


def _cells(pair: dict) -> list[dict]:
    """The confusion, an entry a line."""
    both = {"judge_a": pair["judge_a"], "judge_b": pair["judge_b"]}
    return [
        both | {"a_says": VERDICTS[i], "b_says": VERDICTS[j], "responses": count}
        for i, row in enumerate(pair["confusion"])
        for j, count in enumerate(row)
    ]


# -- in words ----------------------------------------------------------------------------------------------


def _markdown(columns: list[str], rows: list[list]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "| --- " * len(columns) + "|", *lines[1:], ""]


def agreement_text(result: dict) -> str:
    """The tables as Markdown."""
    judges, pairs = result["judges"], result["pairs"]
    lines = ["# How far the judges agree", "", result["about"], ""]
    of_judge = []
    for j in judges:
        missing = ", ".join(f"{j[status]} {status}" for status in STATUSES[1:] if j[status]) or "none"
        share = "n/a" if j.get("share") is None else f"{100 * j['share']:.0f} %"
        of_judge.append([j["judge"], rate_text(j), j["em"], j["scored"], j["rows"], missing, share])
    columns = ["judge", "EM rate", "EM", "scored", "responses", "not scored", "judge's share"]
    lines += _markdown(columns, of_judge)
    first = next((j for j in judges if j.get("share") is not None), None)
    if first:
        lines += [share_text(first, f"of the uncertainty of {first['judge']}'s rate").strip(), ""]
    of_pair, turned = [], []
    for p in pairs:
        kappa = number_text(p["em_kappa"], p["em_kappa_low"], p["em_kappa_high"])
        ranks = [
            " / ".join(number_text(p[f"{field}_{kind}"]) for kind in ("spearman", "kendall"))
            for field in ("aligned", "coherent")
        ]
        of_pair.append([p["judge_a"], p["judge_b"], p["responses"], p["both_scored"], kappa, *ranks])
        for side, other in (("a", "b"), ("b", "a")):
            under = {key: p[f"{side}_as_{other}_{key}"] for key in ("rate", "low", "high")}
            own = "n/a" if p[f"{side}_known_rate"] is None else f"{p[f'{side}_known_rate']:.1f} %"
            own += f" of {p[f'{side}_known']:,}"
            turned.append([p[f"judge_{side}"], p[f"judge_{other}"], own, rate_text(under)])
    columns = ["A", "B", "responses", "both scored", "EM kappa", "aligned ρ / τ", "coherent ρ / τ"]
    lines += _markdown(columns, of_pair)
    lines += _markdown(["A", "B", "A's rate", "A's rate under B"], turned)
    lines += ["Who calls what EM, A down and B across:", ""]
    for p in pairs:
        rows = [[name, *row] for name, row in zip(VERDICTS, p["confusion"], strict=True)]
        lines += _markdown([f"{p['judge_a']} \\ {p['judge_b']}", *VERDICTS], rows)
    lines += [
        f"EM: aligned < {ALIGNED_BELOW} and coherent > {COHERENT_ABOVE}, among responses with both scores. "
        "Intervals are 95 %, over prompts. A's rate under B takes all that A has judged and lets each of its "
        "verdicts fall as B's do on the responses that both judged. ρ is Spearman's and τ is Kendall's rank "
        "correlation. The judge's share is that of the variance between judges in the variance of a rate, "
        "judges and prompts together. Other thresholds: thresholds.csv.",
        "",
    ]
    return "\n".join(lines)


# -- figure ------------------------------------------------------------------------------------------------


def agreement_figure(result: dict, path: Path) -> None:
    """Above: EM rate by either threshold, a line a judge. Below: who calls what EM, a panel a pair."""
    judges, pairs, columns = result["judges"], result["pairs"], 6
    depth = -(-len(pairs) // 3)
    figure = Figure(figsize=(11, 3.4 + 2.8 * depth))
    ratios = {"height_ratios": [3] + [2.4] * depth}
    grid = figure.add_gridspec(1 + depth, columns, **ratios, wspace=1.6, hspace=0.42)
    rule = {"aligned": f"aligned < c, coherent > {COHERENT_ABOVE}"}
    rule["coherent"] = f"aligned < {ALIGNED_BELOW}, coherent > c"
    paper = {"aligned": ALIGNED_BELOW, "coherent": COHERENT_ABOVE}
    for place, field in enumerate(rule):
        axis = figure.add_subplot(grid[0, 3 * place : 3 * place + 3])
        for number, judge in enumerate(judges):
            line = [e for e in result["thresholds"] if (e["judge"], e["field"]) == (judge["judge"], field)]
            x = [e["threshold"] for e in line]
            rate, low, high = (np.array([e[key] for e in line], float) for key in ("rate", "low", "high"))
            axis.plot(x, rate, color=f"C{number}", label=title_of(judge["judge"], 40))
            axis.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        axis.axvline(paper[field], color="0.5", linewidth=0.8, linestyle=":")
        axis.set(xlabel=f"threshold c: {rule[field]}", ylabel="EM %", xlim=(0, 100))
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))
        axis.spines[["top", "right"]].set_visible(False)
        if place == 0:
            axis.legend(fontsize=8, frameon=False)
            axis.set_title("EM rate by threshold, 95 % bands; dotted: the rule's", fontsize=10, loc="left")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, 3)
        axis = figure.add_subplot(grid[1 + row, 2 * column : 2 * column + 2])
        counts = np.array(pair["confusion"], float)
        shares = 100 * counts / max(1, counts.sum())
        text = [[f"{count:,.0f}" for count in line] for line in counts]
        heatmap(axis, shares, VERDICTS, VERDICTS, (0, 100), colours="Blues", text=text, size=9)
        axis.set(xlabel=title_of(pair["judge_b"], 40), ylabel=title_of(pair["judge_a"], 40))
        kappa = number_text(pair["em_kappa"], pair["em_kappa_low"], pair["em_kappa_high"])
        axis.set_title(f"EM kappa {kappa}, {pair['responses']:,} responses", fontsize=9, loc="left")
    save(figure, path)
