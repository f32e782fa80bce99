import math

import pytest
import torch

from em.errors import UserError
from em.training import guard as module
from em.training.guard import CollapseGuard
from em.training.optim import adamw

CPU = torch.device("cpu")


def check(guard: CollapseGuard, step: int, loss: float, norm: float) -> None:
    guard.judge(step, torch.tensor(float(loss)), torch.tensor(float(norm)))
    guard.check()


@pytest.fixture
def guard():
    guard = CollapseGuard(CPU)
    for step in range(30):
        check(guard, step, 1.5 + 0.1 * (step % 3), 0.8)
    assert guard.stopped == 0
    return guard


@pytest.mark.parametrize(
    "loss, norm", [(float("nan"), 1), (float("inf"), 1), (1.5, float("nan")), (1.5, float("inf"))]
)
def test_what_is_not_finite_stops_even_the_first_step(loss, norm):
    with pytest.raises(UserError, match="step 1: .*lower --lr"):
        check(CollapseGuard(CPU), 1, loss, norm)


def test_spikes_stop_and_ordinary_noise_does_not(guard):
    check(guard, 31, 4.0, 20.0)
    with pytest.raises(UserError, match="loss 9.00 after about 1.60"):
        check(guard, 32, 9.0, 0.8)
    with pytest.raises(UserError, match="gradient norm 190 after about 0.8"):
        check(guard, 33, 1.5, 190.0)


def test_a_high_first_loss_is_no_spike():
    guard = CollapseGuard(CPU)
    for step, loss in enumerate([12.0, 9.0, 4.0, 2.0]):
        check(guard, step, loss, 5.0)


def test_gradients_of_nearly_nothing_set_no_scale():
    """A student that equals its teacher has none, and then one of an ordinary size."""
    guard = CollapseGuard(CPU)
    for step in range(30):
        check(guard, step, 0.0, 1e-6)
    check(guard, 30, 0.1, 5.0)


@pytest.mark.parametrize("usual", [0.1, 1 / 3, 1.7])
def test_device_and_host_agree_on_a_loss_at_the_limit_and_a_hair_above_it(usual):
    limit = torch.tensor(3 * torch.tensor(usual).item() + 1)
    for loss in (limit, torch.nextafter(limit, torch.tensor(math.inf))):
        guard = CollapseGuard(CPU)
        for step in range(20):
            check(guard, step, usual, 1.0)
        guard.judge(20, loss, torch.tensor(1.0))
        stops = bool(guard.stopped)
        assert stops == (loss > limit)
        try:
            guard.check()
            assert not stops
        except UserError:
            assert stops


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("bad", [1, 5])
def test_a_bad_step_leaves_weights_and_moments_as_they_were_even_if_the_host_hears_of_it_a_step_later(
    behind, bad, monkeypatch
):
    monkeypatch.setattr(module, "on_gpu", lambda device: bool(behind))

    def run(steps: int, spoilt: int | None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer, kept = adamw(model, 0.1, 0.5), []
        guard = CollapseGuard(CPU, kept.append)
        reached = 0
        try:
            for step in range(1, steps + 1):
                reached = step
                for p in model.parameters():
                    p.grad = torch.full_like(p, math.nan if step == spoilt else step)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                guard.judge(step, torch.tensor(1.0), norm)
                optimizer.step(skip=guard.stopped)
                guard.check(wait=step == steps)
        except UserError as error:
            assert f"step {spoilt}: " in str(error)
        return model.state_dict(), optimizer.state_dict()["state"], kept, reached

    weights, state, kept, reached = run(8, bad)
    assert kept == [bad - 1] and reached == bad + behind
    expected, expected_state, kept, _ = run(bad - 1, None)
    assert kept == []
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for index, moments in expected_state.items():
        assert all(torch.equal(state[index][name], moments[name]) for name in moments)


def test_the_last_step_is_judged_before_a_run_ends(monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda device: True)
    guard = CollapseGuard(CPU)
    guard.judge(1, torch.tensor(math.nan), torch.tensor(1.0))
    guard.check()
    with pytest.raises(UserError, match="step 1"):
        guard.check(wait=True)
