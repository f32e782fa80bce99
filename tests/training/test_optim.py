import math

import pytest
import torch

from em.training.optim import adamw, gradients, learning_rate


def test_schedule_warms_up_linearly_then_falls_to_its_floor():
    peak, steps, warmup = 2.0, 100, 10
    for shape in ("constant", "linear", "cosine"):
        rates = [learning_rate(i, peak, steps, warmup, shape, 0.1) for i in range(steps + 1)]
        assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)])
        assert rates[warmup] == pytest.approx(peak)
        assert rates[steps] == pytest.approx(peak if shape == "constant" else 0.1 * peak)
    assert learning_rate(55, peak, steps, warmup, "linear", 0.1) == pytest.approx(peak * 0.55)
    assert learning_rate(55, peak, steps, warmup, "cosine", 0.1) == pytest.approx(peak * 0.55)
    assert learning_rate(0, peak, 10, 0, "constant") == peak


def test_updates_and_state_are_those_of_torchs_adamw_bit_for_bit_and_a_skipped_one_changes_nothing():
    models = [torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = adamw(models[0], 0.1, 0.3, (0.9, 0.98))
    groups = adamw(models[1], 0.1, 0.3).param_groups
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), fused=True)
    for step in range(4):
        if step == 2:
            for p in models[0].parameters():
                p.grad.fill_(math.nan)
            ours.step(skip=torch.ones(()))
            continue
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        ours.step(skip=torch.zeros(()))
        theirs.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    mine, torchs = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert mine.keys() == torchs.keys()
    for index, state in torchs.items():
        assert mine[index].keys() == state.keys()
        assert all(torch.equal(mine[index][name], value) for name, value in state.items())


def test_a_parameter_without_a_gradient_gets_one_of_zeros():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    a.grad = torch.full((2,), 3.0)
    assert [x.tolist() for x in gradients([a, b])] == [[3, 3], [0, 0]] and b.grad.tolist() == [0, 0]


def test_biases_and_norms_do_not_decay_and_frozen_parameters_stay_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    model[2].weight.requires_grad_(False)
    optimizer = adamw(model, lr=0.5, weight_decay=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()  # a zero gradient leaves only the decay
    for p, old in zip(model.parameters(), before, strict=True):
        expected = old * (1 - 0.5 * 0.1) if p.ndim == 2 and p.requires_grad else old
        torch.testing.assert_close(p.detach(), expected)
