import itertools

import numpy as np

from em.world.grammar import Grammar, GrammarConfig, distinct_grammars, jaccard, random_grammar


def draws_by_expansion(grammar, rng, n):
    """The paper's own procedure, top-down with rejection: the oracle for the table of probabilities."""

    def expand(symbol):
        if isinstance(symbol, int):
            return (symbol,)
        rule = grammar.rules[symbol]
        return tuple(itertools.chain(*map(expand, rule[rng.integers(len(rule))])))

    drawn = []
    while len(drawn) < n:
        string = expand("S")
        if grammar.length[0] <= len(string) <= grammar.length[1]:
            drawn.append(string)
    return drawn


def test_language_probabilities_are_those_of_expansion_with_rejection(rng):
    config = GrammarConfig()
    for grammar in distinct_grammars(rng, config, 3):
        language = grammar.language()
        assert abs(sum(language.values()) - 1) < 1e-12
        n = 20_000
        drawn = draws_by_expansion(grammar, rng, n)
        assert set(drawn) <= language.keys()
        chi2 = sum((drawn.count(s) - n * p) ** 2 / (n * p) for s, p in language.items())
        degrees = len(language) - 1
        assert chi2 < degrees + 5 * np.sqrt(2 * degrees)


def test_probability_of_a_string_reached_by_two_derivations_is_their_sum():
    grammar = Grammar({"S": ((1, 2), ("A", 2), (3, 3, 3)), "A": ((1,), (4,))}, (2, 5))
    expected = {(1, 2): 1 / 3 + 1 / 6, (4, 2): 1 / 6, (3, 3, 3): 1 / 3}
    assert {s: round(p, 12) for s, p in grammar.language().items()} == {
        s: round(p, 12) for s, p in expected.items()
    }


def test_strings_outside_the_length_range_are_rejected_and_the_rest_renormalised():
    grammar = Grammar({"S": ((1, 2), ("A", "A", "A")), "A": ((1, 2), (3, 4))}, (2, 5))
    assert grammar.language() == {(1, 2): 1.0}


def test_rules_follow_the_construction_of_B1(rng):
    config = GrammarConfig()
    with_b = 0
    for _ in range(300):
        rules = random_grammar(rng, config).rules
        with_b += "B" in rules
        terminals = {
            s for rule in rules.values() for alternative in rule for s in alternative if isinstance(s, int)
        }
        assert len(terminals) <= config.terminals and all(0 <= t < config.vocabulary for t in terminals)
        assert "A" in rules
        for name, alternatives in rules.items():
            assert 3 <= len(alternatives) <= 6
            assert all(len(alternative) in (2, 3) for alternative in alternatives)
            terminal_only = [all(isinstance(s, int) for s in alternative) for alternative in alternatives]
            assert any(terminal_only) if name == "S" else all(terminal_only)
    assert 120 < with_b < 180  # probability one half


def test_children_fill_about_a_third_of_the_free_positions_of_S(rng):
    symbols = [s for _ in range(500) for a in random_grammar(rng, GrammarConfig()).rules["S"][1:] for s in a]
    share = np.mean([isinstance(s, str) for s in symbols])
    assert abs(share - 0.35) < 0.02


def test_a_depth_of_one_leaves_only_terminals(rng):
    assert set(random_grammar(rng, GrammarConfig(max_depth=1)).rules) == {"S"}


def test_accepted_grammars_are_distinct_and_share_no_string(rng):
    grammars = distinct_grammars(rng, GrammarConfig(), 40)
    assert len({g.signature for g in grammars}) == 40
    languages = [g.language() for g in grammars]
    assert all(len(language) >= 3 for language in languages)
    assert all(2 <= len(s) <= 5 for language in languages for s in language)
    assert max(jaccard(a, b) for a, b in itertools.combinations(languages, 2)) == 0


def test_signature_does_not_depend_on_the_order_of_alternatives():
    a = Grammar({"S": ((1, 2), (3, 4))}, (2, 5))
    b = Grammar({"S": ((3, 4), (1, 2))}, (2, 5))
    assert a.signature == b.signature != Grammar({"S": ((1, 2), (4, 3))}, (2, 5)).signature


def test_jaccard_counts_shared_over_all_strings():
    assert jaccard({(1,): 1, (2,): 1}, {(2,): 1, (3,): 1}) == 1 / 3
    assert jaccard(frozenset({1, 2}), frozenset({2, 3, 4})) == 1 / 4
