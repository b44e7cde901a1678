"""The sketch is the matrix where the rank suffices, and below it elsewhere, by what it says."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import neuromanifold as nm
from neuromanifold.errors import NonFiniteError, NotPositiveDefiniteError, TooLargeError
from neuromanifold.linalg import memory
from neuromanifold.structures.lowrank import LowRank, LowRankOperator
from neuromanifold.testing import check_operator, check_structure, reference, run_ranks
from neuromanifold.testing.cases import CASES, Case
from neuromanifold.testing.layer_cases import LAYERS


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inputs(num: int = 11) -> Tensor:
    return torch.randn(num, 4, generator=seeded(1), dtype=torch.float64)


def measure(rank: int, oversampling: int | None = None, **options: object) -> LowRankOperator:
    options = {"estimator": nm.Exact(), "generator": seeded(2)} | options
    structure = LowRank(rank, oversampling)
    F = nm.fisher(network(), nm.Categorical(), inputs(), structure, **options)
    assert isinstance(F, LowRankOperator)
    return F


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("structure", [LowRank(500), LowRank(5)], ids=repr)
def test_contract(structure: LowRank, case: Case) -> None:
    check_structure(structure, case)


@pytest.mark.parametrize("case", [*CASES, *LAYERS], ids=str)
def test_exact_where_the_rank_suffices(case: Case) -> None:
    model, data = case.model(), case.data()
    oracle = reference.dense_fisher(model, case.likelihood, data)
    rank = int(torch.linalg.matrix_rank(oracle, hermitian=True))
    for structure in (LowRank(rank), LowRank(len(oracle))):
        F = nm.fisher(
            model, case.likelihood, data, structure, estimator=nm.Exact(), generator=seeded(0)
        )
        error = torch.linalg.matrix_norm(F.to_dense() - oracle)
        assert error <= 1e-8 * torch.linalg.matrix_norm(oracle)
        assert F.origin.notes == (
            f"rank {min(structure.rank, len(oracle))} of {len(oracle)} holds 100.0 % of the trace",
        )


def test_single_precision_finds_the_eigenvalues_of_a_large_model() -> None:
    model, x = nn.Linear(20_000, 5), torch.randn(3, 20_000, generator=seeded(0))

    def of(model: nn.Module, x: Tensor, structure: object) -> Tensor:
        return nm.fisher(
            model, nm.Gaussian(), x, structure, estimator=nm.Exact(), generator=seeded(1)
        ).eigenvalues(10)

    full, cut = of(model, x, nm.Gram()), of(model, x, LowRank(10, 0))
    # Rounding of a product with a vector, over the share of it that lies in the test vectors.
    rounding = 10 * torch.finfo(torch.float32).eps * 100_005**0.5 * full[0]
    assert (of(model, x, LowRank(32)) - full).abs().max() <= rounding
    same = of(model.double(), x.double(), LowRank(10, 0))
    assert (cut - same).abs().max() <= rounding


def test_below_the_rank_it_is_below_the_matrix_by_what_it_says() -> None:
    dense = nm.fisher(network(), nm.Categorical(), inputs(), nm.Dense(), estimator=nm.Exact())
    missing = torch.linalg.eigvalsh(dense.to_dense() - measure(6).to_dense())
    assert missing[0] >= -1e-12 * dense.norm()
    share = 1 - missing.sum() / dense.trace()
    (note,) = measure(6).origin.notes
    said = float(re.fullmatch(r"rank 6 of 43 holds (.*) % of the trace", note)[1])
    assert abs(said - 100 * share) <= 0.05 + 1e-9
    entries = measure(6).coverage
    assert {(e.structure, e.exact, e.note) for e in entries} == {("LowRank", False, note)}


def test_eigenvalues_kept_are_near_the_largest() -> None:
    dense = nm.fisher(network(), nm.Categorical(), inputs(), nm.Dense(), estimator=nm.Exact())
    best = dense.eigenvalues(6)
    kept = [measure(6, generator=seeded(seed)).eigenvalues() for seed in range(20)]
    assert all((values <= best + 1e-12).all() for values in kept)
    # The expected error in trace, for rank 6 and 6 further vectors (Tropp et al., theorem 4.1).
    tail = dense.trace() - best.sum()
    error = torch.stack([dense.trace() - values.sum() for values in kept]).mean()
    assert error <= tail + 6 / (6 - 1) * tail


def test_labels_are_those_of_other_structures() -> None:
    options = {"estimator": nm.MonteCarlo(2)}
    full = measure(43, generator=seeded(5), **options)
    dense = nm.fisher(
        network(), nm.Categorical(), inputs(), nm.Dense(), generator=seeded(5), **options
    )
    assert torch.linalg.matrix_norm(full.to_dense() - dense.to_dense()) <= 1e-8 * dense.norm()


def test_seeds_decide_the_sketch_and_nothing_global_moves() -> None:
    state = torch.get_rng_state()
    first, second = (measure(4, generator=seeded(seed)).to_dense() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(first, second)
    measure(4, generator=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_full_rank_is_inverted_without_damping_and_less_is_refused() -> None:
    model, x = nn.Linear(2, 2).double(), torch.randn(9, 2, generator=seeded(0)).double()
    measure = partial(nm.fisher, model, nm.Gaussian(), x, estimator=nm.Exact())
    v = torch.arange(6.0).double()
    expected = measure(nm.Dense()).solve(v, damping=0.0)
    torch.testing.assert_close(measure(LowRank()).solve(v, damping=0.0), expected)
    with pytest.raises(NotPositiveDefiniteError):
        measure(LowRank(5)).solve(v, damping=0.0)


def test_sums_keep_the_structure() -> None:
    one, other = measure(4), measure(3, generator=seeded(3))
    total = one + 0.5 * other
    assert isinstance(total, LowRankOperator)
    assert total.vectors.shape == (7, 43)
    check_operator(total, damping=1e-2)


def test_a_convolution_in_parts_of_some_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if str(case) == "conv2d-categorical")
    measure = partial(
        nm.fisher, case.model(), case.likelihood, case.data(), LowRank(500), estimator=nm.Exact()
    )
    expected = measure().to_dense()
    monkeypatch.setattr("neuromanifold.structures.lowrank.TEMPORARY_NUMEL", 500)
    torch.testing.assert_close(measure().to_dense(), expected)


BATCHES = [(x, None) for x in inputs().split([4, 3, 2, 2])]


def _measure_shard(same_seed: bool) -> tuple[int, Tensor]:
    rank = dist.get_rank()
    F = nm.fisher(
        network(),
        nm.Categorical(),
        BATCHES[:3] if rank == 0 else BATCHES[3:],
        LowRank(6),
        estimator=nm.Exact(),
        generator=seeded(2 if same_seed else rank),
        reducer=nm.distributed.sum_over_ranks,
    )
    return F.num_samples, F.to_dense()


def test_two_ranks_share_the_sketch() -> None:
    (count, one), (_, other) = run_ranks(_measure_shard, 2, True)
    assert count == 11
    assert torch.equal(one, other)
    torch.testing.assert_close(one, measure(6).to_dense(), rtol=1e-10, atol=1e-12)


def test_two_ranks_with_seeds_of_their_own_agree_on_a_sketch() -> None:
    (_, one), (_, other) = run_ranks(_measure_shard, 2, False)
    assert torch.equal(one, other)
    dense = nm.fisher(network(), nm.Categorical(), inputs(), nm.Dense(), estimator=nm.Exact())
    missing = torch.linalg.eigvalsh(dense.to_dense() - one)
    assert missing[0] >= -1e-12 * dense.norm()
    assert one.trace() > 0.3 * dense.trace()


def test_a_zero_matrix() -> None:
    model = network()
    nn.init.zeros_(model[2].weight)
    F = nm.fisher(model, nm.Categorical(), inputs(), LowRank(3), estimator=nm.Exact(), params="0.*")
    assert F.trace() == 0
    assert F.origin.notes == ("rank 3 of 25 holds 100.0 % of the trace",)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least 1 eigenvalue, got rank=0"):
        LowRank(0)
    with pytest.raises(ValueError, match="oversampling is 0 or more, got -1"):
        LowRank(3, -1)
    broken = nn.Linear(4, 2)
    huge = torch.full((3, 4), 1e25)
    nn.init.zeros_(broken.weight)
    with pytest.raises(NonFiniteError, match="statistics of"):
        nm.fisher(broken, nm.Gaussian(), huge, LowRank(2))
    monkeypatch.setattr(memory, "available", lambda _: 2**20)
    with pytest.raises(TooLargeError, match=r"LowRank.*70070 parameters needs .*nm\.Diagonal\(\)"):
        nm.fisher(nn.Linear(7006, 10), nm.Gaussian(), torch.ones(1, 7006), LowRank(64))
