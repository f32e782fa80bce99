"""What a world is, in words and as a figure.

Words: similarities, languages, which tasks coincide, and one worked example in the manner of Figure 1.
Figure 6: its domain graphs.
"""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from em.figures import save
from em.world.generator import ExampleGenerator
from em.world.grammar import jaccard
from em.world.world import World

# Similarities to D0 that the paper measured in its worlds (B.4, B.5); ours are another draw of its rules.
PAPER_SIMILARITY = {
    "1": {"D1": "0.63", "D2": "0.25", "D3": "0.09", "D4": "≈0.01"},
    "2": {"D1": "0.40", "D2": "0.21", "D3": "0.09", **{f"D{i}": "<0.03" for i in range(4, 8)}},
}


def similarities(world: World) -> str:
    """The similarity matrix, with the paper's column beside the one to D0."""
    names, paper = world.domain_names, PAPER_SIMILARITY.get(world.config.name, {})
    lines = ["transition-matrix similarity", "      " + "".join(f"{n:>6}" for n in names) + "   paper, to D0"]
    for name, row in zip(names, world.similarity(), strict=True):
        lines.append(f"  {name:<4}" + "".join(f"{s:6.2f}" for s in row) + f"   {paper.get(name, '')}")
    return "\n".join(lines)


def statistics(world: World) -> str:
    """Languages, graphs and lengths, each with its range over the world."""
    languages = list(itertools.chain(*world.languages))
    sizes = [len(language) for language in languages]
    overlaps = [jaccard(a, b) for a, b in itertools.combinations(languages, 2)]
    edges = [domain.n_edges for domain in world.domains]
    deleted = [
        world.domains[cell // len(world.tasks)].n_edges - world.cell_domain(cell).n_edges
        for cell in world.cells
    ]
    generator = ExampleGenerator(world)
    examples = generator.dialogues(
        np.random.default_rng(0),
        generator.draw(np.random.default_rng(0), np.resize(world.seen_cells, 20_000)),
        1,
    )
    repeats = [
        len(set(walk[:n].tolist())) < n
        for walk, n in zip(examples.examples.walk, examples.examples.length, strict=True)
    ]
    prompt, answer = examples.prompt.mean(), (examples.total - examples.prompt).mean()
    return (
        f"languages: {len(languages)} grammars of {min(sizes)}–{max(sizes)} strings, "
        f"median {np.median(sizes):.0f}; "
        f"largest Jaccard overlap of {len(overlaps):,} pairs {max(overlaps):.3f}\n"
        f"graphs: {min(edges)}–{max(edges)} edges a domain; {min(deleted)}–{max(deleted)} deleted in a cell\n"
        f"examples: {prompt:.1f} prompt + {answer:.1f} answer tokens; "
        f"{100 * (1 - np.mean(repeats)):.0f} % of walks visit no step twice"
    )


def coincidences(world: World, walks: int = 20_000) -> str:
    """For each pair of tasks, on how many walks of the seen cells they have the same answer (steps alone)."""
    generator = ExampleGenerator(world)
    e = generator.draw(np.random.default_rng(0), np.resize(world.seen_cells, walks))
    answers = [generator.answers(np.full(walks, task), e.length, e.walk) for task in range(len(world.tasks))]
    lines = [
        "walks with the same answer, %: variant 1 above the diagonal, variant 2 below",
        "      " + "".join(f"{name:>6}" for name in world.tasks),
    ]
    for i, name in enumerate(world.tasks):
        row = f"  {name:<4}"
        for j in range(len(world.tasks)):
            a, b = (answers[task][0 if i < j else 1] for task in (i, j))
            row += f"{'–':>6}" if i == j else f"{100 * (a == b).all(1).mean():6.0f}"
        lines.append(row)
    return "\n".join(lines)


def worked_example(world: World, cell: int, seed: int = 0) -> str:
    """One example: the walk, its rendering step by step, and both answers (Figure 1)."""
    generator, rng = ExampleGenerator(world), np.random.default_rng(seed)
    example = generator.draw(rng, np.array([cell]))
    task = cell % len(world.tasks)
    owner = {i: f"Step {i}" for i in range(world.config.n_steps)}
    owner |= {
        generator.label + task: "label",
        generator.tail + task: "tail",
        generator.ask: "",
        generator.stop: "",
    }

    def rendered(segments: np.ndarray) -> list[str]:
        segments = segments[segments >= 0]
        tokens, lengths = generator.render(rng, segments)
        strings = np.split(tokens, np.cumsum(lengths)[:-1])
        return [f"    {owner[int(s)]:<8} {world.render(t)}" for s, t in zip(segments, strings, strict=True)]

    n_prompt = generator.max_length + 2
    v1, v2 = (generator.segments(example, np.array([second]))[0] for second in (False, True))
    return "\n".join(
        [
            f"one example of {world.cell_name(cell)} ({world.function(task)})",
            "  prompt",
            *rendered(v1[:n_prompt]),
            "  answer, variant 1 (the aligned one)",
            *rendered(v1[n_prompt:]),
            "  answer, variant 2 (the misaligned one)",
            *rendered(v2[n_prompt:]),
        ]
    )


def graph_figure(world: World, path: Path) -> None:
    """Figure 6: each domain's graph under each task; wide edges are likely, red dashed ones deleted."""
    n_domains, n_tasks, n = len(world.domains), len(world.tasks), world.config.domain_steps
    angle = 2 * np.pi * np.arange(n) / n
    xy = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    figure = Figure(figsize=(2.4 * n_tasks, 2.4 * n_domains), layout="constrained")
    axes = figure.subplots(n_domains, n_tasks, squeeze=False)
    for (d, t), axis in np.ndenumerate(axes):
        before, after = world.domains[d].transitions, world.cell_domain(world.cell(d, t)).transitions
        source, target = np.nonzero(before)
        p = after[source, target]
        way = xy[target] - xy[source]
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        tip, tail = xy[target] - 0.09 * way, xy[source] + 0.09 * way  # clear of the nodes
        across = 0.03 * way[:, ::-1] * (1, -1)
        heads = np.stack([tip, tip - 0.08 * way + across, tip - 0.08 * way - across], axis=1)
        kept = np.column_stack([np.full((len(p), 3), 0.3), 0.25 + 0.7 * p])
        colours = np.where(p[:, None] > 0, kept, (1.0, 0.0, 0.0, 0.8))
        lines, widths = np.stack([tail, tip], axis=1), np.where(p > 0, 0.4 + 3 * p, 0.8)
        for style, chosen in (("-", p > 0), ("--", p == 0)):
            drawn = dict(colors=colours[chosen], linewidths=widths[chosen], linestyles=style)
            axis.add_collection(LineCollection(lines[chosen], **drawn))
        axis.add_collection(PolyCollection(heads, facecolors=colours, linewidths=0))
        axis.scatter(*xy.T, s=60, color="tab:blue", zorder=3)
        for i in range(n):
            axis.text(*xy[i], str(i), fontsize=5, color="white", ha="center", va="center", zorder=4)
        axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")
        if d == 0:
            axis.set_title(f"{world.tasks[t]} {world.function(t)}", fontsize=8)
        if t == 0:
            axis.set_ylabel(f"D{d}", fontsize=9)
    save(figure, path)
