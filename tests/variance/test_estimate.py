"""`nm.estimate`: right values, intervals that cover, runs that can be interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import neuromanifold as nm
from neuromanifold.testing import layer_cases, reference
from neuromanifold.testing.cases import CASES, Case

QUANTITIES = ("trace", "layers", "diagonal", "quadratic")
EVERY = (*QUANTITIES, "entries", "eigenvalue")
MODELS = [
    *[c for c in CASES if str(c).partition("-")[0] in ("mlp", "conv2d", "reused")],
    *[c for c in layer_cases.LAYERS if str(c) in ("attention_self", "tied_head")],
]
VALUES_RTOL = 1e-10


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def inputs(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, generator=generator, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(quantity: Any) -> Tensor:
    if isinstance(quantity, Tensor):
        return quantity.flatten()
    return torch.cat([value.flatten() for value in quantity.values()])


def needs(quantity: str, num_parameters: int) -> dict[str, Any]:
    """The vector, where one is needed."""
    if quantity != "quadratic":
        return {}
    return {"vector": torch.linspace(-1, 2, num_parameters, dtype=torch.float64)}


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= VALUES_RTOL * expected.norm()


def of_scores(scores: Tensor, quantity: str, F: nm.FisherOperator) -> Tensor:
    """What is estimated, from scores `(..., P)`: `(..., K)`."""
    if quantity == "diagonal":
        return scores.square()
    if quantity == "quadratic":
        return (scores @ needs(quantity, scores.shape[-1])["vector"]).square()[..., None]
    if quantity == "trace":
        return scores.square().sum(-1, keepdim=True)
    of_layer: dict[str, Tensor] = {}
    for name, s in F.layout.slices.items():
        layer = next(entry.block for entry in F.coverage.entries if entry.parameter == name)
        part = scores[..., s].square().sum(-1)
        of_layer[layer] = of_layer[layer] + part if layer in of_layer else part
    return torch.stack(list(of_layer.values()), dim=-1)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_exact_values_and_the_noise_of_data(case: Case, quantity: str) -> None:
    model, (x, y) = case.model(), case.data()
    exact = nm.Exact()
    F = nm.fisher(model, case.likelihood, (x, y), nm.Diagonal(), estimator=exact)
    with torch.no_grad():
        outputs = model(x)
    columns = torch.stack(
        [
            case.likelihood.mask_cotangent(u, outputs, y).flatten(1)
            for u in case.likelihood.fisher_columns(outputs)
        ]
    )
    scores = torch.einsum("vne,nep->vnp", columns, reference.jacobian(model, x).flatten(1, -2))
    expected = of_scores(scores, quantity, F).sum(dim=0)
    got = nm.estimate(
        model,
        case.likelihood,
        [(x[:2], y[:2]), (x[2:], y[2:])],
        quantity,  # type: ignore[arg-type]
        estimator=exact,
        **needs(quantity, F.num_parameters),
    )
    assert_same(flat(got.value), expected.mean(dim=0))
    assert_same(flat(got.variances["data"]), expected.var(dim=0) / len(x))
    assert (got.num_samples, got.draws, set(got.variances)) == (len(x), 1, {"data"})


class Recorded(nm.estimators.Estimator):
    """Sampled labels whose scores are kept."""

    random = True

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def cotangents(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        for u in nm.MonteCarlo(1).cotangents(*args, **kwargs):
            self.kept.append(u)
            yield u

    def num_sweeps(self, *args: Any) -> int:
        return 1


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_split_is_an_analysis_of_variance(quantity: str) -> None:
    model, x, labels = network(), inputs(30), Recorded()
    F = nm.fisher(model, nm.Categorical(), x, nm.Diagonal())
    n = len(x)
    got = nm.estimate(
        model,
        nm.Categorical(),
        x,
        quantity,  # type: ignore[arg-type]
        rtol=1e-6,
        max_draws=10,
        estimator=labels,
        **needs(quantity, F.num_parameters),
    )
    rounds = len(labels.kept) // 2
    assert got.draws == 2 * rounds >= 4
    u = torch.stack(labels.kept).unflatten(0, (rounds, 2))  # (rounds, draws, N, C)
    scores = torch.einsum("rdnc,ncp->rdnp", u, reference.jacobian(model, x))
    q = of_scores(scores, quantity, F)
    within = q.var(dim=1).mean(dim=(0, 1))  # of the draws of an input in a round
    between = q.mean(dim=1).var(dim=1).mean(dim=0)
    data = (between - within / 2).clamp(min=0)
    assert_same(flat(got.value), q.mean(dim=(0, 1, 2)))
    assert_same(flat(got.variances["labels"]), within / (n * 2 * rounds))
    assert_same(flat(got.variances["data"]), data / n)


def test_the_noise_of_labels_is_the_closed_form() -> None:
    model, x = network(), inputs(40)
    closed = flat(nm.variance.diagonal(model, nm.Categorical(), x).variances["labels"])
    runs = [
        nm.estimate(model, nm.Categorical(), x, "diagonal", rtol=1e-6, generator=seeded(s))
        for s in range(100)
    ]
    drawn = torch.stack([flat(run.variances["labels"]) * run.draws for run in runs])
    stderr = drawn.std(dim=0) / len(runs) ** 0.5
    assert ((drawn.mean(dim=0) - closed).abs() < 5 * stderr).all()


@pytest.mark.parametrize(
    ("quantity", "estimator"),
    [("layers", nm.MonteCarlo(1)), ("quadratic", nm.MonteCarlo(1)), ("trace", nm.RandomSigns(1))],
    ids=str,
)
def test_intervals_cover(quantity: Any, estimator: nm.estimators.Estimator) -> None:
    model, seeds, source = network(), 300, "labels"
    vector = needs(quantity, 31)
    if isinstance(estimator, nm.RandomSigns):
        source = "probes"

    def run(x: Tensor, **more: Any) -> nm.Estimated:
        return nm.estimate(model, nm.Categorical(), x, quantity, **vector, **more)

    truth = flat(run(inputs(200_000, seed=1234), estimator=nm.Exact()).value)
    covered, covered_here = torch.zeros_like(truth), torch.zeros_like(truth)
    for seed in range(seeds):
        x = inputs(300, seed)
        got = run(x, estimator=estimator, rtol=0.035, generator=seeded(seed))
        low, high = map(flat, got.interval(0.95))
        covered += (low <= truth) & (truth <= high)
        here = flat(run(x, estimator=nm.Exact()).value)  # for these very inputs
        covered_here += (flat(got.value) - here).abs() <= 1.96 * flat(got.error(source))
    for counted in (covered, covered_here):
        assert 0.92 * seeds <= counted.min()
        assert counted.max() <= 0.98 * seeds


class Stream:
    """Batches whose number is not known: products need the model."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize("kind", [list, Stream])
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_largest_eigenvalue_and_its_noise(case: Case, kind: Any) -> None:
    model, (x, y) = case.model(), case.data()
    parts = (x[:2], y[:2]), (x[2:], y[2:])
    dense = reference.dense_fisher(model, case.likelihood, (x, y))
    values, vectors = torch.linalg.eigh(dense)
    got = nm.estimate(
        model,
        case.likelihood,
        list(parts) if kind is list else Stream(*parts),
        "eigenvalue",
        estimator=nm.Exact(),
    )
    assert_same(got.value, values[-1])  # type: ignore[arg-type]
    shortfall = float(got.error("iteration"))  # type: ignore[arg-type]
    assert shortfall <= 1e-12 * values[-1]
    along = nm.estimate(
        model, case.likelihood, (x, y), "quadratic", vector=vectors[:, -1], estimator=nm.Exact()
    )
    # An error of the vector of 1e-8 over the gap shows in the variance to first order.
    allowed = 1e-6 * values[-1] / (values[-1] - values[-2])
    error = got.variances["data"] - along.variances["data"]  # type: ignore[operator]
    assert error.abs() <= allowed * along.variances["data"]


