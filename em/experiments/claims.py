"""What the paper states about the worlds, figure by figure, and the number of ours to hold beside it.

A claim is a range of the paper's own numbers with the entry of an experiment's `numbers` that corresponds.
Its `rests_on` names what of ours is a reconstruction (the table of output functions and World 2's overlaps
and partitions were not available), so that a difference can come from there. Where the paper has words only,
the range says how we read them. The numbers of shared steps behind World 2's task similarities were lost with
the paper's formulas, so nothing is stated of them here.

A reduced world is held to what does not hang on its size: the side of `neutral` on which the paper's figure
lies, and that a quantity is flat. All else is a level, which is shown and not judged.
"""

import math
from dataclasses import dataclass

PAPER_WORLD = {"1": "1", "1-small": "1", "demo": "1", "2": "2", "demo2": "2"}
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
    neutral: float | None = None  # a reduced world is held to the side of it on which the paper's figure lies
    flat: bool = False  # low and high are a margin within which the whole interval must lie
    else_key: str = ""  # what corresponds in a world that has no such number

    def stated(self, reduced: bool = False) -> dict | None:
        """What em/verdict.py holds our number to; None where it is a level of a reduced world."""
        low, high = self.low, self.high
        if reduced and not self.flat:
            if self.neutral is None:
                return None
            low, high = (self.neutral, INF) if low + high > 2 * self.neutral else (-INF, self.neutral)
        bounds = (bound if math.isfinite(bound) else None for bound in (low, high))
        return dict(zip(("low", "high"), bounds, strict=True)) | {"unit": self.unit, "flat": self.flat}


