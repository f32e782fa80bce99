"""On-policy batches: the same text from the same state, the filter, the counts, and when to stop."""

from pathlib import Path

import pytest
import torch
from pairs import EXAMPLES, make_pair

from em.distillation.loop import WINDOW, OnPolicy
from em.errors import UserError
from em.sampling.sampler import Rollout
from em.training.metrics import StepTimer

PROMPTS = [{"prompt_ids": e.ids[: e.n_prompt]} for e in EXAMPLES for _ in range(2)]


@pytest.fixture(params=["adapters, from a start", "world"])
def pair(request):
    return make_pair(request.param)


def test_weights_seed_epoch_and_places_decide_the_text_and_each_of_them_does(pair):
    first, _ = OnPolicy(pair, PROMPTS, seed=1).sample(0, [0, 1, 4])
    assert OnPolicy(pair, PROMPTS, seed=1).sample(0, [0, 1, 4])[0] == first
    assert OnPolicy(pair, PROMPTS, seed=1).sample(0, [4, 0])[0] == [
        first[2],
        first[0],
    ]  # a place, not its company
    assert first[0].ids != first[1].ids  # two responses to one prompt
    assert OnPolicy(pair, PROMPTS, seed=2).sample(0, [0, 1, 4])[0] != first
    assert OnPolicy(pair, PROMPTS, seed=1).sample(1, [0, 1, 4])[0] != first
    with torch.no_grad():
        for p in pair.parameters:
            p.mul_(2)
    assert OnPolicy(pair, PROMPTS, seed=1).sample(0, [0, 1, 4])[0] != first


def test_an_example_is_its_prompt_and_what_was_sampled_after_it_with_the_end_and_nothing_behind(pair):
    places = list(range(len(PROMPTS)))
    examples, counts = OnPolicy(pair, PROMPTS, seed=5).sample(0, places)
    ends = []
    for place, (ids, n_prompt, _) in zip(places, examples, strict=True):
        assert ids[:n_prompt] == PROMPTS[place]["prompt_ids"] and 1 <= len(ids) - n_prompt <= 8
        answer = ids[n_prompt:]
        assert 7 not in answer[:-1]
        ends.append(answer[-1] == 7)
        assert ends[-1] or len(answer) == 8
    assert counts["length"] == sum(len(e.ids) - e.n_prompt for e in examples) / len(PROMPTS)
    assert counts["ended"] == pytest.approx(sum(ends) / len(PROMPTS)) and counts["retention"] == 1


class Scripted:
    """A pair whose rollouts are as told: sample() gives `ended` of them finished, of 3 tokens each."""

    def __init__(self, ended=lambda place: False):
        self.ended, self.timer = ended, StepTimer(torch.device("cpu"))

    def sample(self, prompts, indices, seed):
        return [Rollout(i, 0, [i % 5, 1, 2], None, self.ended(i)) for i in indices]


def scripted(n: int, keep=None, **options) -> OnPolicy:
    return OnPolicy(Scripted(**options), [{"prompt_ids": [9, i]} for i in range(n)], 0, keep)


def message(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_what_the_filter_keeps_is_trained_on_and_all_of_it_is_counted():
    online = scripted(
        10, keep=lambda rollouts: [r.prompt_index % 3 == 0 for r in rollouts], ended=lambda i: i < 4
    )
    examples, counts = online.sample(0, [8, 6, 3, 1])
    assert [e.ids for e in examples] == [[9, 6, 1, 1, 2], [9, 3, 3, 1, 2]]
    assert all(e.n_prompt == 2 for e in examples)
    assert counts == {"length": 3, "ended": 0.5, "retention": 0.5}
    assert len(online) == 10
    assert scripted(4, keep=lambda rollouts: [False] * len(rollouts)).sample(0, [0, 1]) == (
        [], {"length": 3, "ended": 0, "retention": 0},
    )  # fmt: skip


def test_a_student_that_never_ends_is_stopped_after_64_rollouts_and_not_before():
    online = scripted(WINDOW + 8)
    for first in range(0, WINDOW, 8):
        online.check(256, Path("runs/x"))
        online.sample(0, list(range(first, first + 8)))
    assert WINDOW == 64
    line = message(lambda: online.check(256, Path("runs/x")))
    assert "last 64 rollouts" in line and "256 tokens" in line and "runs/x" in line


def test_a_filter_that_keeps_nothing_stops_the_run_after_64_rollouts_and_not_before():
    online = scripted(WINDOW, lambda rollouts: [False] * len(rollouts), ended=lambda place: True)
    for first in range(0, WINDOW, 16):
        online.check(256, Path("runs/x"))
        online.sample(0, list(range(first, first + 16)))
    assert "filter kept none of the last 64" in message(lambda: online.check(256, Path("runs/x")))


@pytest.mark.parametrize("batch", [1, 8, 48, 200])
@pytest.mark.parametrize("trouble", ["never ends", "never kept"])
def test_one_good_rollout_among_the_last_64_keeps_the_run_going(batch, trouble):
    """Wherever in its batch it is, and however large that is."""
    for place in (0, batch // 2, batch - 1):
        good = {place}
        online = scripted(
            batch,
            (lambda rollouts, good=good: [r.prompt_index in good for r in rollouts])
            if trouble == "never kept"
            else None,
            ended=(lambda i, good=good: i in good) if trouble == "never ends" else lambda i: True,
        )
        online.sample(0, list(range(batch)))
        good.clear()
        for _ in range((WINDOW - 1) // batch):  # all that fit into the window beside it
            online.check(256, Path("runs/x"))
            online.sample(0, list(range(batch)))
        online.check(256, Path("runs/x"))
        for _ in range(-(-WINDOW // batch)):
            online.sample(0, list(range(batch)))
        message(lambda online=online: online.check(256, Path("runs/x")))