def test_sampled_labels_find_the_eigenvalue_of_the_exact_matrix() -> None:
    model, x = network(), inputs(300)
    exact = nm.fisher(model, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact())
    top = exact.eigenvalues(1)[0]
    runs = [
        nm.estimate(model, nm.Categorical(), x, "eigenvalue", rtol=0.2, generator=seeded(s))
        for s in range(40)
    ]
    values = torch.stack([run.value for run in runs])  # type: ignore[misc]
    labels = torch.stack([run.error("labels") for run in runs])  # type: ignore[misc]
    assert (values.mean() - top).abs() < 4 * values.std() / len(runs) ** 0.5
    assert values.std() == pytest.approx(float(labels.square().mean().sqrt()), rel=4 / 80**0.5)


def test_the_interval_of_the_eigenvalue_covers() -> None:
    """That of all inputs: the value is too large by much less than its error."""
    model, seeds = network(), 100
    F = nm.fisher(
        model, nm.Categorical(), inputs(100_000, seed=1234), nm.Dense(), estimator=nm.Exact()
    )
    truth, covered = F.eigenvalues(1)[0], 0
    for seed in range(seeds):
        got = nm.estimate(
            model, nm.Categorical(), inputs(300, seed), "eigenvalue", rtol=0.2, estimator=nm.Exact()
        )
        low, high = got.interval(0.95)
        covered += bool(low <= truth <= high)  # type: ignore[operator]
    assert abs(covered / seeds - 0.95) < 3 * (0.95 * 0.05 / seeds) ** 0.5


