"""What does the Fisher matrix of a convolutional net look like while it is trained?

Retraces Kaul and Lall's analysis of the parameter space without the matrix, on handwritten digits:

1. all eigenvalues from sample space, and the same numbers from products with random vectors;
2. Kronecker factors beside the matrix they stand for, before and after training;
3. the spectrum along training by AdamW, measured within a tenth of its time.

Run it:

    python tutorials/spectra.py

It takes less than 40 seconds on two cores, prints tables, and writes spectra.html. Needs the extra
`demo`.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import neuromanifold as nm

STEPS, DAMPING = 600, 1e-2

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
x, y = ((x - x.mean()) / x.std())[(order := torch.randperm(len(x)))], y[order]
some, likelihood = x[:64], nm.Categorical()

model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(),
    nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Tanh(),
    nn.Flatten(), nn.Linear(256, 10),
)  # fmt: skip

print("1. Without the matrix\n")
F = nm.spectral.operator(model, likelihood, some)
print(f"{F.num_parameters:,} parameters; {F.origin.notes[-1]}")
print(nm.spectral.summary(F, damping=DAMPING))

# The same numbers as if 640 gradients did not fit: F is only multiplied with random vectors.
generator = torch.Generator().manual_seed(0)
print("\nThe trace, from 48 products with random vectors:")
truth = float(F.trace())
for method in ("hutchinson", "hutch++", "xtrace"):
    found = nm.spectral.trace(F, method, probes=48, generator=generator)
    print(f"  {method:11} {float(found.value):.4f} ± {float(found.stderr):.4f}")
    assert abs(float(found.value) - truth) < 5 * float(found.stderr)
print(f"  {'exact':11} {truth:.4f}")
found = nm.spectral.logdet(F, damping=DAMPING, probes=16, steps=32, generator=generator)
exact = float(nm.spectral.logdet(F, damping=DAMPING).value)
print(f"log det(F + {DAMPING}): {float(found.value):.0f} ± {float(found.stderr):.0f}", end="; ")
print(f"exact {exact:.0f}")
assert abs(float(found.value) - exact) < 5 * float(found.stderr)

print("\n2. Kronecker factors beside the truth, before training\n")
before = nm.spectral.surrogate(model, likelihood, some, damping=DAMPING)
print(before)

print("\n3. Along training\n")
monitor = nm.spectral.Monitor(model, likelihood, x[:32], budget=0.1, damping=DAMPING)
monitor.measure()  # before the first step; the budget saves up for it afterwards
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
began = time.perf_counter()
for _ in range(STEPS):
    rows = torch.randint(1500, (128,))
    optimizer.zero_grad()
    functional.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()
    monitor.step()
elapsed, share = time.perf_counter() - began, monitor.share
monitor.measure()  # and after the last
with torch.no_grad():
    right = (model(x[1500:]).argmax(dim=1) == y[1500:]).float().mean()
print(f"{STEPS} steps in {elapsed:.1f} s, {float(right):.1%} of test digits right")
print(f"{len(monitor.history)} measurements; until the last step {share:.1%} of the time\n")
print(f"{'step':>5} {'trace':>9} {'largest':>9} {'dimension':>10} {'largest lr':>11}")
for measured in monitor.history:
    at = measured.values
    print(
        f"{measured.step:5} {at['trace']:9.3g} {at['largest_eigenvalue']:9.3g} "
        f"{at['effective_dimension']:10.1f} {at['learning_rate_bound']:11.3g}"
    )
assert right > 0.9

print("\nKronecker factors beside the truth, after training\n")
after = nm.spectral.surrogate(model, likelihood, some, damping=DAMPING)
print(after)
for name in ("0", "2"):
    old, new = (float(s.layers[name].off["largest_eigenvalue"].value) for s in (before, after))
    print(
        f"Convolution {name}: λmax of the factors {old:.2f} × that of its block, then {new:.2f} ×"
    )

nm.report.spectra_chart(monitor.history).save("spectra.html", inline=True)
print("\nWrote spectra.html")
