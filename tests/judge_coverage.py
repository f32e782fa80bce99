"""How often intervals of two judges' agreement hold the truth, over samples from judges that are known.

    PYTHONPATH=. python tests/judge_coverage.py 2000     # by hand: a table over rates, kappas and designs

A prompt has `per_prompt` responses; with chance `alike` all of a prompt's responses have its first one's
verdicts. Each judge leaves 3 % of the rows unscored, independently of all else. Judge A has judged `beyond`
times as many further prompts, so the re-scaled rate is not B's own.
"""

import itertools
import sys

import numpy as np

from em.report.confusion import (
    PromptDraws,
    by_prompt,
    interval,
    kappa_of_table,
    rate_of_counts,
    rescaled_rate,
)

UNSCORED = 0.03


def truth(rate_a: float, rate_b: float, kappa: float) -> np.ndarray:
    """(3, 3) chances of the pairs of verdicts with these EM rates and this kappa among the scored."""
    chance = rate_a * rate_b + (1 - rate_a) * (1 - rate_b)
    both = (kappa * (1 - chance) + chance - 1 + rate_a + rate_b) / 2
    scored = np.array([[both, rate_a - both], [rate_b - both, 1 - rate_a - rate_b + both]])
    assert scored.min() >= 0, "no judges have these rates and this kappa"
    table = np.zeros((3, 3))
    table[:2, :2] = scored * (1 - UNSCORED) ** 2
    table[:2, 2] = scored.sum(axis=1) * (1 - UNSCORED) * UNSCORED
    table[2, :2] = scored.sum(axis=0) * (1 - UNSCORED) * UNSCORED
    table[2, 2] = UNSCORED**2
    return table


def coverage(
    rate_a, rate_b, kappa, rows=400, per_prompt=1, alike=0.0, beyond=10, repeats=500, draws=1000, seed=0
) -> dict[str, float]:
    """The share of `repeats` intervals that hold the truth: of A's rate, of kappa, of A's rate under B."""
    rng = np.random.default_rng(seed)
    table, prompts = truth(rate_a, rate_b, kappa), rows // per_prompt
    everything = prompts * (1 + beyond)
    sampler = PromptDraws(everything, draws)
    hits = dict.fromkeys(("rate", "kappa", "rescaled"), 0)
    prompt = np.repeat(np.arange(everything), per_prompt)
    for _ in range(repeats):
        pairs = rng.choice(9, (everything, per_prompt), p=table.ravel())
        pairs = np.where(rng.random((everything, 1)) < alike, pairs[:, :1], pairs).ravel()
        known = by_prompt(prompt, pairs // 3, (3,), everything)
        seen = by_prompt(prompt[:rows], pairs[:rows], (3, 3), everything)
        drawn, drawn_known, total = sampler.tables(seen), sampler.tables(known), seen.sum(axis=0)
        for name, value, draw, true in (
            ("rate", rate_of_counts(known.sum(axis=0)), rate_of_counts(drawn_known), rate_a),
            ("kappa", kappa_of_table(total), kappa_of_table(drawn), kappa),
            ("rescaled", rescaled_rate(known.sum(axis=0), total), rescaled_rate(drawn_known, drawn), rate_b),
        ):
            low, high = interval(draw, value)
            hits[name] += low <= true <= high
    return {name: count / repeats for name, count in hits.items()}


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print("rate A  rate B  kappa  rows a prompt (alike)   rate  kappa  re-scaled")
    for rate, ratio, kappa in itertools.product((0.005, 0.05, 0.2), (1.0, 0.5), (0.3, 0.6, 0.9)):
        for per_prompt, alike in ((1, 0.0), (4, 0.5)):
            try:
                design = {"per_prompt": per_prompt, "alike": alike, "repeats": repeats}
                found = coverage(rate, rate * ratio, kappa, **design)
            except AssertionError:
                continue
            design = f"{rate:6.3f}  {rate * ratio:6.4f}  {kappa:5.1f}  {per_prompt:6d} ({alike:.1f})"
            print(design + " " * 15 + "  ".join(f"{value:.3f}" for value in found.values()), flush=True)