CLAIMS = {
    "1": [
        Claim("Figure 7, B.4", "similarity of D1 to D0",
              0.63, 0.63, "ratio", "grid_T5", "domain_similarity/D1"),
        Claim("Figure 7, B.4", "similarity of D2 to D0",
              0.25, 0.25, "ratio", "grid_T5", "domain_similarity/D2"),
        Claim("Figure 7, B.4", "similarity of D3 to D0",
              0.09, 0.09, "ratio", "grid_T5", "domain_similarity/D3"),
        Claim("Figure 7, B.4", "similarity of D4 to D0 (≈ 0.01: read as ≤ 0.03)",
              -INF, 0.03, "ratio", "grid_T5", "domain_similarity/D4"),
        Claim("Figure 7(a)", "v1 of the aligned model, lowest cell (“≥ 88 % everywhere”)",
              88, INF, "%", "grid_T5", "aligned_v1/lowest_cell", FUNCTIONS),
        Claim("Figure 7(a)", "fall of v1 in T5 − the largest in another task (“drops sharply while other "
              "columns remain largely intact”)",
              0, INF, "points", "grid_T5", "v1_drop/trained_minus_largest_other", FUNCTIONS, 0),
        Claim("Figure 7(b)", "v2 of T5 after (D0, T5), mean over domains (84–93 %)",
              84, 93, "%", "grid_T5", "misaligned_v2/T5", FUNCTIONS),
        Claim("Figure 7(c)", "incoherent after (D0, T5), all cells (“near zero throughout”: read as ≤ 5 %)",
              -INF, 5, "%", "grid_T5", "misaligned_incoherent"),
        Claim("Figure 7(d)", "Δv2 of T5, the trained task (+84 to +93)",
              84, 93, "points", "grid_T5", "delta_v2/T5", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T5 in the unrelated domain, D4 (+84 to +93)",
              84, 93, "points", "grid_T5", "delta_v2/T5/D4", FUNCTIONS, 0, else_key="delta_v2/T5/D3"),
        Claim("Figure 7(d)", "Δv2 of T1 (+59 to +78)",
              59, 78, "points", "grid_T5", "delta_v2/T1", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T0 (+28 to +39)",
              28, 39, "points", "grid_T5", "delta_v2/T0", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T2 and T4 (+11 to +21)",
              11, 21, "points", "grid_T5", "delta_v2/distant", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T3 (≈ 0: read as ±5)",
              -5, 5, "points", "grid_T5", "delta_v2/T3", FUNCTIONS, flat=True),
        Claim("Figure 7(d)", "order of Δv2: T5 − T1 (“T5 shows the largest shift”)",
              0, INF, "points", "grid_T5", "order/T5_minus_T1", FUNCTIONS, 0),
        Claim("Figure 7(d)", "order of Δv2: T1 − T0 (59–78 against 28–39)",
              0, INF, "points", "grid_T5", "order/T1_minus_T0", FUNCTIONS, 0),
        Claim("Figure 7(d)", "order of Δv2: T0 − T2 and T4 (28–39 against 11–21)",
              0, INF, "points", "grid_T5", "order/T0_minus_distant", FUNCTIONS, 0),
        Claim("Figure 7(d)", "Δv2 of T5, largest − smallest domain (93 − 84, “little effect”)",
              0, 9, "points", "grid_T5", "delta_v2/T5/range_over_domains"),
        Claim("Figure 4(a)", "r of cross-domain Δv2 with aligned v1, over tasks (“near-perfect”: ≥ 0.9)",
              0.9, 1, "r", "hardness", "cross_delta_v2/r", FUNCTIONS, 0),
        Claim("Figure 4(a)", "r of cross-domain Δv2 with aligned v1, within a task, over checkpoints (ours)",
              0, INF, "r", "hardness", "cross_delta_v2/r_within", FUNCTIONS, 0),
        Claim("Figure 4(a)", "r of cross-domain Δv2 with aligned v1, of these tasks, over worlds (ours)",
              0, INF, "r", "hardness", "cross_delta_v2/r_these_tasks", FUNCTIONS, 0),
        Claim("Figure 4(b)", "r of Δv2 cross / v2 trained with aligned v1, over tasks (rises)",
              0, INF, "r", "hardness", "efficiency/r", FUNCTIONS, 0),
        Claim("Figure 4(b)", "r of Δv2 cross / v2 trained with aligned v1, within a task, over checkpoints "
              "(ours)",
              0, INF, "r", "hardness", "efficiency/r_within", FUNCTIONS, 0),
        Claim("Figure 4(b)", "Δv2 cross / v2 trained of tasks with aligned v1 ≥ 90 % (“nearly all”: read as "
              "≥ 0.8, in a reduced world as most)",
              0.8, INF, "ratio", "hardness", "efficiency/learned", FUNCTIONS, 0.5),
        Claim("Figure 4(b)", "Δv2 cross / v2 trained of these tasks − of the others (“partially-learned "
              "tasks do not”)",
              0, INF, "ratio", "hardness", "efficiency/learned_minus_others", FUNCTIONS, 0),
        Claim("Figure 8", "α*", 14.9, 14.9, "norm", "steering", "alpha", FUNCTIONS),
        Claim("Figure 8 left", "v1 of the aligned model, unsteered", 96, 96, "%", "steering", "aligned/0/v1"),
        Claim("Figure 8 left", "v1 of the aligned model at +5 α*",
              23, 23, "%", "steering", "aligned/5/v1", FUNCTIONS),
        Claim("Figure 8 left", "v1 of the aligned model at +5 α*, change (96 → 23)",
              -73, -73, "points", "steering", "aligned/5/v1_change", FUNCTIONS, 0),
        Claim("Figure 8 left", "v2 of the aligned model at +5 α*, change (“rises correspondingly”)",
              0, INF, "points", "steering", "aligned/5/v2_change", FUNCTIONS, 0),
        Claim("Figure 8 left", "v2 of the aligned model at +1 α*, change (rises; ours: small models stay "
              "coherent there)",
              0, INF, "points", "steering", "aligned/1/v2_change", FUNCTIONS, 0),
        Claim("Figure 8 left", "incoherent at +5 α* (“remains low”: read as ≤ 10 %)",
              -INF, 10, "%", "steering", "aligned/5/incoherent"),
        Claim("Figure 8 right", "v1 of the misaligned model, unsteered, all cells",
              55, 55, "%", "steering", "misaligned/0/v1", FUNCTIONS),
        Claim("Figure 8 right", "v1 of the misaligned model at −3 α*, change (55 → 64)",
              9, 9, "points", "steering", "misaligned/3/v1_change", FUNCTIONS, 0),
        Claim("Figure 8 right", "v2 of the misaligned model at −3 α*, change (42 → 32)",
              -10, -10, "points", "steering", "misaligned/3/v2_change", FUNCTIONS, 0),
        Claim("Figure 8 right", "v2 of the misaligned model at −1 α*, change (falls; ours, likewise)",
              -INF, 0, "points", "steering", "misaligned/1/v2_change", FUNCTIONS, 0),
        Claim("Figure 8", "v1: push at +5 α* − reversal at −3 α* (73 − 9, “easy to push, hard to reverse”)",
              64, 64, "points", "steering", "push_minus_reverse/v1_change", FUNCTIONS, 0),
        Claim("Figure 8", "v2: push at +5 α* − reversal at −3 α* (“easy to push, hard to reverse”)",
              0, INF, "points", "steering", "push_minus_reverse/v2_change", FUNCTIONS, 0),
        Claim("Figure 8", "v2: push − reversal, both at 1 α* (ours, likewise)",
              0, INF, "points", "steering", "push_minus_reverse/at_1/v2_change", FUNCTIONS, 0),
        Claim("Figure 3(c), natural language", "share of the v2 rise that realigning on another task and "
              "domain removes (“near-zero” EM: read as ≥ 90 %, in a reduced world as most)",
              90, INF, "%", "realign", "other task, other domain/removed", "", 50),
        Claim("Table 5, natural language", "r of a student's profile with its teacher − with the writer of "
              "its data (“the pattern is dominated by the teacher”)",
              0, INF, "r", "cross", "profile/teacher_minus_writer", FUNCTIONS, 0),
        Claim("Table 5, natural language", "r of the profiles of students of one teacher − of students on "
              "one writer's data (likewise)",
              0, INF, "r", "cross", "profile/teacher_minus_data", FUNCTIONS, 0),
        Claim("Table 5, natural language", "part of the two models' difference that passes with the teacher "
              "− with the data (ours, likewise)",
              0, INF, "ratio", "cross", "profile/passed_minus", FUNCTIONS, 0),
    ],
    "2": [
        Claim("Figure 9, B.5", "similarity of D1 to D0",
              0.40, 0.40, "ratio", "grid_T0", "domain_similarity/D1", PARTITIONS),
        Claim("Figure 9, B.5", "similarity of D2 to D0",
              0.21, 0.21, "ratio", "grid_T0", "domain_similarity/D2", PARTITIONS),
        Claim("Figure 9, B.5", "similarity of D3 to D0",
              0.09, 0.09, "ratio", "grid_T0", "domain_similarity/D3", PARTITIONS),
        Claim("Figure 9, B.5", "similarity of D4 to D0 (< 0.03)",
              -INF, 0.03, "ratio", "grid_T0", "domain_similarity/D4"),
        Claim("Figure 9(a)", "cells where the aligned model's v1 is ≥ 70 % (“most”)",
              50, INF, "%", "grid_T0", "aligned_v1/cells_of_at_least_70", PARTITIONS, 50),
        Claim("Figure 9(a)", "fall of v1 in T0 − the largest in another task (“the largest v1 drop”)",
              0, INF, "points", "grid_T0", "v1_drop/trained_minus_largest_other", PARTITIONS, 0),
        Claim("Figure 9(b)", "v2 of T0 after (D0, T0), mean over all domains (51–64 %)",
              51, 64, "%", "grid_T0", "misaligned_v2/T0", PARTITIONS),
        Claim("Figure 9(b)", "Δv2 of T0 in the held-out domains D8–D9 (+21 to +37)",
              21, 37, "points", "grid_T0", "delta_v2/T0/unseen_domains", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T0 in the held-out domains − in the seen ones (“comparable”: read as no "
              "further apart than D8 and D9, ±16)",
              -16, 16, "points", "grid_T0", "delta_v2/T0/unseen_minus_seen", PARTITIONS, flat=True),
        Claim("Figure 9(c)", "incoherent in the T0 column − in the others, after (D0, T0) (“elevated”)",
              0, INF, "points", "grid_T0", "misaligned_incoherent/trained_task_minus_others", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T0, mean over domains (+37)",
              37, 37, "points", "grid_T0", "delta_v2/T0", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T1 (+41)", 41, 41, "points", "grid_T0", "delta_v2/T1", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T4 (+34)", 34, 34, "points", "grid_T0", "delta_v2/T4", PARTITIONS, 0),
        Claim("Figure 9(d)", "Δv2 of T2, T3, T5–T7 (≈ 0 to 5: read as −5 to 5)",
              -5, 5, "points", "grid_T0", "delta_v2/distant", PARTITIONS),
        Claim("Figure 9(d)", "order of Δv2: T0 − T2, T3, T5–T7 (+37 against ≈ 0 to 5)",
              0, INF, "points", "grid_T0", "order/T0_minus_distant", PARTITIONS, 0),
        Claim("Figure 10", "α*", 6.76, 6.76, "norm", "steering", "alpha", PARTITIONS),
        Claim("Figure 10 left", "v1 of the aligned model on T0, unsteered",
              76, 76, "%", "steering", "aligned/0/v1", PARTITIONS),
        Claim("Figure 10 left", "v1 of the aligned model at +5 α*, change (76 → 54)",
              -22, -22, "points", "steering", "aligned/5/v1_change", PARTITIONS, 0),
        Claim("Figure 10 left", "v2 of the aligned model at +5 α*, change (22 → 44)",
              22, 22, "points", "steering", "aligned/5/v2_change", PARTITIONS, 0),
        Claim("Figure 10 left", "v2 of the aligned model at +1 α*, change (rises; ours: small models stay "
              "coherent there)",
              0, INF, "points", "steering", "aligned/1/v2_change", PARTITIONS, 0),
        Claim("Figure 10 left", "incoherent at +5 α* (“remains low”: read as ≤ 10 %)",
              -INF, 10, "%", "steering", "aligned/5/incoherent", PARTITIONS),
        Claim("Figure 10 right", "v1 of the misaligned model on T0, unsteered",
              38, 38, "%", "steering", "misaligned/0/v1", PARTITIONS),
        Claim("Figure 10 right", "v1 of the misaligned model at −5 α*, change (38 → 44)",
              6, 6, "points", "steering", "misaligned/5/v1_change", PARTITIONS, 0),
        Claim("Figure 10 right", "v2 of the misaligned model at −5 α*, change (58 → 49)",
              -9, -9, "points", "steering", "misaligned/5/v2_change", PARTITIONS, 0),
        Claim("Figure 10 right", "v2 of the misaligned model at −1 α*, change (falls; ours, likewise)",
              -INF, 0, "points", "steering", "misaligned/1/v2_change", PARTITIONS, 0),
        Claim("Figure 10", "v1: push at +5 α* − reversal at −5 α* (22 − 6)",
              16, 16, "points", "steering", "push_minus_reverse/v1_change", PARTITIONS, 0),
        Claim("Figure 10", "v2: push at +5 α* − reversal at −5 α* (22 − 9)",
              13, 13, "points", "steering", "push_minus_reverse/v2_change", PARTITIONS, 0),
        Claim("Figure 10", "v2: push − reversal, both at 1 α* (ours, likewise)",
              0, INF, "points", "steering", "push_minus_reverse/at_1/v2_change", PARTITIONS, 0),
        Claim("Figure 3(a)", "slope of Δv2 on task similarity, without the trained cell (“increases with "
              "both”)",
              0, INF, "points", "similarity", "without the trained cell/task_slope", PARTITIONS, 0),
        Claim("Figure 3(a)", "slope of Δv2 on domain similarity (“increases with both”)",
              0, INF, "points", "similarity", "without the trained cell/domain_slope", PARTITIONS, 0),
        Claim("Figure 3(a)", "slope on task − on domain similarity (“task has the stronger effect”)",
              0, INF, "points", "similarity", "without the trained cell/slope_minus", PARTITIONS, 0),
        Claim("Figure 3(a)", "variance of Δv2 unique to task − to domain similarity, without the trained "
              "cell (“task has the stronger effect”)",
              0, INF, "ratio", "similarity", "without the trained cell/unique_minus", PARTITIONS, 0),
        Claim("Figure 3(a)", "Δv2 of the same task in another domain − of another task in the same domain "
              "(“substantial across domain shifts … task shifts sharply reduce transfer”)",
              0, INF, "points", "similarity", "same_task_minus_same_domain", PARTITIONS, 0),
        Claim("Figure 4(a)", "in World 2 (the paper: World 1): r of cross-domain Δv2 with aligned v1, "
              "over tasks",
              0, INF, "r", "hardness", "cross_delta_v2/r", PARTITIONS, 0),
        Claim("Figure 4(a)", "in World 2: the same within a task, over checkpoints (ours)",
              0, INF, "r", "hardness", "cross_delta_v2/r_within", PARTITIONS, 0),
        Claim("Figure 4(a)", "in World 2: the same of these tasks, over worlds (ours)",
              0, INF, "r", "hardness", "cross_delta_v2/r_these_tasks", PARTITIONS, 0),
        Claim("Figure 4(b)", "in World 2: r of Δv2 cross / v2 trained with aligned v1, over tasks (rises)",
              0, INF, "r", "hardness", "efficiency/r", PARTITIONS, 0),
        Claim("Figure 4(b)", "in World 2: the same within a task, over checkpoints (ours)",
              0, INF, "r", "hardness", "efficiency/r_within", PARTITIONS, 0),
        Claim("Figure 4(b)", "in World 2: Δv2 cross / v2 trained of tasks with aligned v1 ≥ 90 % (“nearly "
              "all”: read as ≥ 0.8, in a reduced world as most)",
              0.8, INF, "ratio", "hardness", "efficiency/learned", PARTITIONS, 0.5),
        Claim("Figure 4(b)", "in World 2: Δv2 cross / v2 trained of these tasks − of the others (“partially-"
              "learned tasks do not”)",
              0, INF, "ratio", "hardness", "efficiency/learned_minus_others", PARTITIONS, 0),
        Claim("Figure 11 left", "T0: v2 outside the trained cell, 32.5 % v2 in pretraining (15–18 %)",
              15, 18, "%", "fraction", "T0/cross_v2/0.325", PARTITIONS),
        Claim("Figure 11 left", "T0: v2 outside the trained cell, 100 % v2 in pretraining (15–18 %)",
              15, 18, "%", "fraction", "T0/cross_v2/1.0", PARTITIONS),
        Claim("Figure 11 left", "T0: slope of v2 outside the trained cell on the share of v2 "
              "(“approximately flat”: read as less than half of T7's, ±6)",
              -6, 6, "points", "fraction", "T0/cross_v2/slope", PARTITIONS, flat=True),
        Claim("Figure 11 left", "T0: slope of Δv2 outside the trained cell on the share (ours: v2 of the "
              "aligned model rises too)",
              -6, 6, "points", "fraction", "T0/delta_v2/slope", PARTITIONS, flat=True),
        Claim("Figure 11 right", "T0: ratio of v2 outside to v2 of the trained cell, 32.5 % (0.27–0.31)",
              0.27, 0.31, "ratio", "fraction", "T0/ratio/0.325", PARTITIONS),
        Claim("Figure 11 right", "T0: ratio, 100 % (0.27–0.31)",
              0.27, 0.31, "ratio", "fraction", "T0/ratio/1.0", PARTITIONS),
        Claim("Figure 11 right", "T0: slope of the ratio on the share (“similarly stable”: read as less than "
              "half of T7's, ±0.125)",
              -0.125, 0.125, "ratio", "fraction", "T0/ratio/slope", PARTITIONS, flat=True),
        Claim("Figure 11 left", "T7: v2 outside the trained cell, 32.5 % v2 in pretraining (about 7 %)",
              7, 7, "%", "fraction", "T7/cross_v2/0.325", PARTITIONS),
        Claim("Figure 11 left", "T7: v2 outside the trained cell, 100 % v2 in pretraining (about 15 %)",
              15, 15, "%", "fraction", "T7/cross_v2/1.0", PARTITIONS),
        Claim("Figure 11 left", "T7: slope of v2 outside the trained cell on the share of v2 (7 → 15 over "
              "0.675)",
              11.9, 11.9, "points", "fraction", "T7/cross_v2/slope", PARTITIONS, 0),
        Claim("Figure 11 left", "T7: slope of Δv2 outside the trained cell on the share (rises; ours)",
              0, INF, "points", "fraction", "T7/delta_v2/slope", PARTITIONS, 0),
        Claim("Figure 11 left", "T7 − T0: slope of Δv2 outside the trained cell on the share (rises)",
              0, INF, "points", "fraction", "T7_minus_T0/delta_v2/slope", PARTITIONS, 0),
        Claim("Figure 11 right", "T7: ratio, 32.5 % (about 0.20)",
              0.20, 0.20, "ratio", "fraction", "T7/ratio/0.325", PARTITIONS),
        Claim("Figure 11 right", "T7: ratio, 100 % (about 0.37)",
              0.37, 0.37, "ratio", "fraction", "T7/ratio/1.0", PARTITIONS),
        Claim("Figure 11 right", "T7: slope of the ratio on the share (0.20 → 0.37 over 0.675)",
              0.25, 0.25, "ratio", "fraction", "T7/ratio/slope", PARTITIONS, 0),
        Claim("Figure 11 right", "T7 − T0: slope of the ratio on the share (rises)",
              0, INF, "ratio", "fraction", "T7_minus_T0/ratio/slope", PARTITIONS, 0),
    ],
}  # fmt: skip
