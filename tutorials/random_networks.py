"""What does theory know about the Fisher matrix of a network before its weights are drawn?

Retraces Amari, Karakida and Oizumi (arXiv 1808.07172) and Karakida, Akaho and Amari (1806.01316) on
random tanh networks, from width 25 to 1,600:

1. mean and largest eigenvalue from the variances of weights and biases alone, and as measured;
2. how large the Fisher matrix is between units, next to each unit's own block: it falls like one
   over the root of the width where the number of outputs grows with it, and not where there is one;
3. the Fisher matrix of one unit, its inverse and its natural gradient, without any matrix.

Run it:

    python tutorials/random_networks.py

It takes less than a minute on two cores, prints tables, and writes random_networks.html. Needs the
extra `report`.
"""

import time
from itertools import pairwise
from statistics import fmean, stdev

import altair as alt
import torch
from torch import nn

import neuromanifold as nm

WEIGHT_VARIANCE, BIAS_VARIANCE = 1.0, 0.01
WIDTHS, SEEDS, SAMPLES = (25, 50, 100, 200, 400, 800, 1600), 5, 10


def network(widths, seed):
    """Normal weights of variance 1 / fan-in; tanh behind all layers but the last."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for fan_in, fan_out in pairwise(widths):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.normal_(std=(WEIGHT_VARIANCE / fan_in) ** 0.5, generator=generator)
            layer.bias.normal_(std=BIAS_VARIANCE**0.5, generator=generator)
        modules += [layer, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def timed(function, *args):
    """What it returns, and the seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - began)
    return result, min(seconds)


print("1. The spectrum: theory against measurement\n")
print(f"Three layers, 2 outputs, {SAMPLES} random inputs; mean and scatter over {SEEDS} networks")
print(f"{'width':>6} {'mean':>20} {'theory':>9} {'largest':>18} {'theory':>8} {'seconds':>8}")
spectra = []
for width in WIDTHS:
    widths = [width, width, width, 2]
    theory = nm.meanfield.spectrum_statistics(
        nm.meanfield.propagate(
            "tanh", weight_variance=WEIGHT_VARIANCE, bias_variance=BIAS_VARIANCE, widths=widths
        ),
        samples=SAMPLES,
    )
    began, means, largest = time.perf_counter(), [], []
    for seed in range(SEEDS):
        x = torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(100 + seed))
        # 20 gradients, of 10 samples and 2 outputs: their 20 × 20 products have the spectrum of
        # the Fisher matrix, which would have 5 million rows at the end.
        F = nm.fisher(network(widths, seed), nm.Gaussian(), x, nm.Gram(), estimator=nm.Exact())
        means.append(float(F.trace()) / F.num_parameters)
        largest.append(float(F.eigenvalues(1)[0]))
    print(
        f"{width:6} {fmean(means):10.2e} ± {stdev(means):7.1e} {theory.mean:9.2e} "
        f"{fmean(largest):9.1f} ± {stdev(largest):6.1f} {theory.largest:8.1f} "
        f"{time.perf_counter() - began:8.1f}"
    )
    for quantity, values, predicted in (
        ("mean eigenvalue", means, theory.mean),
        ("largest eigenvalue", largest, theory.largest),
    ):
        spectra += [
            {"width": width, "quantity": quantity, "value": value, "theory": predicted}
            for value in values
        ]
        if width >= 800:  # theory is that of infinite width
            assert abs(predicted / fmean(values) - 1) < 0.1

print("\nThe largest grows with the width, so the learning rate has to shrink: 2/λmax.")

print("\n2. Between units: is the matrix block diagonal?\n")
print(
    f"{'width':>6} {'outputs':>8} {'same layer':>11} {'· √width':>9} {'λmax, of largest unit':>22}"
)
ratios = []
for many in (True, False):
    for width in (25, 50, 100):
        outputs = width if many else 1
        found = [
            nm.meanfield.off_block(
                network([width, width, width, outputs], seed),
                torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(100 + seed)),
            )
            for seed in range(2)
        ]
        ratio = fmean(each.same_layer for each in found)
        effect = fmean(each.spectral_effect for each in found)
        print(f"{width:6} {outputs:8} {ratio:11.3f} {ratio * width**0.5:9.2f} {effect:20.1f} ×")
        ratios.append(
            {"width": width, "outputs": "as many as units" if many else "one", "ratio": ratio}
        )

# Four times the width: half as much between units with many outputs, and no such law with one.
many, one = ([row["ratio"] for row in ratios[first : first + 3]] for first in (0, 3))
assert 1.6 < many[0] / many[-1] < 2.5
assert one[0] / one[-1] < 1.4
print("\nSmall entries are no small effect: the largest eigenvalue lives between the units.")

print("\n3. One unit: an explicit natural gradient\n")
print(f"{'inputs':>7} {'explicit, µs':>13} {'dense solve, µs':>16} {'difference':>11}")
for n in (100, 400, 1600):
    generator = torch.Generator().manual_seed(0)
    w, gradient = torch.randn(2, n, generator=generator, dtype=torch.float64) / n**0.5
    bias, of_bias = torch.tensor([0.1, 0.3], dtype=torch.float64)
    G = nm.meanfield.unit_fisher("tanh", w, bias)  # inputs of N(0, 1)
    (step_w, step_b), explicit = timed(G.solve, gradient, of_bias)
    both = torch.cat([gradient, of_bias[None]])
    dense, solving = timed(torch.linalg.solve, G.dense(), both)
    error = float((torch.cat([step_w, step_b[None]]) - dense).norm() / dense.norm())
    assert error < 1e-10
    print(f"{n:7} {1e6 * explicit:13.0f} {1e6 * solving:16.0f} {error:11.1e}")

axis = {"scale": alt.Scale(type="log", nice=False), "axis": alt.Axis(grid=False, values=WIDTHS)}
x = alt.X("width:Q", title="width", **axis)
base = alt.Chart(alt.Data(values=spectra)).encode(x=x, color=alt.Color("quantity:N", title=None))
left = alt.layer(
    base.mark_line().encode(y=alt.Y("theory:Q", scale=alt.Scale(type="log"))),
    base.mark_circle(size=36).encode(
        y=alt.Y(
            "value:Q",
            title="nats per parameter²",
            scale=alt.Scale(type="log"),
            axis=alt.Axis(tickCount=5, format="~g"),
        )
    ),
).properties(width=330, height=260, title="Lines: theory. Points: one network each")
right = (
    alt.Chart(alt.Data(values=ratios))
    .mark_line(point=True)
    .encode(
        x=x,
        y=alt.Y(
            "ratio:Q",
            title="between units / own block",
            scale=alt.Scale(type="log"),
            axis=alt.Axis(values=[0.05, 0.1, 0.2, 0.5, 1], format="~g"),
        ),
        color=alt.Color("outputs:N", title="outputs"),
    )
    .properties(width=330, height=260, title="Is the matrix block diagonal?")
)
chart = alt.hconcat(left, right).resolve_scale(color="independent")
chart.save("random_networks.html", inline=True)
print("\nWrote random_networks.html")
