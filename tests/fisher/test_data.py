"""Whatever form the data come in, the Fisher matrix is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import neuromanifold as nm

N = 7
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (N,), generator=GENERATOR)


class Model(nn.Module):
    """`x`, or its halves; the outputs in any wrapping."""

    def __init__(self, wrap: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.wrap = wrap
        weights = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=weights, dtype=p.dtype)

    def forward(self, x: Tensor, rest: Tensor | None = None) -> Any:
        logits = self.body(x if rest is None else torch.cat([x, rest], dim=1))
        return logits if self.wrap is None else self.wrap(logits)


@dataclass
class Output:
    """As a library of language models returns it."""

    logits: Tensor
    loss: Tensor | None = None


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield X[:4], Y[:4]
    yield X[4:], Y[4:]


class Inputs(Mapping[str, Tensor]):
    """A mapping that is no dict, as tokenizers return it."""

    def __init__(self, **entries: Tensor) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


HALVES = (X[:, :2], X[:, 2:])
FORMS: dict[str, Any] = {
    "tensor": lambda: X,
    "pair": lambda: (X, Y),
    "pair without targets": lambda: (X, None),
    "single": lambda: (X,),
    "mapping": lambda: {"x": X},
    "mapping with labels": lambda: {"x": X, "labels": Y},
    "mapping with targets": lambda: {"x": X, "targets": Y},
    "mapping with y": lambda: {"x": X, "y": Y},
    "mapping of another class": lambda: Inputs(x=X, labels=Y),
    "tuple of inputs": lambda: (HALVES, Y),
    "tuple of inputs without targets": lambda: (HALVES, None),
    "mapping of inputs": lambda: ({"x": HALVES[0], "rest": HALVES[1]}, Y),
    "mapping of several": lambda: {"x": HALVES[0], "rest": HALVES[1], "labels": Y},
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=3),
    "loader of inputs": lambda: DataLoader(TensorDataset(X), batch_size=3),
    "loader of mappings": lambda: DataLoader(
        [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)], batch_size=2
    ),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=3),
    "list of pairs": lambda: list(batches()),
    "list of singles": lambda: [(X[:1],), (X[1:],)],
    "generator": batches,
    "generator of tensors": lambda: iter(X.split(3)),
    "generator of mappings": lambda: ({"x": x, "labels": y} for x, y in batches()),
}


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return nm.fisher(Model(), nm.Categorical(), X, nm.Dense(), estimator=nm.Exact()).to_dense()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("structure", [nm.Dense(), nm.Gram()], ids=repr)
def test_forms_of_data(form, structure, expected) -> None:
    F = nm.fisher(Model(), nm.Categorical(), form(), structure, estimator=nm.Exact())
    assert F.num_samples == N
    torch.testing.assert_close(F.to_dense(), expected)


REPEATABLE = {name: form for name, form in FORMS.items() if not name.startswith("generator")}


@pytest.mark.parametrize("form", REPEATABLE.values(), ids=REPEATABLE)
def test_forms_of_data_that_are_read_again(form, expected) -> None:
    F = nm.fisher(Model(), nm.Categorical(), form(), nm.Implicit(), estimator=nm.Exact())
    torch.testing.assert_close(F.to_dense(), expected)
    torch.testing.assert_close(F.to_dense(), expected)


WITH_TARGETS = [
    name for name in FORMS if name in ("pair", "mapping of inputs", "generator") or "label" in name
]


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_targets_are_found(name) -> None:
    model = Model()
    F = nm.fisher(model, nm.Categorical(), FORMS[name](), nm.Dense(), estimator=nm.Empirical())
    rows = []
    for x, y in zip(X, Y, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    g = torch.stack(rows)
    torch.testing.assert_close(F.to_dense(), g.T @ g / N)


@pytest.mark.parametrize(
    "wrap", [lambda z: Output(z), lambda z: {"logits": z, "loss": None}], ids=["object", "mapping"]
)
@pytest.mark.parametrize("structure", [nm.Dense(), nm.Implicit()], ids=repr)
def test_outputs_with_logits(wrap, structure, expected) -> None:
    F = nm.fisher(Model(wrap), nm.Categorical(), X, structure, estimator=nm.Exact())
    torch.testing.assert_close(F.to_dense(), expected)


@pytest.mark.parametrize("structure", [nm.Dense(), nm.Implicit()], ids=repr)
def test_forward(structure, expected) -> None:
    """`inputs` arrive as they are in the data, whatever they are."""

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        first, second = inputs["halves"]
        return model(torch.cat([first, second], dim=1))[0]

    F = nm.fisher(
        Model(lambda logits: (logits, "more")),
        nm.Categorical(),
        ({"halves": HALVES}, Y),
        structure,
        estimator=nm.Exact(),
        forward=forward,
    )
    torch.testing.assert_close(F.to_dense(), expected)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tensor", [(1, 1)]),
        ("loader", [(1, 3), (2, 3), (3, 3)]),
        ("list of pairs", [(1, 2), (2, 2)]),
        ("generator", [(1, None), (2, None)]),
        ("loader of a stream", [(1, None), (2, None), (3, None)]),
    ],
)
@pytest.mark.parametrize("structure", [nm.Diagonal(), nm.Dense(), nm.Gram()], ids=repr)
def test_progress(name, told, structure) -> None:
    reports: list[tuple[int, int | None]] = []
    nm.fisher(
        Model(),
        nm.Categorical(),
        FORMS[name](),
        structure,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert reports == told


def test_progress_bar_leaves_stdout_clean(capsys) -> None:
    nm.fisher(Model(), nm.Categorical(), FORMS["loader"](), nm.Diagonal(), progress=True)
    assert capsys.readouterr().out == ""


def test_ignored_positions_come_from_the_targets() -> None:
    model, x = nn.Linear(4, 3).double(), X[:6].reshape(2, 3, 4)
    y = torch.tensor([[0, -100, 1], [-100, -100, 2]])

    def measure(data: Any, **options: Any) -> nm.FisherOperator:
        return nm.fisher(model, nm.Categorical(), data, nm.Dense(), estimator=nm.Exact(), **options)

    observed = measure(x[y != -100])  # three samples of one position each
    assert measure((x, y)).num_samples == 2
    torch.testing.assert_close(measure((x, y)).to_dense(), observed.to_dense() * 3 / 2)
    torch.testing.assert_close(measure((x, y), per="position").to_dense(), observed.to_dense())


def test_implicit_products_need_one_order_of_samples():
    dataset = torch.utils.data.TensorDataset(torch.randn(6, 3))
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, shuffle=True)
    model = nn.Linear(3, 2)
    with pytest.raises(nm.errors.UnsupportedError, match=r"shuffle=False, or nm\.Exact"):
        nm.fisher(model, nm.Categorical(), loader, nm.Implicit())
    nm.fisher(model, nm.Categorical(), loader, nm.Implicit(), estimator=nm.Exact())
