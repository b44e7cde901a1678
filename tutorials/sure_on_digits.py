"""How sure are two estimators of the Fisher information, layer by layer, along training?

Retraces the figures of Soen and Sun (arXiv 2402.05379) on handwritten digits: a network of four
layers with sigmoid units. For the weights of each layer it draws

* the Fisher information, the mean over entries of the exact diagonal;
* the standard deviation of its estimate from one label per image, by squared scores (type 1) and by
  second derivatives (type 2), and the bound of the first.

The last layer has no curve of the second kind: outputs are linear in its weights, so that the
estimate is exact. Run it:

    python tutorials/sure_on_digits.py

It takes about a minute, prints a table, and writes sure_on_digits.html. Needs the extra `demo`.
"""

import altair as alt
import torch
from sklearn.datasets import load_digits
from torch import nn

import neuromanifold as nm

WIDTH, EPOCHS, MEASURED = 32, (0, 1, 2, 4, 8, 16), 100

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, WIDTH),
    nn.Sigmoid(),
    nn.Linear(WIDTH, WIDTH),
    nn.Sigmoid(),
    nn.Linear(WIDTH, WIDTH),
    nn.Sigmoid(),
    nn.Linear(WIDTH, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
likelihood = nm.Categorical()
layers = {f"{i}.weight": f"layer {1 + i // 2}" for i in (0, 2, 4, 6)}


def measure(epoch):
    """Mean over each layer's entries, of the value and of the errors that one label leaves."""
    some = x[:MEASURED]
    first = nm.variance.diagonal(model, likelihood, some, estimator=nm.MonteCarlo(1))
    second = nm.variance.second_derivative(model, likelihood, some, samples=1)
    bound = nm.variance.bound(model, likelihood, some)
    for name, layer in layers.items():
        for quantity, values in (
            ("information", first.value[name]),
            ("type 1", first.error("labels")[name]),
            ("type 1, bound", bound[name].sqrt()),
            ("type 2", second.error("labels")[name]),
        ):
            yield {
                "epoch": epoch,
                "layer": layer,
                "quantity": quantity,
                "value": float(values.mean()),
            }


rows = []
for epoch in range(max(EPOCHS) + 1):
    if epoch in EPOCHS:
        rows += measure(epoch)
    for batch in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        likelihood.loss(model(x[batch]), y[batch]).backward()
        optimizer.step()

print(f"{'epoch':>5} {'layer':8} {'information':>12} {'type 1':>10} {'bound':>10} {'type 2':>10}")
for epoch in EPOCHS:
    for layer in layers.values():
        found = {
            row["quantity"]: row["value"]
            for row in rows
            if row["epoch"] == epoch and row["layer"] == layer
        }
        numbers = " ".join(f"{found[q]:10.2e}" for q in ("type 1", "type 1, bound", "type 2"))
        print(f"{epoch:5} {layer:8} {found['information']:12.2e} {numbers}")

# What the theory says must hold, to the digits of float32.
for row in rows:
    if row["quantity"] == "type 2" and row["layer"] == "layer 4":
        assert row["value"] == 0
assert all(
    a["value"] <= b["value"] * (1 + 1e-5)
    for a, b in zip(
        (row for row in rows if row["quantity"] == "type 1"),
        (row for row in rows if row["quantity"] == "type 1, bound"),
        strict=True,
    )
)

axis = alt.Axis(format=".0e", tickCount=5, title="nats/parameter², mean over entries")
names = ["information", "type 1", "type 1, bound", "type 2"]
chart = (
    alt.Chart(alt.Data(values=[row for row in rows if row["value"] > 0]))
    .mark_line(point=True)
    .encode(
        x=alt.X("epoch:Q", axis=alt.Axis(grid=False)),
        y=alt.Y("value:Q", scale=alt.Scale(type="log"), axis=axis),
        color=alt.Color("quantity:N", title=None, sort=names),
        strokeDash=alt.StrokeDash(
            "quantity:N",
            legend=None,
            sort=names,
            scale=alt.Scale(domain=names, range=[[1, 0], [1, 0], [4, 4], [1, 0]]),
        ),
        facet=alt.Facet("layer:N", columns=2, title=None),
    )
    .properties(width=300, height=180, title="One label per image: information and its error")
    .resolve_scale(y="independent")
)
chart.save("sure_on_digits.html", inline=True)
print("Wrote sure_on_digits.html")
