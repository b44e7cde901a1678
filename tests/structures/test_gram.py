"""Gradients of every sample, whatever form each batch keeps them in."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.structures import rows
from neuromanifold.testing import check_operator
from neuromanifold.testing.cases import CASES, Case


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tagger(nn.Module):
    """An embedding, and a layer at each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)
        for p in self.double().parameters():
            p.data = torch.randn(p.shape, generator=seeded(p.numel()), dtype=p.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens)).mean(dim=1)


@pytest.mark.parametrize("order", list(permutations([1, 2, 9])), ids=str)
def test_batches_of_sequences_of_different_lengths(order: tuple[int, ...]) -> None:
    """Short ones are kept by their factors and indices, long ones as gradients."""
    batches = [(torch.randint(6, (2, length), generator=seeded(length)), None) for length in order]
    measure = partial(nm.fisher, Tagger(), nm.Categorical(), batches, estimator=nm.Exact())
    F, expected = measure(nm.Gram()), measure(nm.Dense()).to_dense()
    assert torch.linalg.matrix_norm(F.to_dense() - expected) <= 1e-13 * expected.norm()
    values = torch.linalg.eigvalsh(expected).flip(0)[: len(F.eigenvalues())]
    assert (F.eigenvalues() - values).abs().max() <= 1e-13 * expected.norm()
    check_operator(F, damping=1e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_some_samples_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = partial(
        nm.fisher, case.model(), case.likelihood, case.data(), nm.Gram(), estimator=nm.Exact()
    )
    expected = measure()
    gram, diagonal = expected.gram, expected._diagonal()
    monkeypatch.setattr(rows, "TEMPORARY_NUMEL", 1)
    monkeypatch.setattr(rows, "_STRIP", 2)
    F = measure()
    torch.testing.assert_close(F.gram, gram)
    torch.testing.assert_close(F._diagonal(), diagonal)


def test_overlap_with_a_matrix_of_another_precision() -> None:
    x = torch.randn(5, 3, generator=seeded(0))
    model = nn.Linear(3, 2)
    gram = nm.fisher(model, nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
    exact = nm.fisher(model.double(), nm.Gaussian(), x.double(), nm.Dense(), estimator=nm.Exact())
    eps = torch.finfo(torch.float32).eps
    square = exact.norm() ** 2
    assert abs(gram.overlap(exact) - square) <= 100 * eps * square