def test_no_information_has_the_eigenvalue_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    got = nm.estimate(model, nm.Categorical(), inputs(20), "eigenvalue", params=["0.*"])
    assert got.reached
    assert got.value == got.stderr == 0


@pytest.mark.parametrize(("share", "rtol"), [(None, 0.06), (0.25, 0.05)])
def test_so_many_entries_are_within_the_tolerance(share: float | None, rtol: float) -> None:
    model, x = network(), inputs(3000)

    def run(max_draws: int) -> nm.Estimated:
        return nm.estimate(
            model,
            nm.Categorical(),
            x,
            "entries",
            rtol=rtol,
            quantile=share,
            max_draws=max_draws,
            generator=seeded(0),
        )

    def known(got: nm.Estimated) -> float:
        """Share of the entries within it, in the worst tensor."""
        shares = {name: 1.96 * e <= rtol for name, e in got.relative.items()}  # type: ignore[union-attr]
        return min(float(within.double().mean()) for within in shares.values())

    wanted = share or 0.5
    got = run(1000)
    assert got.reached
    assert known(got) >= wanted
    before = run(got.draws - 2)  # where one round less was not enough
    assert not before.reached
    assert "labels for each input, max_draws" in before.note
    assert known(before) < wanted


def test_entries_that_are_zero_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, -100.0, -100.0, 1.0]))
    x = inputs(40)  # too few for the one unit that is alive
    got = nm.estimate(model, nm.Categorical(), x, "entries", rtol=0.05, params=["0.*"])
    assert not got.reached
    assert "0.weight" in got.note


def test_it_draws_until_the_tolerance_and_no_further() -> None:
    model, x = network(), inputs(3000)
    loose, tight = (
        nm.estimate(model, nm.Categorical(), x, rtol=rtol, generator=seeded(0))
        for rtol in (0.2, 0.0107)
    )
    assert loose.reached
    assert tight.reached
    assert loose.draws == 2 < tight.draws
    for rtol, got in ((0.2, loose), (0.0107, tight)):
        low, high = got.interval(0.95)
        assert (high - low) / 2 <= rtol * got.value
        assert got.note == ""
    assert tight.to_dict()["reached"] is True


