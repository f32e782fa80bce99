"""Context-free grammars whose language is small enough to list: how a step is worded (paper B.1).

The language is enumerated once with its exact sampling probabilities, and strings are drawn from the table.
The paper rejects strings of unwanted length and resamples up to 50 times, then cuts; here the rejection is
folded into the probabilities, and the cut (at worst (5/6)^50 ≈ 1e-4 of the draws) does not occur.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

String = tuple[int, ...]


@dataclass(frozen=True)
class GrammarConfig:
    """Knobs of B.1. Ranges are inclusive."""

    vocabulary: int = 512  # terminals shared by all grammars
    terminals: int = 16  # private to a grammar
    productions: tuple[int, int] = (3, 6)  # alternatives a nonterminal
    symbols: tuple[int, int] = (2, 3)  # symbols an alternative
    child_probability: float = 0.35  # a symbol of S's production is a nonterminal
    max_depth: int = 2
    length: tuple[int, int] = (2, 5)  # terminals a string
    min_strings: int = 3


@dataclass(frozen=True)
class Grammar:
    """`rules`: a nonterminal's alternatives, drawn uniformly. Symbols: int terminal, str nonterminal."""

    rules: dict[str, tuple[tuple[int | str, ...], ...]]
    length: tuple[int, int]

    @property
    def signature(self) -> tuple:
        """What two grammars share when they are the same grammar."""
        return tuple((name, tuple(sorted(map(repr, self.rules[name])))) for name in sorted(self.rules))

    def language(self) -> dict[String, float]:
        """Every string of the language with its sampling probability, in sorted order; sums to 1."""
        shortest, longest = self.length
        raw = {s: p for s, p in self._expand("S").items() if shortest <= len(s) <= longest}
        total = sum(raw.values())
        return {string: raw[string] / total for string in sorted(raw)}

    def _expand(self, symbol: int | str) -> dict[String, float]:
        """Strings of any length that `symbol` expands to, with their probabilities."""
        if isinstance(symbol, int):
            return {(symbol,): 1.0}
        strings: dict[String, float] = defaultdict(float)
        alternatives = self.rules[symbol]
        for alternative in alternatives:
            parts = [self._expand(s).items() for s in alternative]
            for combination in itertools.product(*parts):
                string = tuple(itertools.chain.from_iterable(s for s, _ in combination))
                strings[string] += float(np.prod([p for _, p in combination])) / len(alternatives)
        return strings


def random_grammar(rng: np.random.Generator, config: GrammarConfig) -> Grammar:
    """One draw of the construction in B.1, not yet checked against the grammars accepted so far."""
    private = rng.choice(config.vocabulary, size=config.terminals, replace=False)
    children = []
    if config.max_depth >= 2:
        children = ["A", "B"] if rng.random() < 0.5 else ["A"]

    def alternative(may_branch: bool) -> tuple[int | str, ...]:
        symbols: list[int | str] = []
        for _ in range(rng.integers(config.symbols[0], config.symbols[1] + 1)):
            if may_branch and rng.random() < config.child_probability:
                symbols.append(children[rng.integers(len(children))])
            else:
                symbols.append(int(rng.choice(private)))
        return tuple(symbols)

    rules = {}
    for nonterminal in ["S", *children]:
        n = rng.integers(config.productions[0], config.productions[1] + 1)
        branches = nonterminal == "S" and bool(children)
        # The first alternative is always terminal-only, so that expansion ends.
        rules[nonterminal] = (alternative(False), *(alternative(branches) for _ in range(n - 1)))
    return Grammar(rules, config.length)


def distinct_grammars(rng: np.random.Generator, config: GrammarConfig, count: int) -> list[Grammar]:
    """`count` grammars with pairwise different signatures and pairwise disjoint languages.

    Disjoint languages are more than the paper's low Jaccard overlap: a string then names its grammar, so
    that completions can be parsed.
    """
    grammars: list[Grammar] = []
    signatures: set[tuple] = set()
    owned: set[String] = set()
    while len(grammars) < count:
        grammar = random_grammar(rng, config)
        language = grammar.language()
        if len(language) < config.min_strings or grammar.signature in signatures or owned & language.keys():
            continue
        grammars.append(grammar)
        signatures.add(grammar.signature)
        owned |= language.keys()
    return grammars


def jaccard(a: Iterable, b: Iterable) -> float:
    """Overlap of two languages or sets: shared members over all members, in [0, 1]."""
    a, b = set(a), set(b)
    return len(a & b) / len(a | b)
