"""Batches that are cut to stay under some bytes: the same answer, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import neuromanifold as nm
from neuromanifold.linalg.allocations import watching

CPU = torch.device("cpu")
N = 48
MIB = 2**20


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 6),
    ).double()


IMAGES = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.arange(N) % 6
STRUCTURES = [
    nm.Diagonal(),
    nm.UnitWise(),
    nm.BlockDiagonal(),
    nm.Kronecker(),
    nm.Kronecker("reduce"),
    nm.Dense(),
    nm.Gram(),
    nm.Implicit(),
]


def measure(data: Any, structure: Any, model: nn.Module | None = None, **options: Any) -> Any:
    model = convolutions() if model is None else model
    options.setdefault("estimator", nm.Exact())
    return nm.fisher(model, nm.Categorical(), data, structure, **options)


def sizes_seen(model: nn.Module, seen: list[int]) -> None:
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_the_answer_is_the_same_and_takes_less(structure) -> None:
    with watching(CPU) as whole:
        expected = measure(IMAGES, structure)
    budget = (whole.peak + whole.kept) // 2
    if isinstance(structure, nm.Gram):  # its own memory grows with the samples
        budget = whole.peak * 3 // 4
    with watching(CPU) as cut:
        F = measure(IMAGES, structure, max_bytes=budget)
    assert cut.peak <= budget < whole.peak
    assert F.num_samples == N
    torch.testing.assert_close(F.to_dense(), expected.to_dense())


@pytest.mark.parametrize("estimator", [nm.MonteCarlo(1), nm.MonteCarlo(3)], ids=repr)
def test_the_same_seed_draws_the_same_classes(estimator) -> None:
    def drawn(**options: Any) -> Tensor:
        rng = torch.Generator().manual_seed(3)
        F = measure(IMAGES, nm.Diagonal(), estimator=estimator, generator=rng, **options)
        return F.to_dense()

    torch.testing.assert_close(drawn(max_bytes="2 MiB"), drawn())


def test_every_batch_is_cut() -> None:
    loader = DataLoader(TensorDataset(IMAGES, TARGETS), batch_size=20)
    expected = measure((IMAGES, TARGETS), nm.Kronecker(), estimator=nm.Empirical())
    model, seen = convolutions(), []
    sizes_seen(model, seen)
    F = measure(loader, nm.Kronecker(), model, estimator=nm.Empirical(), max_bytes="1.5 MiB")
    assert max(seen) < 20
    torch.testing.assert_close(F.to_dense(), expected.to_dense())


@pytest.mark.parametrize("structure", [nm.Diagonal(), nm.Gram()], ids=repr)
def test_an_iterator_is_read_once(structure) -> None:
    expected = measure(IMAGES, structure)
    F = measure(iter(IMAGES.split(16)), structure, max_bytes="3 MiB")
    torch.testing.assert_close(F.to_dense(), expected.to_dense())


def test_a_batch_that_fits_stays_whole() -> None:
    model, seen = convolutions(), []
    sizes_seen(model, seen)
    measure(IMAGES, nm.Diagonal(), model, max_bytes="2 GiB")
    assert seen[-1] == N


def test_parts_are_about_equal() -> None:
    model, seen = convolutions(), []
    sizes_seen(model, seen)
    measure(IMAGES, nm.Diagonal(), model, max_bytes="2 MiB", estimator=nm.MonteCarlo(1))
    parts: list[int] = []
    while sum(parts) < N:  # the trials came before
        parts.insert(0, seen.pop())
    assert sum(parts) == N
    assert len(parts) > 1
    assert max(parts) - min(parts) <= 1


def test_longer_sequences_go_in_smaller_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    batches = [(torch.randn(64, length, 4).double(), None) for length in (8, 80)]
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    with watching(CPU) as usage:
        F = measure(batches, nm.Diagonal(), model, estimator=nm.RandomSigns(), max_bytes=MIB // 2)
    assert usage.peak <= MIB // 2
    assert F.num_samples == 128
    assert max(n for n, t in seen if t == 80) < max(n for n, t in seen if t == 8)


def test_what_all_samples_share_stays_whole() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutions()

        def forward(self, x: Tensor, shift: Tensor, scale: float) -> Tensor:
            return self.body(x * scale + shift)

    data = {"x": IMAGES, "shift": torch.randn(1, 3, 16, 16).double(), "scale": 0.5}
    expected = measure(data, nm.Diagonal(), Shifted())
    F = measure(data, nm.Diagonal(), Shifted(), max_bytes="3 MiB")
    torch.testing.assert_close(F.to_dense(), expected.to_dense())


def test_padding_is_cut_with_its_samples() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(x * attention_mask[..., None])

    torch.manual_seed(0)
    model = Tokens().double()
    mask = (torch.arange(6) < (torch.arange(N) % 6 + 1)[:, None]).long()
    data = {"x": torch.randn(N, 6, 4).double(), "attention_mask": mask}
    expected = measure(data, nm.Diagonal(), model)
    with watching(CPU) as whole:
        measure(data, nm.Diagonal(), model)
    F = measure(data, nm.Diagonal(), model, max_bytes=whole.peak // 2)
    torch.testing.assert_close(F.to_dense(), expected.to_dense())


def test_the_trials_leave_the_generator_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    before = rng.get_state()
    measure(IMAGES, nm.Diagonal(), generator=rng, max_bytes="3 MiB")
    assert torch.equal(rng.get_state(), before)  # the exact Fisher draws nothing


# ---- refusals ----------------------------------------------------------------------------------


def test_one_sample_that_does_not_fit() -> None:
    with pytest.raises(nm.errors.TooLargeError, match=r"with one sample at a time .* 60\.0 KiB"):
        measure(IMAGES, nm.Diagonal(), max_bytes="60 KiB")


def test_a_matrix_that_does_not_fit_is_not_tried() -> None:
    model = nn.Linear(1000, 1000)
    with (
        watching(CPU) as usage,
        pytest.raises(
            nm.errors.TooLargeError,
            match=r"Dense\(\) of 1001000 parameters needs 3.6 TiB, more than the 64.0 MiB .*"
            r"nm.Kronecker\(\) would need 7.6 MiB",
        ) as raised,
    ):
        measure(torch.randn(4, 1000), nm.Dense(), model, max_bytes="64 MiB")
    assert usage.peak < 64 * MIB
    assert raised.value.bytes_available == 64 * MIB


@pytest.mark.parametrize("size", ["much", -1, "3 parsecs"])
def test_no_size(size) -> None:
    with pytest.raises(ValueError, match="size is a positive whole number of bytes"):
        measure(IMAGES, nm.Diagonal(), max_bytes=size)


def test_samples_that_depend_on_each_other() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutions()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x - x.mean(dim=0))

    with pytest.raises(nm.errors.CaptureError, match="other outputs alone"):
        measure(IMAGES, nm.Diagonal(), Centred(), max_bytes="3 MiB")


def test_a_batch_that_does_not_show_its_samples() -> None:
    def forward(model: nn.Module, inputs: Any) -> Tensor:
        return model(inputs["x"] + inputs["table"].sum(dim=0))

    data = {"x": IMAGES, "table": torch.zeros(5, 3, 16, 16).double()}
    with pytest.raises(nm.errors.UnsupportedError, match=r"first axes of \[5, 48\].*pair"):
        measure(data, nm.Diagonal(), forward=forward, max_bytes="3 MiB")
    expected = measure(IMAGES, nm.Diagonal())
    F = measure((data, TARGETS), nm.Diagonal(), forward=forward, max_bytes="3 MiB")
    torch.testing.assert_close(F.to_dense(), expected.to_dense())
