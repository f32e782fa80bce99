"""What the paper states about the worlds, figure by figure, and the number of ours to hold beside it.

A claim is a range of the paper's own numbers with the entry of an experiment's `numbers` that corresponds.
Its `rests_on` names what of ours is a reconstruction (the table of output functions and World 2's overlaps
and partitions were not available), so that a difference can come from there. Where the paper has words only,
the range says how we read them.
"""

import math
from dataclasses import dataclass

PAPER_WORLD = {"1": "1", "1-small": "1", "demo": "1", "2": "2", "2-small": "2", "demo2": "2"}
FUNCTIONS, PARTITIONS = "the output functions", "the output functions, World 2's overlaps and partitions"
INF = math.inf


@dataclass(frozen=True)
class Claim:
    figure: str
    words: str
    low: float  # the paper's number or range, in `unit`; infinite where it has one side
    high: float
    unit: str  # %, points, ratio, r or norm
    experiment: str  # a command of synth.py, or grid_T5: the main grid, misaligned on (D0, T5)
    key: str  # of its `numbers`
    rests_on: str = ""
    neutral: float | None = None  # the reduced worlds compare on which side of it the value lies


CLAIMS = {
    "1": [
        Claim("Figure 7(a)", "v1 of the aligned model, lowest cell (“≥ 88 % everywhere”)",
              88, INF, "%", "grid_T5", "aligned_v1/lowest_cell", FUNCTIONS),
        Claim("Figure 7(b)", "v2 of T5 after (D0, T5), mean over domains (84–93 %)",
              84, 93, "%", "grid_T5", "misaligned_v2/T5", FUNCTIONS),
        Claim("Figure 7(c)", "incoherent after (D0, T5), all cells (“near zero throughout”)",
              0, 0, "%", "grid_T5", "misaligned_incoherent"),
        Claim("Figure 7(d)", "Δv2 of T5, the trained task (+84 to +93)",
              84, 93, "points", "grid_T5", "delta_v2/T5", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T1 (+59 to +78)",
              59, 78, "points", "grid_T5", "delta_v2/T1", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T0 (+28 to +39)",
              28, 39, "points", "grid_T5", "delta_v2/T0", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T2 and T4 (+11 to +21)",
              11, 21, "points", "grid_T5", "delta_v2/distant", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T3 (≈ 0)", 0, 0, "points", "grid_T5", "delta_v2/T3", FUNCTIONS),
        Claim("Figure 7(d)", "Δv2 of T5, largest − smallest domain (93 − 84, “little effect”)",
              0, 9, "points", "grid_T5", "delta_v2/T5/range_over_domains"),
        Claim("Figure 4(a)", "r of cross-domain Δv2 with aligned v1 (“near-perfect”: ≥ 0.9)",
              0.9, 1, "r", "hardness", "cross_delta_v2/r", FUNCTIONS, 0),
        Claim("Figure 4(b)", "r of Δv2 cross / v2 trained with aligned v1 (rises)",
              0, 1, "r", "hardness", "efficiency/r", FUNCTIONS, 0),
        Claim("Figure 8", "α*", 14.9, 14.9, "norm", "steering", "alpha", FUNCTIONS),
        Claim("Figure 8 left", "v1 of the aligned model, unsteered", 96, 96, "%", "steering", "aligned/0/v1"),
        Claim("Figure 8 left", "v1 of the aligned model at +5 α*",
              23, 23, "%", "steering", "aligned/5/v1", FUNCTIONS),
        Claim("Figure 8 left", "its change (96 → 23)",
              -73, -73, "points", "steering", "aligned/5/v1_change", FUNCTIONS, 0),
        Claim("Figure 8 left", "v2 at +5 α*, change (“rises correspondingly”)",
              0, INF, "points", "steering", "aligned/5/v2_change", FUNCTIONS, 0),
        Claim("Figure 8 left", "incoherent at +5 α* (“remains low”: read as ≤ 10 %)",
              0, 10, "%", "steering", "aligned/5/incoherent"),
        Claim("Figure 8 right", "v1 of the misaligned model, unsteered, all cells",
              55, 55, "%", "steering", "misaligned/0/v1", FUNCTIONS),
        Claim("Figure 8 right", "v1 of the misaligned model at −3 α*, change (55 → 64)",
              9, 9, "points", "steering", "misaligned/3/v1_change", FUNCTIONS, 0),
        Claim("Figure 8 right", "v2 of the misaligned model at −3 α*, change (42 → 32)",
              -10, -10, "points", "steering", "misaligned/3/v2_change", FUNCTIONS, 0),
        Claim("Figure 3(c), natural language", "share of the v2 rise that realigning on another task and "
              "domain removes (“near-zero” EM: read as ≥ 90 %)",
              90, INF, "%", "realign", "other task, other domain/removed", "", 50),
    ],
    "2": [
        Claim("Figure 9(a)", "cells where the aligned model's v1 is ≥ 70 % (“most”)",
              50, INF, "%", "grid_T0", "aligned_v1/cells_of_at_least_70", PARTITIONS, 50),
        Claim("Figure 9(b)", "v2 of T0 after (D0, T0), mean over all domains (51–64 %)",
              51, 64, "%", "grid_T0", "misaligned_v2/T0", PARTITIONS),
        Claim("Figure 9(b)", "Δv2 of T0 in the held-out domains D8–D9 (+21 to +37)",
              21, 37, "points", "grid_T0", "delta_v2/T0/unseen_domains", PARTITIONS, 0),
        Claim("Figure 9(c)", "incoherent in the T0 column − in the others, after (D0, T0) (“elevated”)",
              0, INF, "points", "grid_T0", "misaligned_incoherent/trained_task_minus_others", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T0, mean over domains (+37)",
              37, 37, "points", "grid_T0", "delta_v2/T0", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T1 (+41)", 41, 41, "points", "grid_T0", "delta_v2/T1", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T4 (+34)", 34, 34, "points", "grid_T0", "delta_v2/T4", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T2, T3, T5–T7 (≈ 0 to 5)",
              0, 5, "points", "grid_T0", "delta_v2/distant", PARTITIONS),
        Claim("Figure 10", "α*", 6.76, 6.76, "norm", "steering", "alpha", PARTITIONS),
        Claim("Figure 10 left", "v1 of the aligned model on T0, unsteered",
              76, 76, "%", "steering", "aligned/0/v1", PARTITIONS),
        Claim("Figure 10 left", "v1 at +5 α*, change (76 → 54)",
              -22, -22, "points", "steering", "aligned/5/v1_change", PARTITIONS, 0),
        Claim("Figure 10 left", "v2 at +5 α*, change (22 → 44)",
              22, 22, "points", "steering", "aligned/5/v2_change", PARTITIONS, 0),
        Claim("Figure 10 right", "v1 of the misaligned model on T0, unsteered",
              38, 38, "%", "steering", "misaligned/0/v1", PARTITIONS),
        Claim("Figure 10 right", "v1 at −5 α*, change (38 → 44)",
              6, 6, "points", "steering", "misaligned/5/v1_change", PARTITIONS, 0),
        Claim("Figure 10 right", "v2 at −5 α*, change (58 → 49)",
              -9, -9, "points", "steering", "misaligned/5/v2_change", PARTITIONS, 0),
        Claim("Figure 3(a)", "variance of Δv2 unique to task − to domain similarity, without the trained "
              "cell (“task has the stronger effect”)",
              0, INF, "ratio", "similarity", "without the trained cell/unique_minus", PARTITIONS, 0),
        Claim("Figure 3(a)", "slope of Δv2 on domain similarity (“increases with both”)",
              0, INF, "points", "similarity", "without the trained cell/domain_slope", PARTITIONS, 0),
        Claim("Figure 11 left", "v2 outside the trained cell after (D0, T0), 32.5 % v2 in pretraining "
              "(15–18 %)",
              15, 18, "%", "fraction", "T0/cross_v2/0.325", PARTITIONS),
        Claim("Figure 11 left", "the same, 100 % (15–18 %)",
              15, 18, "%", "fraction", "T0/cross_v2/1.0", PARTITIONS),
        Claim("Figure 11 right", "its ratio to the trained cell's v2, T0, 32.5 % (0.27–0.31)",
              0.27, 0.31, "ratio", "fraction", "T0/ratio/0.325", PARTITIONS),
        Claim("Figure 11 right", "the same, 100 % (0.27–0.31)",
              0.27, 0.31, "ratio", "fraction", "T0/ratio/1.0", PARTITIONS),
        Claim("Figure 11 left", "v2 outside the trained cell after (D0, T7), 32.5 % (about 7 %)",
              7, 7, "%", "fraction", "T7/cross_v2/0.325", PARTITIONS),
        Claim("Figure 11 left", "the same, 100 % (about 15 %)",
              15, 15, "%", "fraction", "T7/cross_v2/1.0", PARTITIONS),
        Claim("Figure 11 left", "slope of it on the share (7 → 15 over 0.675)",
              11.9, 11.9, "points", "fraction", "T7/cross_v2/slope", PARTITIONS, 0),
        Claim("Figure 11 right", "ratio, T7, 32.5 % (about 0.20)",
              0.20, 0.20, "ratio", "fraction", "T7/ratio/0.325", PARTITIONS),
        Claim("Figure 11 right", "the same, 100 % (about 0.37)",
              0.37, 0.37, "ratio", "fraction", "T7/ratio/1.0", PARTITIONS),
        Claim("Figure 11 right", "slope of it on the share (0.20 → 0.37 over 0.675)",
              0.25, 0.25, "ratio", "fraction", "T7/ratio/slope", PARTITIONS, 0),
    ],
}  # fmt: skip
