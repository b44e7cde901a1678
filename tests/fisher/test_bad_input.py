"""Each bad call gets an error that says what was given, what was expected, and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import neuromanifold as nm
from neuromanifold.errors import (
    CaptureError,
    NonFiniteError,
    NotPositiveDefiniteError,
    StorageError,
    TooLargeError,
    UncoveredParameterError,
    UnsupportedError,
)
from neuromanifold.linalg import memory

N = 6
X = torch.linspace(-2, 2, 4 * N).sin().reshape(N, 4)
Y = torch.arange(N) % 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def measure(data: Any = X, model: nn.Module | None = None, **options: Any) -> nm.FisherOperator:
    likelihood = options.pop("likelihood", nm.Categorical())
    structure = options.pop("structure", nm.Diagonal())
    return nm.fisher(net() if model is None else model, likelihood, data, structure, **options)


def frozen(name: str) -> nn.Module:
    model = net()
    model.get_parameter(name).requires_grad_(False)
    return model


def with_nan_parameter() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


def with_an_empty_parameter() -> nn.Module:
    model = net()
    model.register_parameter("nothing", nn.Parameter(torch.empty(0, 4)))
    return model


class Returns(nn.Module):
    """Gives its logits a form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.linear(x))


def used_up(batches: list[Any]) -> Any:
    iterator = iter(batches)
    list(iterator)
    return iterator


