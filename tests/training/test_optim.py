import pytest
import torch

from em.training.optim import adamw, learning_rate


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
