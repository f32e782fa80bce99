import pytest

from em.errors import UserError
from em.training.guard import CollapseGuard


@pytest.fixture
def guard():
    guard = CollapseGuard()
    for step in range(30):
        guard.check(step, 1.5 + 0.1 * (step % 3), 0.8)
    return guard


@pytest.mark.parametrize(
    "loss, norm", [(float("nan"), 1), (float("inf"), 1), (1.5, float("nan")), (1.5, float("inf"))]
)
def test_what_is_not_finite_stops_even_the_first_step(loss, norm):
    with pytest.raises(UserError, match="step 1: .*lower --lr"):
        CollapseGuard().check(1, loss, norm)


def test_spikes_stop_and_ordinary_noise_does_not(guard):
    guard.check(31, 4.0, 20.0)
    with pytest.raises(UserError, match="loss 9.00 after about 1.60"):
        guard.check(32, 9.0, 0.8)
    with pytest.raises(UserError, match="gradient norm 190 after about 0.8"):
        guard.check(33, 1.5, 190.0)


def test_a_high_first_loss_is_no_spike():
    guard = CollapseGuard()
    for step, loss in enumerate([12.0, 9.0, 4.0, 2.0]):
        guard.check(step, loss, 5.0)


def test_gradients_of_nearly_nothing_set_no_scale():
    """A student that equals its teacher has none, and then one of an ordinary size."""
    guard = CollapseGuard()
    for step in range(30):
        guard.check(step, 0.0, 1e-6)
    guard.check(30, 0.1, 5.0)