class Doubled(nn.Module):
    """With a layer that no rule reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.twice = net(), nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        return self.twice(h, h)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # data
        (lambda: measure(X[:, :3]), RuntimeError, r"6x3 and 4x5"),
        (lambda: measure((X, Y + 1)), ValueError, r"labels from 0 to 2.*got labels from 1 to 3"),
        (lambda: measure((X, Y - 1)), ValueError, r"labels from 0 to 2.*got labels from -1 to 1"),
        (lambda: measure((X, Y.double())), TypeError, r"integer class labels, got torch.float64"),
        (lambda: measure((X, Y[:-1])), ValueError, r"targets of shape \(6,\).*got \(5,\)"),
        (lambda: measure((X, Y.tolist())), TypeError, r"targets as a tensor, got list of 6"),
        (lambda: measure(X * math.nan), NonFiniteError, r"for 6 of 6 samples. Check the inputs"),
        (lambda: measure(X * math.inf), NonFiniteError, r"NaN or infinity for 6 of 6 samples"),
        (lambda: measure([]), ValueError, r"hold no batch.*the loader itself"),
        (lambda: measure(DataLoader(TensorDataset(X[:0]))), ValueError, r"hold no batch"),
        (lambda: measure(used_up([(X, Y)])), ValueError, r"hold no batch.*not iter\(loader\)"),
        (lambda: measure(X[:0]), ValueError, r"no samples: .*\(0, 3\).*Leave empty batches out"),
        (lambda: measure([X, X]), ValueError, r"list of tensors is ambiguous.*tuple \(inputs, t"),
        (lambda: measure((X, Y, Y)), ValueError, r"batch of 3 parts is ambiguous.*forward="),
        (lambda: measure([(X, Y, Y)]), ValueError, r"batch of 3 parts is ambiguous.*forward="),
        (lambda: measure({"x": X, "y": Y, "labels": Y}), ValueError, r"several target keys"),
        (lambda: measure(None), TypeError, r"data is a tensor.*DataLoader; got NoneType"),
        (lambda: measure(X.numpy()), TypeError, r"A batch is a tensor.*got ndarray"),
        (lambda: measure(TensorDataset(X, Y)), TypeError, r"DataLoader; got TensorDataset"),
        (lambda: measure(X.to("meta")), ValueError, r"on cpu, but.*on meta.*\.to\('cpu'\)"),
        (lambda: measure((X, Y.to("meta"))), ValueError, r"on cpu, but.*on meta.*\.to\('cpu'\)"),
        (lambda: measure(X, net().to("meta")), ValueError, r"parameters have no values.*to_empty"),
        # model
        (lambda: measure(model=with_nan_parameter()), NonFiniteError, r"and the parameters"),
        (
            lambda: measure(model=Returns(lambda logits: (logits, logits))),
            TypeError,
            r"takes one output tensor.*got tuple of 2. Pass forward=",
        ),
        (
            lambda: measure(model=Returns(lambda logits: {"scores": logits})),
            TypeError,
            r"takes one output tensor.*got dict of 1|takes one output tensor.*got dict. Pass forw",
        ),
        (lambda: measure(model=Returns(lambda z: z.argmax(-1))), TypeError, r"floating-point out"),
        (lambda: measure(model=Returns(Tensor.mean)), ValueError, r"not their loss"),
        (lambda: measure(model=Returns(Tensor.detach)), CaptureError, r"detach its outputs\?"),
        (
            lambda: measure(model=with_an_empty_parameter()),
            ValueError,
            r"\['nothing'\] have no ent",
        ),
        (lambda: measure(model=nn.Tanh()), ValueError, r"no trainable parameter.*requires_grad_"),
        (lambda: measure(model=Returns(lambda z: (0 * z).sqrt())), NonFiniteError, r"'linear"),
        (lambda: measure(model=torch.tanh), TypeError, r"model is e.g. a torch.nn.Module; got"),
        # choices
        (lambda: measure(params=["1.*"]), ValueError, r"'1\.\*', but no.*There are: \['0\.weight"),
        (lambda: measure(params=net().parameters()), TypeError, r"got a Parameter. Give names"),
        (lambda: measure(params="head.bias"), ValueError, r"'head.bias', but no parameter"),
        (lambda: measure(params=[]), ValueError, r"params is empty; name at least one"),
        (
            lambda: measure(model=frozen("0.bias"), params=["0.bias"]),
            ValueError,
            r"'0.bias', which is frozen. Call requires_grad_\(True\)",
        ),
        (lambda: measure(structure=nm.Diagonal), TypeError, r"the class Diagonal; pass an object"),
        (lambda: measure(estimator=nm.Exact), TypeError, r"the class Exact; pass an object"),
        (lambda: measure(likelihood=nm.Categorical), TypeError, r"the class Categorical; pass an"),
        (lambda: measure(likelihood=nn.MSELoss()), TypeError, r"MSELoss; pass nm.from_loss\(loss"),
        (lambda: measure(structure="diagonal"), TypeError, r"structure is e.g. nm.Kron.*got str"),
        (lambda: measure(per="token"), ValueError, r'"sample" or "position", got \'token\''),
        (lambda: measure(uncovered="skip"), ValueError, r'"generic" or "error", got \'skip\''),
        (
            lambda: measure(model=Doubled(), uncovered="error"),
            UncoveredParameterError,
            r"twice\.weight \(no rule for Bilinear\).*Pass params=",
        ),
        (
            lambda: measure(
                (torch.ones(2, 3, 6, 6), torch.ones(2, 6, 6).long()), model=nn.Conv2d(3, 4, 1)
            ),
            ValueError,
            r"of shape \(2, 4, 6\).* got \(2, 6, 6\).*use Categorical\(class_axis=1\)",
        ),
        (lambda: measure(estimator=nm.Empirical()), ValueError, r"pass \(inputs, targets\)"),
        (lambda: nm.MonteCarlo(0), ValueError, r"at least 1 label per input, got 0"),
        (lambda: nm.RandomSigns(-1), ValueError, r"at least 1 probe, got -1"),
        (lambda: nm.Kronecker("average"), ValueError, r'"expand" or "reduce", got \'average\''),
        (
            lambda: measure(iter([(X, Y)]), structure=nm.Implicit()),
            UnsupportedError,
            r"reads the data more than once.*Pass a DataLoader or a list",
        ),
        (
            lambda: measure((X, torch.full((N,), -100)), per="position"),
            ValueError,
            r"no observed position: all targets are ignored",
        ),
    ],
)
def test_measuring(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "structure",
    [
        nm.Dense(),
        nm.BlockDiagonal(),
        nm.UnitWise(),
        nm.Diagonal(),
        nm.Kronecker(),
        nm.Gram(),
        nm.Implicit(),
    ],
    ids=repr,
)
def test_gradient_that_overflows(structure) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda *call: (0 * call[-1]).sqrt())  # derivative 0 · ∞
    with pytest.raises(NonFiniteError, match=r"\['0.*gradient overflowed. Measure in a wider"):
        nm.fisher(model, nm.Categorical(), X, structure).trace()


OPERATORS = {
    "blocks": lambda: measure(structure=nm.BlockDiagonal()),
    "gram": lambda: measure(structure=nm.Gram()),
    "diagonal": measure,
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        *[
            (
                lambda F, damping=damping: F.solve(torch.ones(43), damping=damping),
                ValueError,
                rf"finite number >= 0 in nats/parameter², got {damping}",
            )
            for damping in (-1e-3, math.nan, math.inf)
        ],
        (lambda F: F.logdet(damping=-1.0), ValueError, r">= 0 in nats/parameter², got -1.0"),
        (lambda F: F.sample(2, damping=-1.0), ValueError, r">= 0 in nats/parameter², got -1.0"),
        (lambda F: F.sample(0, damping=1.0), ValueError, r"at least 1 vector, got num=0"),
        (lambda F: F @ torch.ones(42), ValueError, r"\(43,\) or \(43, R\); got \(42,\)"),
        (lambda F: F @ [1.0] * 43, TypeError, r"dict of tensors, a flat \(P,\).*got list"),
        (lambda F: F @ {"0.weight": X}, ValueError, r"missing \['0.bias', '2.weight'.*Expected"),
        (lambda F: F @ torch.ones(43, device="meta"), ValueError, r"vector is on meta.*on cpu"),
        (lambda F: F.inner(torch.ones(43, 2), torch.ones(43)), ValueError, r"single vectors; use"),
        (lambda F: F.restrict(["1.weight"]), ValueError, r"'1.weight'\]. There are: \['0.weight'"),
        (lambda F: F.block("3"), ValueError, r"no block '3'. There are: \['0', '2'\]"),
        (lambda F: -1.0 * F, ValueError, r"finite number >= 0, got -1.0"),
        (lambda F: F + measure(model=nn.Linear(4, 3)), ValueError, r"over the same parameters"),
    ],
)
def test_using(operator, use, error, message) -> None:
    with pytest.raises(error, match=message):
        use(operator())


@pytest.mark.parametrize("structure", [nm.Dense(), nm.BlockDiagonal(), nm.Gram()], ids=repr)
@pytest.mark.parametrize(
    "use",
    [
        lambda F: F.solve(torch.ones(43), damping=0.0),
        lambda F: F.inv_sqrt_matvec(torch.ones(43), damping=0),
        lambda F: F.logdet(damping=0),
    ],
)
def test_inverse_of_a_singular_matrix(structure, use) -> None:
    with pytest.raises(
        NotPositiveDefiniteError, match=r"singular.*Give a damping > 0.*F.trace\(\)"
    ):
        use(measure(structure=structure))


class TestTooLarge:
    """A megabyte is all there is; the message names bytes and what would fit."""

    @pytest.fixture(autouse=True)
    def _small_machine(self, monkeypatch) -> None:
        monkeypatch.setattr(memory, "available", lambda _: 2**20)

    @pytest.mark.parametrize(
        ("structure", "numbers", "instead"),
        [
            (nm.Dense(), (9000 + 9009) ** 2, "Gram"),
            (nm.BlockDiagonal(), 9000**2 + 9009**2, "Kronecker"),
            (nm.UnitWise(), 1000 * 9**2 + 9 * 1001**2, "Kronecker"),
        ],
        ids=repr,
    )
    def test_matrix(self, structure, numbers, instead) -> None:
        model = nn.Sequential(nn.Linear(8, 1000), nn.Linear(1000, 9))
        with pytest.raises(
            TooLargeError, match=rf"[MG]iB, but 1.0 MiB are free.*{instead}"
        ) as raised:
            measure(torch.ones(2, 8), model, structure=structure)
        assert raised.value.bytes_needed == 4 * numbers
        assert raised.value.bytes_available == 2**20

    def test_gram_matrix(self) -> None:
        with pytest.raises(TooLargeError, match=r"Gram matrix of 3000 samples.*nm\.Kronecker") as e:
            measure(torch.ones(3000, 4), structure=nm.Gram())
        assert e.value.bytes_needed == 4 * 3000**2

    def test_dense_form(self) -> None:
        F = measure(torch.ones(2, 8), nn.Linear(8, 300))
        with pytest.raises(TooLargeError, match=r"dense 2700 x 2700.*products F @ v"):
            F.to_dense()


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "F.safetensors"
        measure().save(path)
        return path

    def test_missing(self, tmp_path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file '.*absent.safetensors'"):
            nm.load(tmp_path / "absent.safetensors")

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, path, keep) -> None:
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(StorageError, match=r"not a complete safetensors file.*F.save\(path\)"):
            nm.load(path)

    def test_text(self, path) -> None:
        path.write_text("a text that is no Fisher matrix\n" * 10)
        with pytest.raises(StorageError, match=r"not a complete safetensors file.*something else"):
            nm.load(path)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_foreign(self, path, metadata) -> None:
        save_file({"weight": X}, path, metadata=metadata)
        with pytest.raises(StorageError, match=r"not a Fisher matrix.*written by F.save"):
            nm.load(path)

    @pytest.mark.parametrize(
        "manifest", ["{", "[]", "{}", '{"version": 1, "kind": "blocks"}', '{"version": "one"}']
    )
    def test_damaged_manifest(self, path, manifest) -> None:
        save_file({"weight": X}, path, metadata={"neuromanifold": manifest})
        with pytest.raises(StorageError, match=r"manifest.*F.save"):
            nm.load(path)

    def test_newer_version(self, path) -> None:
        manifest = json.dumps({"version": 99, "kind": "blocks"})
        save_file({"weight": X}, path, metadata={"neuromanifold": manifest})
        with pytest.raises(StorageError, match=r"newer version.*format 99.*pip install -U"):
            nm.load(path)

    def test_missing_folder(self, tmp_path) -> None:
        path = tmp_path / "absent" / "F.safetensors"
        with pytest.raises(FileNotFoundError, match=r"folder '.*absent' does not exist. Create it"):
            measure().save(path)
        assert list(tmp_path.iterdir()) == []

    def test_save_that_fails_leaves_what_was_there(self, path, monkeypatch) -> None:
        before = path.read_bytes()

        def fail(tensors: dict[str, Tensor], partial: Any, metadata: dict[str, str]) -> None:
            partial.write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr("neuromanifold.operators.storage.save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            measure().save(path)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_products_cannot_be_saved(self, tmp_path) -> None:
        with pytest.raises(UnsupportedError, match=r"Implicit\(\) has no exact stored form"):
            measure(structure=nm.Implicit()).save(tmp_path / "F.safetensors")
        assert list(tmp_path.iterdir()) == []
