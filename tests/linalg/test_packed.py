import pytest
import torch

from neuromanifold.linalg.packed import pack, product, unpack


@pytest.mark.parametrize("n", range(1, 12))
def test_what_is_packed_comes_back(n: int) -> None:
    x = torch.randn(2, 3, n, n)
    matrices = x + x.mT
    packed = pack(matrices)
    assert torch.equal(unpack(packed), matrices)
    assert packed.shape[-1] <= n * (n + 1) // 2 + (n + 1) // 2


def test_sums_of_packed_matrices_are_those_of_the_matrices() -> None:
    a, b = ((lambda x: x @ x.T)(torch.randn(5, 7)) for _ in range(2))
    torch.testing.assert_close(unpack(pack(a) * 0.5 + pack(b)), a * 0.5 + b)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_products_of_packed_matrices(n: int, batch: int) -> None:
    x, y = torch.randn(batch, 6, n).double(), torch.randn(batch, n, 4).double()
    matrices, packed = x.mT @ x, pack(x.mT @ x)
    torch.testing.assert_close(product(packed, y, torch.empty_like(y)), matrices @ y)
    columns = product(packed, y, torch.empty_like(y.mT.contiguous()).mT)
    torch.testing.assert_close(columns, matrices @ y)
