"""Greedy keep-first deduplication against a loop over all pairs."""

import pytest
import torch

from em.construction.attrition import is_alive
from em.construction.dedup import NearDuplicates, first_twins


def brute_force(embeddings: torch.Tensor, threshold: float) -> list[int]:
    rows, kept, twins = embeddings.double(), [], []
    for i, row in enumerate(rows):
        twin = next((j for j in kept if float((row * rows[j]).sum()) > threshold), -1)
        twins.append(twin)
        kept += [i] if twin < 0 else []
    return twins


def unit(*shape, seed=0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.mark.parametrize("block", [1, 7, 64, 2048])
def test_the_same_rows_stay_as_in_a_loop_over_all_pairs_whatever_the_block(block):
    centres = unit(40, 24)
    noise = unit(300, 24, seed=1) * torch.linspace(0.05, 0.9, 300)[:, None]
    crowd = torch.nn.functional.normalize(centres[torch.arange(300) % 40] + noise, dim=-1)
    for threshold in (0.7, 0.92, 0.97):
        expected = brute_force(crowd, threshold)
        assert 0 < sum(twin >= 0 for twin in expected) < 300
        assert first_twins(crowd, threshold, block) == expected


@pytest.mark.parametrize("block", [1, 2, 2048])
def test_a_cosine_equal_to_the_threshold_stays_and_a_dropped_row_drops_none(block):
    half = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, 1, 1], [1, -1, -1, -1]]) / 2
    assert first_twins(half, 0.5, block) == [-1, -1, 0, -1]  # rows 0 and 1 have a cosine of exactly 0.5
    angles = torch.tensor([0.0, 0.3, 0.6, 0.9])  # each near the next alone
    chain = torch.stack([angles.cos(), angles.sin()], 1)
    assert first_twins(chain, 0.92, block) == [-1, 0, -1, 2]


def test_what_fp32_cannot_decide_is_decided_as_fp64_does():
    """Thousands of pairs within a rounding error of the threshold."""
    rows = unit(1, 384).repeat(300, 1)
    rows = torch.nn.functional.normalize(rows + 0.3 * unit(300, 384, seed=2), dim=1)
    cosines = (rows.double() @ rows.double().T)[torch.tril_indices(300, 300, -1).unbind()]
    for threshold in cosines.sort().values[:: len(cosines) // 12].tolist():
        assert first_twins(rows, threshold, 64) == brute_force(rows, threshold)


def test_nothing_and_equal_rows():
    assert first_twins(torch.empty(0, 8)) == []
    assert first_twins(unit(1, 8).repeat(5, 1), block=2) == [-1, 0, 0, 0, 0]


def test_candidates_of_a_later_round_are_compared_with_those_before():
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "a2": [0.999, 0.0447]}

    class Encoder:
        def encode(self, texts):
            return torch.nn.functional.normalize(torch.tensor([vectors[t] for t in texts]), dim=1)

    search, first, second = NearDuplicates(Encoder()), [], []
    first += [{"question": name, "fate": None} for name in ("a", "b")]
    second += [{"question": name, "fate": None} for name in ("a2", "b")]
    search.drop(first, ["a", "b"])
    search.drop([], [])
    search.drop(second, ["a2", "b"])
    assert all(map(is_alive, first)) and not any(map(is_alive, second))
    assert second[0]["twin"] == {"question": "a", "cosine": pytest.approx(0.999, abs=1e-3)}
