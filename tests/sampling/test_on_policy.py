"""What is sampled from is what training scores: on-policy means one distribution."""

import torch

from em.data.rows import load_broad
from em.model.checkpoint import load_model, load_tokenizer
from em.sampling.sampler import Sampler
from em.training.loss import token_log_probs


def test_sampled_log_probs_in_bf16_are_those_that_training_gives_the_same_hidden_states(monkeypatch):
    model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16), load_tokenizer("smollm2-135m")
    prompts = [tokenizer.prompt_ids(row["question"])[-12:] for row in load_broad("sample")[:4]]
    steps, hidden = [], model.hidden

    def watched(ids, **layout):
        states = hidden(ids, **layout)
        if "positions" in layout:  # a step, not a prefill
            steps.append(states[:, 0].clone())  # (rows, d)
        return states

    monkeypatch.setattr(model, "hidden", watched)
    rollouts = Sampler(model, (), 6, rows=4, log_probs=True)(prompts)
    states = torch.stack(steps, 1)  # (rows, 6, d)
    for row, rollout in zip(states, rollouts, strict=True):
        scored = token_log_probs(row, model.head_weight, torch.tensor(rollout.ids))
        torch.testing.assert_close(torch.tensor(rollout.log_probs), scored, atol=1e-3, rtol=0)
        rounded = (row @ model.head_weight.t()).double().log_softmax(-1)[range(6), rollout.ids]
        assert (rounded - scored).abs().max() > 1e-3  # which logits rounded to bf16 would not be
