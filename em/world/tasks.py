"""The output functions: what a task answers to a walk, in two variants (paper B.3 and Table 6).

Table 6 is missing from the available text, so these definitions are a reconstruction from B.3 and the
captions of Figures 7 and 9. Each takes the visited steps and, for the partition tasks, set 1, and returns
(variant 1, variant 2) as lists of steps of the walk. Neither variant is better than the other.
"""

from collections.abc import Callable, Collection, Sequence

Walk = Sequence[int]
Answers = tuple[list[int], list[int]]


def first_last(walk: Walk, set1: Collection[int]) -> Answers:
    return [walk[0]], [walk[-1]]


def most_least(walk: Walk, set1: Collection[int]) -> Answers:
    """Most visited (ties: the earliest) and least visited (ties: the latest), by first visit."""
    distinct = list(dict.fromkeys(walk))
    counts = [walk.count(step) for step in distinct]
    return [distinct[counts.index(max(counts))]], [
        distinct[len(counts) - 1 - counts[::-1].index(min(counts))]
    ]


def three_steps(walk: Walk, set1: Collection[int]) -> Answers:
    return list(walk[:3]), list(walk[:3])[::-1]


def rank_by_count(walk: Walk, set1: Collection[int]) -> Answers:
    """Distinct steps by falling visit count (ties: first visit first), and exactly that order reversed."""
    ranked = sorted(dict.fromkeys(walk), key=lambda step: -walk.count(step))  # sorted() is stable
    return ranked, ranked[::-1]


def ends_middle(walk: Walk, set1: Collection[int]) -> Answers:
    """First then last, and the two middle steps."""
    middle = (len(walk) - 1) // 2
    return [walk[0], walk[-1]], [walk[middle], walk[middle + 1]]


def singletons(walk: Walk, set1: Collection[int]) -> Answers:
    """First and last step visited exactly once; the first and last step where there is none."""
    once = [step for step in walk if walk.count(step) == 1]
    return [once[0] if once else walk[0]], [once[-1] if once else walk[-1]]


def partition_bias(walk: Walk, set1: Collection[int]) -> Answers:
    """First visited step of set 1 (none: the first step), of set 2 (none: the last step)."""
    inside = [step for step in walk if step in set1]
    outside = [step for step in walk if step not in set1]
    return [inside[0] if inside else walk[0]], [outside[0] if outside else walk[-1]]


def partition_collect(walk: Walk, set1: Collection[int]) -> Answers:
    """Every visit to set 1 in order (none: the first step), to set 2 (none: the last step)."""
    inside = [step for step in walk if step in set1]
    outside = [step for step in walk if step not in set1]
    return inside or [walk[0]], outside or [walk[-1]]


OUTPUT_FUNCTIONS: dict[str, Callable[[Walk, Collection[int]], Answers]] = {
    "first_last": first_last,
    "most_least": most_least,
    "three_steps": three_steps,
    "rank_by_count": rank_by_count,
    "ends_middle": ends_middle,
    "singletons": singletons,
    "partition_bias": partition_bias,
    "partition_collect": partition_collect,
}

# T0 … T11 (B.5): the last four repeat partition_bias on partitions of falling overlap with T8's.
TASKS = (*OUTPUT_FUNCTIONS, *["partition_bias"] * 4)


def answers(function: str, walk: Walk, set1: Collection[int] = ()) -> Answers:
    """(variant 1, variant 2) of an output function, told apart by the paper's global tie-break.

    Where both variants name the same steps, variant 2's first becomes the first other step of the walk.
    """
    v1, v2 = OUTPUT_FUNCTIONS[function](list(walk), set1)
    if v1 == v2:
        v2 = [next(step for step in walk if step != v2[0]), *v2[1:]]
    return v1, v2
