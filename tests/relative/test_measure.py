"""The metric of a component by itself, and inside a model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import neuromanifold as nm
from neuromanifold.errors import CaptureError, UnsupportedError
from neuromanifold.relative.measure import fisher, of
from neuromanifold.relative.responses import Binary, Probabilities, Through
from neuromanifold.testing import reference


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def seeded(build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double().eval()


def mlp(*sizes: int, activation=nn.Tanh) -> nn.Sequential:
    def build() -> nn.Sequential:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        return nn.Sequential(*layers[:-1])

    return seeded(build)


def equal(F, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert_close(F.to_dense(), expected, rtol=tolerance, atol=tolerance)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.inner(x)


class Twice(nn.Module):
    """Calls a layer twice, by position and by keyword, and writes into its input afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h = torch.tanh(h)
        out = self.layer(input=h)
        h.zero_()
        return out


def inputs_of_twice(model: Twice, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat((x, torch.tanh(model.layer(x))))


@pytest.mark.parametrize(
    ("structure", "projection"),
    [
        (None, "UnitWise"),
        (nm.Dense(), "Dense"),
        (nm.BlockDiagonal(), "BlockDiagonal"),
        (nm.Diagonal(), "Diagonal"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "response", [nm.Gaussian(), Binary((-1, 1)), Through(mlp(3, 2), nm.Categorical())], ids=repr
)
def test_equals_the_oracle(response, structure, projection):
    component, x = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh())), randn(7, 4)
    F = fisher(component, x, response, structure)
    values = component(x).detach()
    metric = (
        torch.diag_embed(1 / (1 - values**2))
        if isinstance(response, Binary)
        else sandwiched(response, values)
    )
    j = reference.jacobian(component, x)
    dense = torch.einsum("nep,nef,nfq->pq", j, metric, j) / 7
    equal(F, reference.project(dense, component, projection))


def sandwiched(response, values: Tensor) -> Tensor:
    if not isinstance(response, Through):
        return reference.output_fisher(response, values)
    inner = reference.output_fisher(response.response, response.above(values))
    (weight,) = (m.weight.detach() for m in response.above)
    return weight.T @ inner @ weight


def test_softmax_layer_of_a_network_equals_its_exact_block():
    model, x = mlp(4, 5, 3), randn(9, 4)
    whole = nm.fisher(model, nm.Categorical(), x, nm.BlockDiagonal(), estimator=nm.Exact())
    exact = whole.block("2").to_dense()
    equal(of(model, "2", x, nm.Categorical(), nm.BlockDiagonal()), exact, 1e-12)

    with_softmax = nn.Sequential(model[:2], nn.Sequential(model[2], nn.Softmax(dim=-1)))
    measured = of(with_softmax, "1", x, Probabilities(), nm.BlockDiagonal())
    equal(measured, exact, 1e-12)
    dense = reference.dense_fisher(model, nm.Categorical(), x)
    equal(measured, dense[-18:, -18:], 1e-12)


def test_the_surroundings_do_not_matter():
    component, below, x = mlp(5, 4), mlp(3, 5), randn(8, 3)
    nets = [
        nn.Sequential(below, nn.Sequential(component, nn.Tanh()), mlp(4, 2)),
        nn.Sequential(below, nn.Sequential(component, nn.Tanh()), mlp(4, 6, 3)),
    ]
    relative = [of(net, "1", x, Binary((-1, 1)), nm.Dense()).to_dense() for net in nets]
    assert_close(*relative, rtol=1e-12, atol=1e-12)
    full = [
        nm.fisher(net, nm.Categorical(), x, nm.Dense(), estimator=nm.Exact(), params=["1.*"])
        for net in nets
    ]
    a, b = (F.to_dense() for F in full)
    assert (a - b).norm() > 0.1 * a.norm()


def conv_net() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.Conv2d(2, 2, 3, stride=2),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return seeded(lambda: nn.TransformerEncoder(layer, 2))


@pytest.mark.parametrize(
    ("build", "name", "shape", "below"),
    [
        pytest.param(conv_net, "3", (5, 1, 5, 5), slice(3), id="convolution"),
        pytest.param(transformer, "1", (4, 3, 3), slice(1), id="attention block"),
        pytest.param(
            lambda: seeded(lambda: nn.Sequential(nn.Linear(3, 4), Residual(4), nn.Linear(4, 2))),
            "1",
            (6, 3),
            slice(1),
            id="residual block",
        ),
        pytest.param(conv_net, "", (5, 1, 5, 5), slice(0), id="all of it"),
    ],
)
def test_of_equals_the_oracle_at_the_captured_inputs(build, name, shape, below):
    model, x = build(), randn(*shape)
    component = model.get_submodule(name)
    inputs = model[below](x).detach()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = reference.dense_fisher(component, nm.Gaussian(), inputs)
    equal(of(model, name, x, nm.Gaussian(), nm.Dense()), expected)


def test_of_a_part_that_a_fused_path_would_give_other_inputs():
    """Without gradients an encoder packs what is not padded, and layers get no plain tensor."""
    model, x = encoder(), randn(4, 3, 4)
    padded = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()
    given: list[Tensor] = []
    handle = model.layers[1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(x, src_key_padding_mask=padded)
    handle.remove()
    F = of(
        model,
        "layers.1",
        {"src": x, "src_key_padding_mask": padded},
        nm.Gaussian(),
        nm.Dense(),
    )
    layer = model.layers[1]
    expected = fisher(
        layer,
        (given[0].detach(), None),
        nm.Gaussian(),
        nm.Dense(),
        forward=lambda m, h: m(h, src_key_padding_mask=padded.double() * -1e9),
    )
    equal(F, expected.to_dense())
    assert torch.backends.mha.get_fastpath_enabled()


def test_of_picks_the_outputs():
    model, x = transformer(), randn(4, 3, 3)
    attention = model[1].self_attn
    F = of(model, "1.self_attn", x, nm.Gaussian(), nm.Dense(), outputs=lambda out: out[0])
    inputs = model[0](x).detach()
    expected = fisher(
        attention,
        (inputs, None),
        nm.Gaussian(),
        nm.Dense(),
        forward=lambda m, h: m(h, h, h, need_weights=False)[0],
    )
    equal(F, expected.to_dense())


def test_a_part_that_is_called_twice():
    model, x = seeded(Twice), randn(5, 3)
    F = of(model, "layer", x, nm.Gaussian(), nm.Dense())
    expected = reference.dense_fisher(model.layer, nm.Gaussian(), inputs_of_twice(model, x))
    equal(F, expected)
    assert F.num_samples == 10


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("structure", [nm.Dense(), nm.EigenKronecker()], ids=repr)
def test_batches_are_weighted_by_their_samples(structure, shuffle):
    model, x = mlp(4, 5, 3), randn(10, 4)
    loader = DataLoader(
        TensorDataset(x, torch.zeros(10)),
        batch_size=4,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(0),
    )
    F = of(model, "2", loader, nm.Categorical(), structure)
    expected = of(model, "2", x, nm.Categorical(), structure)
    assert F.num_samples == 10
    equal(F, expected.to_dense())


def test_of_a_model_with_its_own_forward():
    model, x = mlp(4, 5, 3), randn(6, 4)
    data = {"features": x, "labels": torch.zeros(6)}
    F = of(model, "2", data, nm.Gaussian(), forward=lambda m, inputs: m(inputs["features"]))
    equal(F, of(model, "2", x, nm.Gaussian()).to_dense())


def test_of_in_parts_that_fit():
    model, x = mlp(4, 200, 3), randn(2000, 4)
    parts: list[int] = []
    F = of(
        model,
        "2",
        x,
        nm.Categorical(),
        nm.Diagonal(),
        max_bytes="1 MiB",
        progress=lambda done, _: parts.append(done),
    )
    assert max(parts) > 1
    expected = of(model, "2", x, nm.Categorical(), nm.Diagonal()).diagonal()
    assert_close(F.diagonal(), expected)


def batches(num: int) -> list[tuple[Tensor, None]]:
    return [(part, None) for part in randn(4 * num, 4).split(4)]


@pytest.mark.parametrize("max_bytes", [None, "1 GiB"])
def test_of_data_that_can_be_read_once(max_bytes):
    model = mlp(4, 5, 3)
    F = of(model, "2", iter(batches(3)), nm.Categorical(), max_bytes=max_bytes)
    assert F.num_samples == 12
    equal(F, of(model, "2", batches(3), nm.Categorical()).to_dense())


def test_of_data_that_would_have_to_be_read_twice():
    with pytest.raises(UnsupportedError, match="only once"):
        of(mlp(4, 5, 3), "2", iter(batches(3)), nm.Categorical(), nm.EigenKronecker())


def test_of_shuffled_data_with_drawn_labels_is_refused_where_they_are_read_twice():
    loader = DataLoader(TensorDataset(randn(8, 4)), batch_size=4, shuffle=True)
    with pytest.raises(UnsupportedError, match="shuffle"):
        of(
            mlp(4, 5, 3),
            "2",
            loader,
            nm.Categorical(),
            nm.EigenKronecker(),
            estimator=nm.MonteCarlo(1),
        )


def test_of_runs_the_model_under_the_autocast_of_the_caller():
    model, x = mlp(4, 5, 3).float(), randn(6, 4).float()
    seen: list[torch.dtype] = []
    handle = model[1].register_forward_hook(lambda _, args, __: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        of(model, "2", x, nm.Gaussian())
    handle.remove()
    assert set(seen) == {torch.bfloat16}


def test_of_leaves_the_model_alone():
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.ReLU()))
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    of(model, "1", randn(6, 4), nm.Gaussian())
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_model_leaves_no_hook():
    model = mlp(4, 5, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        of(model, "2", randn(6, 7), nm.Gaussian())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_wrong_name_lists_the_nearest():
    model = nn.ModuleDict({f"layer{i}": mlp(2, 2, 2) for i in range(9)})
    with pytest.raises(ValueError, match=r"no part 'layers7\.0'\. It has \['layer7\.0'"):
        of(model, "layers7.0", randn(3, 2), nm.Gaussian())


def test_a_part_that_is_not_called_is_named():
    with pytest.raises(CaptureError, match="without calling its part 'unused'"):
        of(seeded(Twice), "unused", randn(3, 3), nm.Gaussian())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((randn(3, 2), mlp(2, 2), nm.Gaussian()), "component is", id="order"),
        pytest.param((mlp(2, 2), randn(3, 2), "gaussian"), "response says", id="word"),
        pytest.param((mlp(2, 2), randn(3, 2), nm.Gaussian), "Pass an object", id="class"),
    ],
)
def test_says_what_it_takes(arguments, message):
    with pytest.raises(TypeError, match=message):
        fisher(*arguments)


def test_of_takes_a_model():
    with pytest.raises(TypeError, match="model is"):
        of("layers.2", mlp(2, 2), randn(3, 2), nm.Gaussian())