def test_inputs_that_are_too_few_are_told() -> None:
    model, x = network(), inputs(50)
    got = nm.estimate(model, nm.Categorical(), x, "diagonal", rtol=0.02, generator=seeded(0))
    assert not got.reached
    assert got.draws < 20
    assert "these 50 inputs" in got.note
    assert "weight'" in got.note
    assert got.note in str(got)
    # What it asks for is enough, for the worst parameter.
    needed = int(got.note.split("more than ")[-1].split()[0].replace(",", ""))
    exact = nm.estimate(
        model, nm.Categorical(), inputs(2 * needed), "diagonal", rtol=0.02, estimator=nm.Exact()
    )
    assert exact.reached


def test_draws_have_a_limit() -> None:
    model, x = network(), inputs(3000)
    got = nm.estimate(model, nm.Categorical(), x, rtol=0.0107, max_draws=5, generator=seeded(0))
    assert not got.reached
    assert got.draws == 4
    assert "4 labels for each input" in got.note


def test_a_parameter_without_information_is_known_at_once() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()  # nothing goes back to the first layer
    got = nm.estimate(model, nm.Categorical(), inputs(500), "layers", rtol=0.3)
    assert got.reached
    assert got.value["0"] == 0
    assert got.error("labels")["0"] == 0


def interrupted_at(batch: int) -> Any:
    def progress(done: int, total: int | None) -> None:
        if done == batch:
            signal.raise_signal(signal.SIGINT)

    return progress


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
@pytest.mark.parametrize("quantity", EVERY)
def test_an_interrupted_run_goes_on(quantity: Any, batch: int, tmp_path: Path) -> None:
    model, x = network(), [(part,) for part in inputs(200).split(60)]
    path = tmp_path / "draws"
    vector = needs(quantity, 31)

    def run(**more: Any) -> nm.Estimated:
        return nm.estimate(model, nm.Categorical(), x, quantity, rtol=1e-3, **vector, **more)

    whole = run(generator=seeded(0))
    with pytest.raises(KeyboardInterrupt):
        run(generator=seeded(0), path=path, progress=interrupted_at(batch))
    batches = []
    resumed = run(generator=seeded(99), path=path, progress=lambda done, _: batches.append(done))
    assert len(batches) == whole.draws // 2 * len(x) - batch  # nothing is drawn twice
    for got, expected in zip(
        (resumed.value, *resumed.variances.values()),
        (whole.value, *whole.variances.values()),
        strict=True,
    ):
        assert torch.equal(flat(got), flat(expected))
    assert (resumed.draws, resumed.note) == (whole.draws, whole.note)
    # A finished file answers at once, and serves a tighter tolerance.
    again = run(path=path, progress=lambda *_: pytest.fail("it drew"))
    assert torch.equal(flat(again.value), flat(whole.value))


def test_a_finished_file_serves_a_tighter_tolerance(tmp_path: Path) -> None:
    model, x, path = network(), inputs(3000), tmp_path / "draws"
    loose = nm.estimate(model, nm.Categorical(), x, rtol=0.1, generator=seeded(0), path=path)
    tight = nm.estimate(model, nm.Categorical(), x, rtol=0.0107, path=path)
    once = nm.estimate(model, nm.Categorical(), x, rtol=0.0107, generator=seeded(0))
    assert loose.draws < tight.draws
    assert torch.equal(tight.value, once.value)  # type: ignore[arg-type]


