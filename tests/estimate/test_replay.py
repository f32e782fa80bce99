"""The replayed schedule beside that of a real sampler."""

from collections import Counter

import pytest
import torch

from em.estimate.replay import replay
from em.model.gpt2 import GPT2, GPT2Config
from em.sampling import batch
from em.sampling.batch import Batch
from em.sampling.sampler import Sampler

LIMIT, ROWS = 12, 4
CONFIG = GPT2Config(32, n_positions=40, n_layer=1, n_head=2, n_embd=16)
PROMPTS = [list(range(1, n)) for n in (5, 3, 9, 4, 6, 2, 7, 5, 3, 8)]


def test_a_replay_makes_the_steps_and_prefills_of_the_real_sampler(monkeypatch):
    torch.manual_seed(0)
    steps, prefills, begun = Counter(), [], []
    run, prefill, start = Batch.run, Batch.prefill, Batch.start

    def counted_run(self, n, longest):
        steps[n] += self.steps_per_run
        run(self, n, longest)

    def counted_prefill(self, prompts):
        prefills.append(sum(len(ids) for _, ids in prompts))
        prefill(self, prompts)

    def counted_start(self, rows, tokens, positions, keys):
        begun.extend(keys)
        start(self, rows, tokens, positions, keys)

    monkeypatch.setattr(batch, "_uses_graphs", lambda device: False)  # as on a CPU: a step, then a look
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "run", counted_run)
        patch.setattr(Batch, "prefill", counted_prefill)
        patch.setattr(Batch, "start", counted_start)
        rollouts = Sampler(GPT2(CONFIG), (0, 1, 2, 3), LIMIT, rows=ROWS)(PROMPTS, n=2, seed=3)
    lengths = {batch_key(r): len(r.ids) for r in rollouts}
    assert len(set(lengths.values())) > 3
    model = GPT2(CONFIG).to("meta")
    found = replay(model, PROMPTS, 2, LIMIT, ROWS, [lengths[key] for key in begun])
    assert found.steps == steps
    assert sum(found.prefills) == sum(prefills)
    assert all(0 < found.keys_held[n] / found.steps[n] <= 9 + LIMIT for n in steps)


def batch_key(rollout) -> int:
    from em.sampling.draw import row_key

    return row_key(3, rollout.prompt_index, rollout.sample)


def test_on_a_gpu_the_batch_has_few_sizes_and_is_looked_at_every_few_steps():
    found = replay(GPT2(CONFIG).to("meta"), PROMPTS * 8, 1, LIMIT, 64, [5] * 80)
    assert set(found.steps) <= {64, 32, 16, 8}
    assert all(n % found.steps_per_run == 0 for n in found.steps.values())
    assert found.steps_per_run == 4


@pytest.mark.parametrize("rows", [8, 64])
def test_every_token_is_decoded_in_some_row(rows):
    lengths = [3, 12, 7, 1] * 10
    found = replay(GPT2(CONFIG).to("meta"), PROMPTS * 4, 1, LIMIT, rows, lengths)
    assert sum(n * steps for n, steps in found.steps.items()) >= sum(lengths)
