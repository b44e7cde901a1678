import copy

import pytest
import torch

from neuromanifold.belief.datasets import lines
from neuromanifold.belief.machines import HelmholtzMachine
from neuromanifold.belief.training import BidirectionalHelmholtz, ReweightedWakeSleep, WakeSleep

ALGORITHMS = [WakeSleep, ReweightedWakeSleep, BidirectionalHelmholtz]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_machine(sizes=(2, 3, 4), *, seed=0, **options):
    machine = HelmholtzMachine(list(sizes), generator=seeded(seed), dtype=torch.float64, **options)
    with torch.no_grad():
        for bias in machine.parameters():
            bias.add_(0.3 * torch.randn(bias.shape, generator=seeded(seed + 1)))
    return machine


def make_batch(num=8, *, low=0):
    bits = torch.rand(num, 4, generator=seeded(5), dtype=torch.float64) < 0.5
    return torch.where(bits, 1.0, float(low)).double()


def parameters(machine):
    return torch.cat([p.detach().flatten() for p in machine.parameters()])


def passes(machine, v, samples, generator):
    """Wake and sleep states, drawn in the order that a step draws them."""
    hidden = machine.recognition.sample(v.repeat(samples, 1), generator)
    return hidden, machine.generative.sample(samples * len(v), generator)


def ascent(module, objective):
    """Gradients by autograd, by name."""
    names, values = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(objective, values), strict=True))


def expected_gradients(algorithm, machine, v, samples, generator):
    """The definition (papers.md §5.3), with autograd."""
    wake, sleep = passes(machine, v, samples, generator)
    power, wake_share, sleep_share = {
        WakeSleep: (0, 0, 1),
        ReweightedWakeSleep: (1, 0.5, 0.5),
        BidirectionalHelmholtz: (0.5, 1, 0),
    }[algorithm]
    ratios = machine.log_weights(wake).view(samples, len(v))
    weights = (power * ratios).softmax(0).detach()
    of_p = (weights.flatten() * machine.generative.log_joint(wake)).sum() / len(v)
    baselined = (weights - 1 / samples).flatten() * machine.recognition.log_prob(wake)
    of_q = wake_share * baselined.sum() / len(v)
    of_q = of_q + sleep_share * machine.recognition.log_prob(sleep).mean()
    return ascent(machine.generative, of_p), ascent(machine.recognition, of_q)


def natural(net, gradients, states, damping):
    """Unit by unit, from the definition."""
    directions = {}
    for layer in net.modelled:
        x = net.inputs(states, layer)
        on = net.probabilities(states, layer).expand(len(x), -1)
        g = torch.cat(
            [gradients[f"weights.{layer}_{parent}"] for parent in net.parents[layer]]
            + [gradients[f"biases.{layer}"][:, None]],
            dim=1,
        )
        found = []
        for unit in range(len(g)):
            curvature = on[:, unit] * (1 - on[:, unit]) / len(x)
            fisher = x.T @ torch.diag(curvature) @ x
            shifted = fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype)
            found.append((1 + damping) * torch.linalg.solve(shifted, g[unit]))
        directions |= net.split(layer, torch.stack(found))
    return directions


def changes(machine, before):
    return {name: p.detach() - before[name] for name, p in machine.named_parameters()}


def snapshot(machine):
    return {name: p.detach().clone() for name, p in machine.named_parameters()}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("options", [{}, {"coding": (-1, 1), "skips": [(0, 2)]}])
