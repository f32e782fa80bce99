import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from em.training import loss as module
from em.training.loss import summed_cross_entropy, token_log_probs


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator)
    head = 3 * torch.randn(301, 16, generator=generator)
    targets = torch.randint(0, 301, (37,), generator=generator)
    return hidden, head, targets


@pytest.fixture(params=[1, 5, 37, 1000])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary: request.param)


def test_loss_and_gradient_equal_a_float64_cross_entropy_for_any_chunk(case, chunk):
    hidden, head, targets = case
    mine = hidden.clone().requires_grad_()
    total = summed_cross_entropy(mine, head, targets)
    (total / 7).backward()
    exact = hidden.double().requires_grad_()
    expected = F.cross_entropy(exact @ head.double().t(), targets, reduction="sum")
    (expected / 7).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [37, 1234])
def test_a_mean_over_n_is_not_bent_by_rounding_one_nth_to_bf16(case, n):
    hidden, head, targets = case
    assert abs(torch.tensor(1 / n).bfloat16().double() * n - 1) > 5e-4  # 1 / n is no bf16 number
    low, mine = head.bfloat16(), hidden.bfloat16().requires_grad_()
    summed_cross_entropy(mine, low, targets).backward()
    total, mine.grad = mine.grad.double(), None
    (summed_cross_entropy(mine, low, targets) / n).backward()
    size = (mine.grad.double() * total).sum() / total.square().sum()
    assert size.item() == pytest.approx(1 / n, rel=2e-4)
    torch.testing.assert_close(mine.grad, (total / n).bfloat16(), atol=0, rtol=0)


class Products(TorchDispatchMode):
    """The matrices of 37 rows, as wide as a vocabulary, in every matrix product."""

    def __init__(self):
        super().__init__()
        self.wide = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::mm":
            matrices = [*args, (kwargs or {}).get("out")]
            self.wide += [x for x in matrices if isinstance(x, torch.Tensor) and len(x) == 37 < x.shape[1]]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("vocabulary", [100_278, 256])
def test_on_a_gpu_rows_of_logits_begin_at_multiples_of_128_columns_for_any_vocabulary(vocabulary):
    """Those of the gradient that meets the head again too: Olmo 3 has 100,278 words."""
    hidden, head = (torch.empty(n, 16, dtype=torch.bfloat16, device="meta") for n in (37, vocabulary))
    targets = torch.zeros(37, dtype=torch.long, device="meta")
    with Products() as products:
        summed_cross_entropy(hidden.requires_grad_(), head, targets).backward()
        token_log_probs(hidden, head, targets).sum().backward()
    assert len(products.wide) == 5 and all(x.stride(0) % 128 == 0 for x in products.wide)


def test_the_head_gets_no_gradient(case):
    hidden, head, targets = case
    head.requires_grad_()
    summed_cross_entropy(hidden.requires_grad_(), head, targets).backward()
    assert head.grad is None


def test_log_probs_equal_a_float64_log_softmax_for_any_chunk(case, chunk):
    hidden, head, targets = case
    expected = (hidden.double() @ head.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(
        token_log_probs(hidden, head, targets).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_weighted_log_probs_have_the_gradient_of_a_float64_log_softmax_for_any_chunk(case, chunk):
    hidden, head, targets = case
    weights = torch.linspace(-2, 3, len(targets))
    mine = hidden.clone().requires_grad_()
    (weights * token_log_probs(mine, head, targets)).sum().backward()
    exact = hidden.double().requires_grad_()
    log_probs = (exact @ head.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (weights.double() * log_probs).sum().backward()
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_nothing_to_predict_is_zero_loss(case):
    hidden, head, targets = case
    assert summed_cross_entropy(hidden[:0], head, targets[:0]).item() == 0
    assert token_log_probs(hidden[:0], head, targets[:0]).shape == (0,)


def test_bf16_is_no_further_from_float64_than_eager_bf16(case):
    hidden, head, targets = case
    low = [x.bfloat16() for x in (hidden, head)]
    exact = low[0].double().requires_grad_()
    F.cross_entropy(exact @ low[1].double().t(), targets, reduction="sum").backward()

    def error(loss_of):
        h = low[0].clone().requires_grad_()
        loss_of(h, low[1]).backward()
        return (h.grad.double() - exact.grad).norm().item()

    ours = error(lambda h, w: summed_cross_entropy(h, w, targets))
    eager = error(lambda h, w: F.cross_entropy(h @ w.t(), targets, reduction="sum"))
    assert ours <= 1.05 * eager
