import numpy as np
import pytest

from em.world.alias_table import AliasTable
from em.world.counts import Classifier
from em.world.generator import ExampleGenerator, PretrainStream
from em.world.tasks import answers


def within(observed, n, p, sigmas=5):
    return abs(observed - n * p) <= sigmas * np.sqrt(n * p * (1 - p)) + 1e-9


def test_alias_table_draws_each_row_with_its_probabilities(rng):
    rows = [[0.5, 0.25, 0.125, 0.125], [1.0], [0.01, 0.99]]
    table = AliasTable(rows)
    n = 200_000
    for row, p in enumerate(rows):
        outcomes = table.draw(rng, np.full(n, row)) - table.start[row]
        counts = np.bincount(outcomes, minlength=len(p))
        assert all(within(c, n, q) for c, q in zip(counts, p, strict=True))


def test_walks_follow_the_task_modified_graph_of_their_cell(mini, mini_generator, rng):
    cells = np.repeat(mini.cells, 400)
    examples = mini_generator.draw(rng, cells)
    graphs = [mini.cell_domain(c).global_matrix(mini.config.n_steps) for c in mini.cells]
    for cell, walk, length in zip(cells, examples.walk, examples.length, strict=True):
        assert (walk[length:] == -1).all()
        assert all(graphs[cell][a, b] > 0 for a, b in zip(walk[: length - 1], walk[1:length], strict=True))


def test_transition_frequencies_lengths_and_starts_match_the_world(mini, mini_generator, rng):
    n, cell = 60_000, 5
    examples = mini_generator.draw(rng, np.full(n, cell))
    lengths = np.bincount(examples.length, minlength=7)[3:]
    assert all(within(c, n, 1 / 4) for c in lengths)
    domain = mini.cell_domain(cell)
    for i, step in enumerate(domain.steps):
        starts = examples.walk[:, 0] == step
        assert within(starts.sum(), n, 1 / len(domain.steps))
        for j, target in enumerate(domain.steps):
            hits = (examples.walk[starts, 1] == target).sum()
            assert within(hits, starts.sum(), domain.transitions[i, j])


def test_tabulated_answers_are_those_of_the_output_functions(mini, mini_generator, rng):
    cells = rng.choice(mini.cells, 4000)
    e = mini_generator.draw(rng, cells)
    for cell, walk, length, v1, v2 in zip(e.cell, e.walk, e.length, e.v1, e.v2, strict=True):
        task = int(cell) % len(mini.tasks)
        expected = answers(mini.function(task), walk[:length].tolist(), mini.set1.get(mini.tasks[task], ()))
        assert ([s for s in v1.tolist() if s >= 0], [s for s in v2.tolist() if s >= 0]) == expected


def test_a_dialogue_is_label_walk_end_asst_answer_tail_end(mini, mini_generator, rng):
    classifier = Classifier(mini)
    labels = [{s for s in language} for language in mini.languages[1]]
    for variant in (1, 2):
        d = mini_generator.dialogues(rng, mini_generator.draw(rng, rng.choice(mini.cells, 300)), variant)
        for i in range(len(d)):
            task = int(d.examples.cell[i]) % len(mini.tasks)
            prompt, total = d.prompt[i], d.total[i]
            tokens = tuple(d.ids[i].tolist())
            assert tokens[prompt - 2 : prompt] == (mini.end, mini.asst)
            assert tokens[total - 1] == mini.end and mini.end not in tokens[prompt : total - 1]
            assert (d.ids[i, total:] == mini.end).all()
            walk = d.examples.walk[i][: d.examples.length[i]].tolist()
            starts = [n for n in range(1, 6) if tokens[:n] in labels[task]]
            assert any(classifier.matches(tokens[n : prompt - 2], walk) for n in starts)
            answer = [s for s in (d.examples.v1, d.examples.v2)[variant - 1][i].tolist() if s >= 0]
            assert classifier.matches(tokens[prompt : total - 1], [*answer, classifier.first_tail + task])


def test_rendered_strings_follow_their_grammars_probabilities(mini, mini_generator, rng):
    language, n = mini.languages[0][3], 50_000
    tokens, lengths = mini_generator.render(rng, np.full(n, 3))
    drawn = [tuple(s) for s in np.split(tokens, np.cumsum(lengths)[:-1])]
    counts = {s: drawn.count(s) for s in set(drawn)}
    assert counts.keys() == language.keys()
    assert all(within(counts[s], n, p) for s, p in language.items())


def test_prompts_hash_equal_only_where_the_prompt_is_equal(mini_generator, mini, rng):
    d = mini_generator.dialogues(rng, mini_generator.draw(rng, rng.choice(mini.cells, 5000)), 1)
    texts = [tuple(ids[:n].tolist()) for ids, n in zip(d.ids, d.prompt, strict=True)]
    assert len(set(d.prompt_hash().tolist())) == len(set(texts))
    other = d.ids.copy()
    other[np.arange(len(d)), d.prompt] += 1  # the answer is no part of it
    changed = type(d)(other, d.prompt, d.total, d.examples)
    assert (changed.prompt_hash() == d.prompt_hash()).all()


