from __future__ import annotations

import pytest
import torch

import neuromanifold as nm
from neuromanifold.errors import TooLargeError
from neuromanifold.linalg import memory

CPU = torch.device("cpu")


def test_some_memory_is_free() -> None:
    assert 0 < memory.available(CPU) < 2**60


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.0 B"), (1023, "1023.0 B"), (1536, "1.5 KiB"), (2**50, "1024.0 TiB")],
)
def test_readable(num_bytes: int, text: str) -> None:
    assert memory.readable(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (1, 1),
        (2**40, 2**40),
        ("300", 300),
        ("300 B", 300),
        ("1.5KiB", 1536),
        (" 2 GiB ", 2**31),
        ("2 gib", 2**31),
        ("1.5 GB", 1_500_000_000),
        ("10 kB", 10_000),
        ("1 TiB", 2**40),
    ],
)
def test_parse(value: int | str, num_bytes: int) -> None:
    assert memory.parse(value) == num_bytes


@pytest.mark.parametrize("num_bytes", [1, 1024, 3 * 2**20, 5 * 2**30, 7 * 2**40])
def test_parse_reads_what_readable_writes(num_bytes: int) -> None:
    assert memory.parse(memory.readable(num_bytes)) == num_bytes


@pytest.mark.parametrize("value", [0, -1, True, 1.0, None, "", "GiB", "-2 MiB", "2 MiBs", "1e9"])
def test_parse_refuses_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match=r'A size is .*"512 MiB".*got'):
        memory.parse(value)  # type: ignore[arg-type]


def test_require_names_both_sizes_and_what_would_fit() -> None:
    with pytest.raises(TooLargeError, match=r"Everything needs 1024.0 TiB.*Use less") as caught:
        memory.require(2**50, CPU, what="Everything", instead="Use less.")
    assert caught.value.bytes_needed == 2**50
    assert 0 < caught.value.bytes_available < 2**50


def test_require_lets_small_requests_pass() -> None:
    memory.require(1, CPU, what="One byte", instead="nothing")


# Ten million parameters: no P × P matrix of them fits into any machine.
WIDE = (5_000_000, 2)


@pytest.mark.parametrize("structure", [nm.Dense(), nm.BlockDiagonal()], ids=repr)
def test_a_structure_that_cannot_fit_is_refused_before_it_is_tried(
    structure: nm.structures.Structure,
) -> None:
    model = torch.nn.Linear(*WIDE, bias=False)
    with pytest.raises(TooLargeError, match=r"TiB.*nm.Kronecker\(\)"):
        nm.fisher(model, nm.Gaussian(), torch.ones(1, WIDE[0]), structure)


def test_a_dense_form_that_cannot_fit_is_refused() -> None:
    model = torch.nn.Linear(*WIDE, bias=False)
    F = nm.fisher(model, nm.Gaussian(), torch.ones(1, WIDE[0]), nm.Diagonal())
    with pytest.raises(TooLargeError, match="TiB") as caught:
        F.to_dense()
    assert caught.value.bytes_needed == 4 * F.num_parameters**2
