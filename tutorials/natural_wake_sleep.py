"""How does a deep Bayesian network learn by natural gradients?

Trains Helmholtz machines by reweighted wake-sleep on 3 × 3 lines, where all can be checked by
enumeration, and on binarised digits with five hidden layers. Plain gradients, at good learning
rates for these networks, against natural ones (Várady, Volpi, Malagò and Ay, Neural Networks 155,
2022), which are exact, unit by unit:

1. the log-likelihood, by update and by second, with error bars;
2. samples and reconstructions;
3. on the lines, what the local natural gradient gains next to that of the visible units.

Run it:

    python tutorials/natural_wake_sleep.py

It takes less than a minute on one core, prints tables, and writes natural_wake_sleep.html. Needs
the extras `report` and `demo`.
"""

from pathlib import Path

import torch

from neuromanifold import belief
from neuromanifold.report import render_belief, study_belief


def trainings(sizes, coding, steps, plain, natural, adam):
    """The same machine three times, from the same weights; rates fall over the second half."""

    def falling(lr):
        return lambda step: lr * min(1.0, 2 * (1 - step / steps))

    def machine():
        weights = torch.Generator().manual_seed(0)
        return belief.HelmholtzMachine(sizes, coding=coding, generator=weights)

    def samples():
        return torch.Generator().manual_seed(1)

    other = machine()
    optimizer = torch.optim.Adam(other.parameters(), lr=adam)
    return {
        "natural": belief.ReweightedWakeSleep(
            machine(), lr=falling(natural), damping=0.1, period=10, generator=samples()
        ),
        "plain": belief.ReweightedWakeSleep(
            machine(), lr=falling(plain), natural=False, generator=samples()
        ),
        "plain with Adam": belief.ReweightedWakeSleep(
            other, natural=False, optimizer=optimizer, generator=samples()
        ),
    }


def show(study):
    """Log-likelihoods on the way, in nats per image."""
    names = [run["name"] for run in study["runs"]]
    print(f"{'update':>6}" + "".join(f"{name:>20}" for name in names))
    for points in zip(*(run["curve"] for run in study["runs"]), strict=True):
        values = (f"{point['value']:.2f} ± {point['stderr']:.2f}" for point in points)
        print(f"{points[0]['step']:6}" + "".join(f"{value:>20}" for value in values))
    seconds = (f"{run['seconds']:.1f} s" for run in study["runs"])
    print(f"{'':6}" + "".join(f"{value:>20}" for value in seconds))


print("1. 3 × 3 lines, 1-6-9\n")
data, steps = belief.lines(), 700
machines = trainings([1, 6, 9], (0, 1), steps, plain=4.0, natural=1.0, adam=0.1)
on_lines = study_belief(machines, data, name="3 × 3 lines", steps=steps, geometries=True)
show(on_lines)
print(f"{'best':>6}{on_lines['best']:20.2f}, minus the entropy of the data")

# What importance samples say, and what enumeration does.
for name, training in machines.items():
    with torch.no_grad():
        exact = data.kl(training.machine.generative.exact_log_likelihood(data.states))
    run = next(run for run in on_lines["runs"] if run["name"] == name)
    end = run["curve"][-1]
    print(
        f"{name}: KL divergence {float(exact):.3f}, {on_lines['best'] - end['value']:.3f} sampled"
    )
    assert abs(on_lines["best"] - end["value"] - float(exact)) < 5 * end["stderr"] + 0.01

print("\n2. Binarised digits, 10-16-24-32-48-64\n")
digits = belief.binarised_digits(coding=(-1, 1), generator=torch.Generator().manual_seed(0))
sizes, steps = [10, 16, 24, 32, 48, 64], 400
on_digits = study_belief(
    trainings(sizes, (-1, 1), steps, plain=1.0, natural=0.2, adam=0.03),
    digits.train,
    digits.test,
    name="Binarised digits",
    steps=steps,
    evaluations=10,
    samples=300,
)
show(on_digits)
for run in on_digits["runs"]:
    assert run["curve"][-1]["value"] > run["curve"][0]["value"] + 10
    print(f"{run['name']}: a pixel comes back right with probability {run['right']:.3f}")

print("\n3. The steepest direction, and the local one\n")
print(f"{'update':>6} {'visible':>9} {'all units':>10} {'cosine':>7}   gain per unit of step")
for point in on_lines["geometry"]:
    print(
        f"{point['step']:6} {point['visible_rate']:9.3f} {point['full_rate']:10.3f} "
        f"{point['cosine']:7.3f}"
    )
    assert point["full_rate"] <= point["visible_rate"] * (1 + 1e-6)

page = render_belief([on_lines, on_digits], title="Natural wake-sleep")
Path("natural_wake_sleep.html").write_text(page, encoding="utf-8")
print("\nWrote natural_wake_sleep.html")
