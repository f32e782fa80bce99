import pytest
import torch

import em.model.head
from em.model.head import logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_rounded_to_nothing_coarser_than_fp32(dtype, monkeypatch):
    monkeypatch.setattr(em.model.head, "CHUNK_BYTES", 4 * 24 * 30)  # 30 rows of the head at a time
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 24, generator=generator), torch.randn(100, 24, generator=generator)
    hidden, head = (4 * hidden).to(dtype), head.to(dtype)
    exact = hidden.double() @ head.double().t()
    found = logits(hidden, head)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0)
    buffer = torch.full_like(found, float("nan"))
    assert logits(hidden, head, buffer) is buffer and torch.equal(buffer, found)


def test_on_a_gpu_the_product_itself_ends_in_fp32():
    hidden, head = (torch.empty(n, 24, dtype=torch.bfloat16, device="meta") for n in (7, 100))
    assert logits(hidden, head).dtype == torch.float32