def test_plain_steps_follow_the_gradients(algorithm, options):
    machine = make_machine(**options)
    v = make_batch(low=-1 if options else 0)
    of_p, of_q = expected_gradients(algorithm, machine, v, 5, seeded(3))
    before = snapshot(machine)
    algorithm(machine, lr=0.5, samples=5, natural=False, generator=seeded(3)).step(v)
    moved = changes(machine, before)
    for prefix, gradients in (("generative", of_p), ("recognition", of_q)):
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                moved[f"{prefix}.{name}"], 0.5 * gradient, rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("options", [{}, {"coding": (-1, 1), "skips": [(0, 2)]}])
def test_natural_steps_solve_with_rows_of_the_right_net(algorithm, options):
    machine = make_machine(**options)
    v = make_batch(low=-1 if options else 0)
    of_p, of_q = expected_gradients(algorithm, machine, v, 5, seeded(3))
    with torch.no_grad():
        wake, sleep = passes(machine, v, 5, seeded(3))
        expected = {
            "generative": natural(machine.generative, of_p, sleep, 0.2),
            "recognition": natural(machine.recognition, of_q, wake, 0.2),
        }
    before = snapshot(machine)
    algorithm(machine, lr=0.5, samples=5, damping=0.2, blocks="exact", generator=seeded(3)).step(v)
    moved = changes(machine, before)
    for prefix, directions in expected.items():
        for name, direction in directions.items():
            torch.testing.assert_close(
                moved[f"{prefix}.{name}"], 0.5 * direction, rtol=1e-10, atol=1e-10
            )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_large_damping_is_the_plain_gradient(algorithm):
    v = make_batch()
    results = []
    for options in ({"natural": False}, {"damping": 1e13}):
        machine = make_machine()
        training = algorithm(machine, lr=0.5, samples=5, generator=seeded(3), **options)
        if algorithm is BidirectionalHelmholtz:
            training.step(v)  # natural steps draw sleep states at the end of the first one
        else:
            for _ in range(3):
                training.step(v)
        results.append(parameters(machine))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_the_wake_gradient_of_exact_posteriors_is_that_of_the_likelihood():
    """EM identity: with q(h | v) = p(h | v), mean scores are the visible gradient."""
    net = make_machine((2, 3)).generative
    v = make_batch(6)[:, :3]
    exact = ascent(net, net.exact_log_likelihood(v).mean())
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2).double()  # (S, 2)
    layers = [states.repeat_interleave(6, 0), v.repeat(4, 1)]
    log_joint = net.log_joint(layers)
    posterior = log_joint.view(4, 6).softmax(0).flatten().detach()
    for name, gradient in ascent(net, (posterior * log_joint).sum() / 6).items():
        torch.testing.assert_close(gradient, exact[name], rtol=0, atol=1e-12)


def test_many_samples_estimate_the_likelihood_and_its_gradient():
    machine = make_machine()
    v = make_batch(16)
    exact = machine.generative.exact_log_likelihood(v).detach()
    training = ReweightedWakeSleep(machine, lr=0.0, samples=20_000, natural=False)
    found = training.step(v)
    assert abs(found["log_likelihood"] - exact.mean()) < 0.01
    assert found["log_weight"] < exact.mean()
    assert 1 <= found["ess"] <= 20_000


def test_statistics_are_frozen_for_a_period():
    machine, v = make_machine(), make_batch()
    training = WakeSleep(machine, lr=0.1, samples=2, period=3, generator=seeded())

    def rows():
        return training.state_dict()["rows"]["recognition"]["1"]["curvature"]

    seen = []
    for _ in range(5):
        training.step(v)
        seen.append(rows())
    assert seen[0] is seen[1] is seen[2]
    assert seen[3] is not seen[2]
    assert seen[3] is seen[4]


