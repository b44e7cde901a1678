"""Models whose capture would be silently wrong are refused; the message says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuromanifold as nm
from neuromanifold.errors import CaptureError, UncoveredParameterError, UnsupportedError

N = 6
X = torch.linspace(-1, 1, 4 * N).sin().reshape(N, 4)


class Net(nn.Module):
    """Two layers and what is done between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def measure(model: nn.Module, structure: nm.structures.Structure | None = None) -> None:
    nm.fisher(model, nm.Categorical(), X, structure or nm.Diagonal())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm_in_training_mode(kind) -> None:
    model = nn.Sequential(nn.Linear(4, 6), kind(6), nn.Linear(6, 3))
    with pytest.raises(UnsupportedError, match=r"'1' normalises with.*Call model.eval\(\) first"):
        measure(model)


def test_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedError, match=r"'1' normalises.*track_running_stats=True"):
        measure(model)


class Unknown(nn.Module):
    """A layer that no rule reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.weight * x)


MIXING = {
    "statistics": lambda h: F.batch_norm(h, None, None, training=True),
    "attention": lambda h: torch.softmax(h @ h.T, -1) @ h,
    "first as reference": lambda h: h - h[:1],
    "last as reference": lambda h: h - h[-1:],
    "neighbour": lambda h: h + h.roll(1, 0),
    "earlier samples": lambda h: h.cumsum(0),
    "later samples": lambda h: h.flip(0).cumsum(0).flip(0),
}


@pytest.mark.parametrize("between", MIXING.values(), ids=MIXING)
def test_samples_that_are_mixed(between) -> None:
    with pytest.raises(CaptureError, match=r"outputs of a sample change when it is run alone"):
        measure(Net(between))


@pytest.mark.parametrize("between", MIXING.values(), ids=MIXING)
def test_samples_that_are_mixed_before_a_parameter_without_a_rule(between) -> None:
    model = nn.Sequential(Net(between), Unknown(3)).requires_grad_(False)
    model[1].requires_grad_(True)
    with pytest.raises(CaptureError, match=r"outputs of a sample change when it is run alone"):
        measure(model)


def test_weak_mixing() -> None:
    with pytest.raises(CaptureError, match=r"outputs of a sample change when it is run alone"):
        measure(Net(lambda h: h + 0.01 * h.mean(0)))


def test_mixing_in_training_only() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    model = nn.Sequential(nn.Linear(4, 6), Centred(), nn.Tanh(), nn.Linear(6, 3)).eval()
    measure(model)
    with pytest.raises(CaptureError, match=r"outputs of a sample change when it is run alone"):
        measure(model.train())


def test_parameters_without_a_shape() -> None:
    with pytest.raises(ValueError, match=r"0.weight.*no shape.*Call the model once"):
        measure(nn.Sequential(nn.LazyLinear(3)))


def test_complex_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match=r"'1\.weight', '1\.bias'\] are complex"):
        measure(model)


def test_mixing_that_starts_after_the_first_batch() -> None:
    batches = [(X[:1], None), (X[1:], None)]  # one sample alone has nothing to be mixed with
    with pytest.raises(CaptureError, match=r"cannot be told apart in the input of 'a'"):
        nm.fisher(Net(MIXING["attention"]), nm.Categorical(), batches, nm.Diagonal())


def test_module_that_is_bypassed_only_later() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if len(x) == 1 else F.linear(x, self.a.weight, self.a.bias)

    batches = [(X[:1], None), (X[1:], None)]
    with pytest.raises(CaptureError, match=r"'a' is bypassed in this batch but was not in the fir"):
        nm.fisher(Later(), nm.Categorical(), batches, nm.Diagonal())


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("run_before", [False, True])
def test_part_compiled_before(backend, run_before) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0] = torch.compile(model[0], backend=backend)
    if run_before:
        model(X)
    with pytest.raises(CaptureError, match=r"part of the model was compiled.*Compile the whole mo"):
        measure(model)


class TestReentrantCheckpointing:
    def test_of_inner_layers(self) -> None:
        model = Net(lambda h: checkpoint(torch.tanh, h, use_reentrant=True))
        with pytest.raises(CaptureError, match=r"reentrant.*use_reentrant=False"):
            measure(model)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_of_the_first_layer(self) -> None:
        """Its output seems to depend on nothing, so nothing in the graph tells of it."""

        class First(Net):
            def forward(self, x: Tensor) -> Tensor:
                return self.b(checkpoint(self.a, x, use_reentrant=True))

        with pytest.raises(CaptureError, match=r"'a' ran with gradients switched off.*use_reentra"):
            measure(First(torch.tanh))


def test_layer_under_no_grad() -> None:
    class Frozen(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.a(x)
            return self.b(h)

    model = Frozen(torch.tanh)
    with pytest.raises(CaptureError, match=r"'a' ran with gradients switched.*requires_grad_\(Fal"):
        measure(model)
    model.a.requires_grad_(False)
    measure(model)


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_outputs_without_a_graph(how) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.forward = how()(lambda x: nn.Sequential.forward(model, x))
    with pytest.raises(CaptureError, match=r"do not depend on any.*no_grad\(\), or detach"):
        measure(model)


def test_detached_outputs() -> None:
    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(CaptureError, match=r"do not depend on any.*no_grad\(\), or detach"):
        measure(Detached(torch.tanh))


def test_input_changed_after_its_use() -> None:
    class Changed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            h = self.a(x)
            x.zero_()
            return self.b(h)

    with pytest.raises(CaptureError, match=r"input of 'a' was changed in place.*out-of-place"):
        measure(Changed(torch.tanh))


def test_parameter_without_a_rule_on_request() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Unknown(6), nn.Linear(6, 3))
    message = r"1\.weight \(no rule for Unknown\).*Pass params=.*uncovered=\"generic\""
    with pytest.raises(UncoveredParameterError, match=message):
        nm.fisher(model, nm.Categorical(), X, nm.Diagonal(), uncovered="error")


def test_parameter_whose_module_is_bypassed_on_request() -> None:
    class Bypassed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.linear(x, self.a.weight, self.a.bias))

    with pytest.raises(UncoveredParameterError, match=r"a\.weight \(its Linear is bypassed\)"):
        nm.fisher(Bypassed(torch.tanh), nm.Categorical(), X, nm.Diagonal(), uncovered="error")


class TestImplicit:
    """Products run the model again and again, with parameters that torch.func replaces."""

    def test_dropout_in_training_mode(self) -> None:
        model = Net(nn.Dropout(0.5))
        with pytest.raises(
            UnsupportedError, match=r"other outputs when.*model\.eval\(\).*Gram\(\)"
        ):
            measure(model, nm.Implicit())
        measure(model.eval(), nm.Implicit())

    def test_parameters_that_modules_read_from_a_list(self) -> None:
        model = Net(torch.tanh)
        hidden = nn.Linear(6, 6)
        vars(model)["hidden"] = [hidden]
        model.between = lambda h: vars(model)["hidden"][0](h)
        model.held = nn.ParameterList(hidden.parameters())
        with pytest.raises(UnsupportedError, match=r"reads \['held.0', 'held.1'\] from.*Gram\(\)"):
            measure(model, nm.Implicit())