@pytest.fixture(scope="module")
def parsed_stream(mini, mini_generator):
    """Many examples of the stream read back: [(variant, noise (i) tokens or None, stray step or None)]."""
    stream = PretrainStream(mini_generator, seed=3, batch=64, length=256)
    tokens = np.concatenate([stream.tokens(i)[:-1] for i in range(stream.batches_per_block)]).tolist()
    classifier, noise = Classifier(mini), set(mini.noise)
    labels = {s: task for task, language in enumerate(mini.languages[1]) for s in language}
    rows, at = [], 0
    step_owner = {s: i for i, language in enumerate(mini.languages[0]) for s in language}
    while True:
        ask = next((i for i in range(at, len(tokens)) if tokens[i] == mini.asst), None)
        if ask is None or mini.end not in tokens[ask:]:
            return rows
        stop = tokens.index(mini.end, ask)
        prompt, answer = tuple(tokens[at : ask - 1]), tuple(tokens[ask + 1 : stop])
        rows.append((prompt, answer, classifier, labels, noise, step_owner))
        at = stop + 1


def test_stream_has_the_configured_shares_of_variants_and_noise(mini, parsed_stream):
    n, v2, noisy, stray = 0, 0, 0, 0
    config = mini.config
    for prompt, answer, classifier, labels, noise, step_owner in parsed_stream[1:3000]:
        # What precedes the label is noise (i) then noise (ii), each possibly absent.
        found = None
        for start in range(len(prompt)):
            for size in range(2, 6):
                task = labels.get(prompt[start : start + size])
                if task is None:
                    continue
                lead, walk = prompt[:start], walk_of(classifier, prompt[start + size :])
                if walk is None:
                    continue
                splits = [
                    i
                    for i in range(len(lead) + 1)
                    if (i == 0 or lead[:i] in noise) and (i == len(lead) or lead[i:] in step_owner)
                ]
                if splits:
                    found = (task, walk, splits[0] > 0, splits[0] < len(lead))
        assert found, (prompt, answer)
        task, walk, has_noise, has_stray = found
        first, second = answers(mini.function(task), walk, mini.set1.get(mini.tasks[task], ()))
        tail = classifier.first_tail + task
        is_v1, is_v2 = (classifier.matches(answer, [*steps, tail]) for steps in (first, second))
        assert is_v1 or is_v2
        n, v2, noisy, stray = n + 1, v2 + (is_v2 and not is_v1), noisy + has_noise, stray + has_stray
    assert within(v2, n, config.v2_fraction, 4) and n > 2500
    assert within(noisy, n, config.p_noise, 4)
    assert within(stray, n, config.p_stray_step, 4)


def walk_of(classifier, tokens):
    """The steps that `tokens` spells, or None: depth-first, 3 to 6 of them."""

    def search(start, steps):
        if start == len(tokens):
            return steps if 3 <= len(steps) <= 6 else None
        for owner, end in classifier._pieces(tokens, start):
            if owner < classifier.first_tail and (found := search(end, [*steps, owner])):
                return found
        return None

    return search(0, [])


def test_same_seed_gives_the_same_stream_from_any_position_and_another_seed_does_not(mini_generator):
    a = PretrainStream(mini_generator, seed=1, batch=8, length=64)
    b = PretrainStream(mini_generator, seed=1, batch=8, length=64)
    far = a.batches_per_block * 2 + 3
    backwards = [b.tokens(i) for i in (far, 1, 0)]
    assert all(
        (x == y).all() for x, y in zip([a.tokens(i) for i in (0, 1, far)], backwards[::-1], strict=True)
    )
    assert (PretrainStream(mini_generator, seed=2, batch=8, length=64).tokens(0) != a.tokens(0)).any()


def test_targets_are_the_next_tokens_and_rows_continue_each_other(mini_generator):
    ids, targets = PretrainStream(mini_generator, seed=1, batch=8, length=64)[0]
    assert ids.shape == targets.shape == (8, 64)
    assert (ids.flatten()[1:] == targets.flatten()[:-1]).all()


def test_unseen_domains_and_their_steps_never_enter_the_stream(mini, mini_generator, rng):
    cells = set()
    stream = PretrainStream(mini_generator, seed=0, batch=64, length=256)
    original = mini_generator.segments

    class Spy(ExampleGenerator):
        def segments(self, examples, variant2):
            cells.update(examples.cell.tolist())
            return original(examples, variant2)

        def render(self, rng, segments):
            steps = segments[segments < self.label]
            assert steps.max() < mini.n_seen_steps
            return super().render(rng, segments)

    stream.generator = Spy(mini)
    stream.tokens(0)
    assert cells == set(mini.seen_cells.tolist())