def test_the_kl_of_a_step_is_what_it_changes_and_is_limited():
    v = make_batch(64)
    machine = make_machine()
    before = copy.deepcopy(machine)
    training = ReweightedWakeSleep(
        machine, lr=5.0, samples=20, damping=0.1, kl_max=1e-4, generator=seeded(3)
    )
    found = training.step(v)
    torch.testing.assert_close(
        found["kl_generative"], torch.tensor(1e-4, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert found["kl_recognition"] <= 1e-4 * (1 + 1e-9)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 9).double()
    layers = list(states.split([2, 3, 4], dim=1))
    with torch.no_grad():
        old, new = (m.generative.log_joint(layers) for m in (before, machine))
    kl = (old.exp() * (old - new)).sum()
    # The metric is that of 1,280 sampled rows, a few per cent off, and third order is left out.
    torch.testing.assert_close(kl, found["kl_generative"], rtol=0.15, atol=0)


def test_short_steps_are_not_limited():
    results = []
    for kl_max in (None, 1e3):
        machine = make_machine()
        ReweightedWakeSleep(machine, lr=0.1, kl_max=kl_max, generator=seeded()).step(make_batch())
        results.append(parameters(machine))
    assert torch.equal(*results)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("how", ["natural", "plain", "diagonal", "optimizer"])
def test_resume_is_bit_exact(algorithm, how, tmp_path):
    def build(seed):
        machine = make_machine(seed=seed)
        if how == "optimizer":
            adam = torch.optim.Adam(machine.parameters(), lr=0.01)
            options = {"natural": False, "optimizer": adam}
        else:
            options = {"lr": lambda step: 0.1 / (1 + step)}
            options |= {
                "natural": how != "plain",
                "blocks": "diagonal" if how == "diagonal" else "auto",
            }
        generator = seeded(seed)
        return machine, algorithm(machine, samples=3, period=4, generator=generator, **options)

    v = make_batch()
    machine, training = build(0)
    for _ in range(6):
        training.step(v)
    torch.save([machine.state_dict(), training.state_dict()], tmp_path / "state.pt")
    for _ in range(5):
        training.step(v)

    resumed, again = build(7)
    model_state, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(model_state)
    again.load_state_dict(state)
    for _ in range(5):
        again.step(v)
    assert torch.equal(parameters(resumed), parameters(machine))


def test_an_optimizer_gets_directions_as_gradients():
    v = make_batch()
    machine, other = make_machine(), make_machine()
    WakeSleep(machine, lr=0.3, generator=seeded()).step(v)
    sgd = torch.optim.SGD(other.parameters(), lr=0.3)
    found = WakeSleep(other, optimizer=sgd, generator=seeded()).step(v)
    torch.testing.assert_close(parameters(other), parameters(machine))
    assert "kl_generative" not in found


def test_fewer_rows_are_those_of_different_data():
    machine, v = make_machine(), make_batch(8)
    training = WakeSleep(machine, lr=0.1, samples=5, rows=8, generator=seeded())
    training.step(v)
    rows = training.state_dict()["rows"]["recognition"]["1"]["inputs"]
    assert torch.equal(rows[:, :-1], v)


def test_copies_of_the_data_are_rows_only_once():
    """The layer above the visible units sees each image in all its samples alike."""
    machine, v = make_machine(), make_batch(8)
    training = WakeSleep(machine, lr=0.1, samples=5, generator=seeded())
    training.step(v)
    rows = training.state_dict()["rows"]["recognition"]
    assert torch.equal(rows["1"]["inputs"][:, :-1], v)
    assert len(rows["0"]["inputs"]) == 40


def test_statistics_take_the_memory_that_was_forecast():
    machine = make_machine((4, 30, 6, 4))
    training = WakeSleep(machine, lr=0.1, samples=2, generator=seeded())
    training.step(make_batch(8))
    found = 0
    for frozen in training._frozen.values():
        for one in frozen.values():
            storages = [
                value.untyped_storage()
                for part in (one.rows, one.solver)
                for value in vars(part).values()
                if isinstance(value, torch.Tensor)
            ]
            found += sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    assert found == training.statistics_bytes(8)


@pytest.mark.parametrize(("leaves", "visible"), [("gaussian", 4), ("categorical", 4)])
def test_other_leaves_train(leaves, visible):
    machine = make_machine((2, visible), leaves=leaves)
    v = machine.generative.sample(400, seeded(9))[-1]
    start = make_machine((2, visible), seed=20, leaves=leaves)
    before = start.generative.exact_log_likelihood(v).mean().detach()
    training = ReweightedWakeSleep(start, lr=0.2, generator=seeded())
    for _ in range(30):
        training.step(v)
    assert start.generative.exact_log_likelihood(v).mean().detach() > before + 0.05


def test_natural_reweighted_wake_sleep_learns_lines_faster():
    """papers.md §5.4, item 5: at the same rate, half the divergence after 700 steps."""
    data = lines()
    kl = {}
    for natural in (False, True):
        generator = seeded()
        machine = HelmholtzMachine([1, 6, 9], generator=generator)
        training = ReweightedWakeSleep(
            machine, lr=0.3, natural=natural, damping=0.1, period=50, generator=generator
        )
        for _ in range(700):
            training.step(data.draw(32, generator=generator))
        kl[natural] = data.kl(machine.generative.exact_log_likelihood(data.states)).detach()
    assert kl[True] < kl[False] / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either lr or an optimizer"),
        ({"lr": 0.1, "samples": 0}, "at least 1"),
        ({"lr": 0.1, "samples": 1}, "at least 2"),
        ({"lr": 0.1, "rows": 0}, "at least 1"),
        ({"lr": 0.1, "damping": -1.0}, "damping must be >= 0"),
        ({"lr": 0.1, "blocks": "dense"}, "blocks is one of"),
        ({"lr": 0.1, "natural": False, "kl_max": 0.1}, "kl_max"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReweightedWakeSleep(make_machine(), **options)


def test_batches_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="shape \\(N, 4\\)"):
        WakeSleep(make_machine(), lr=0.1).step(torch.zeros(3, 5))


def test_states_of_another_kind_are_refused():
    machine = make_machine()
    adam = torch.optim.Adam(machine.parameters())
    state = WakeSleep(machine, optimizer=adam).state_dict()
    with pytest.raises(ValueError, match="same arguments"):
        WakeSleep(machine, lr=0.1).load_state_dict(state)