def test_a_shuffling_loader_draws_the_interrupted_round_anew(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "draws"
    loader = DataLoader(inputs(200), batch_size=50, shuffle=True)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        nm.estimate(
            model, nm.Categorical(), loader, rtol=1e-3, path=path, progress=interrupted_at(6)
        )
    batches = []
    got = nm.estimate(
        model,
        nm.Categorical(),
        loader,
        rtol=1e-3,
        path=path,
        progress=lambda done, _: batches.append(done),
    )
    assert len(batches) == got.draws // 2 * 4 - 4
    exact = nm.estimate(model, nm.Categorical(), inputs(200), estimator=nm.Exact())
    assert (got.value - exact.value).abs() < 5 * got.error("labels")  # type: ignore[operator]


def test_progress_forecasts_the_batches() -> None:
    model, x = network(), [(part,) for part in inputs(3000).split(1000)]
    told: list[tuple[int, int | None]] = []
    got = nm.estimate(
        model,
        nm.Categorical(),
        x,
        rtol=0.0107,
        generator=seeded(0),
        progress=lambda done, total: told.append((done, total)),
    )
    batches = 3 * got.draws // 2
    assert [done for done, _ in told] == list(range(1, batches + 1))
    assert [total for _, total in told[:3]] == [None] * 3
    final = told[-1][1]
    assert final is not None
    assert batches <= final <= 2 * batches


OTHERS: dict[str, dict[str, Any]] = {
    "quantity": {"quantity": "layers"},
    "likelihood": {"likelihood": nm.Gaussian()},
    "estimator": {"estimator": nm.RandomSigns(1)},
    "model": {"model": network(1)},
    "params": {"params": ["0.*"]},
    "mode": {"model": network().eval()},
    "forward": {"forward": lambda model, x: 2 * model(x)},
    "data": {"data": inputs(50, seed=1)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_request_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "draws"
    asked: dict[str, Any] = {
        "model": network(),
        "likelihood": nm.Categorical(),
        "data": inputs(50),
        "quantity": "trace",
    }
    nm.estimate(**asked, path=path)
    before = path.read_bytes()
    with pytest.raises(nm.errors.StorageError, match=rf"another request.*'{what}'"):
        nm.estimate(**(asked | OTHERS[what]), path=path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_such_file_is_refused(tmp_path: Path) -> None:
    model, x, path = network(), inputs(20), tmp_path / "draws"
    path.write_bytes(b"something else")
    with pytest.raises(nm.errors.StorageError, match=r"not written by nm\.estimate"):
        nm.estimate(model, nm.Categorical(), x, path=path)
    nm.fisher(model, nm.Categorical(), x, nm.Diagonal()).save(path)
    with pytest.raises(nm.errors.StorageError, match=r"not written by nm\.estimate"):
        nm.estimate(model, nm.Categorical(), x, path=path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        nm.estimate(model, nm.Categorical(), x, path=tmp_path / "none" / "draws")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantity": "determinant"}, "quantity is one of.*trace"),
        ({"rtol": 0.0}, "rtol is a positive number"),
        ({"rtol": float("nan")}, "rtol is a positive number"),
        ({"confidence": 95}, "between 0 and 1"),
        ({"max_draws": 1}, "max_draws is at least 2"),
        ({"quantity": "quadratic"}, "give vector"),
        ({"quantile": 0.5}, "goes with quantity="),
        ({"quantity": "entries", "quantile": 0.0}, "share of the entries"),
        ({"quantity": "entries", "quantile": 50}, "share of the entries"),
        ({"vector": torch.ones(31)}, "take no vector"),
        ({"quantity": "quadratic", "vector": torch.ones(30)}, r"shape \(31,\)"),
        ({"quantity": "quadratic", "vector": torch.ones(31, 2)}, "one vector"),
        ({"estimator": nm.MonteCarlo(8), "max_draws": 10}, "A round draws 16 labels"),
        ({"data": torch.ones(1, 3).double()}, "at least 2 inputs"),
        ({"data": iter([torch.ones(4, 3).double()])}, "more than once"),
        ({"data": torch.full((4, 3), torch.nan).double()}, "NaN"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    asked = {"model": network(), "likelihood": nm.Categorical(), "data": inputs(8)}
    with pytest.raises(ValueError, match=message):
        nm.estimate(**(asked | arguments))


def test_values_whose_squares_single_precision_does_not_have() -> None:
    """A saturated classifier: all scores that are drawn are next to nothing, and none is zero."""
    model = network().float()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([95.0, 0.0, 0.0]))
    found = nm.estimate(
        *(model, nm.Categorical(), inputs(50).float(), "diagonal"),
        rtol=0.3,
        max_draws=8,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.value["2.bias"].dtype == torch.float32
    assert all(bool((error > 0).any()) for error in found.stderr.values())
