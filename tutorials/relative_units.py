"""What is the metric of a component by itself, and what does a network gain by following it?

Retraces Sun and Nielsen (arXiv 1606.06069) on handwritten digits:

1. metrics of single components in closed form: tanh, sigmoid and relu units, a linear layer, a
   softmax layer, a batch norm; what the choice of their response does; and the components of a
   network, one by one and seen from above;
2. what such a metric leaves out of the network's own Fisher matrix, and what it does not depend on;
3. relative natural gradient (RNGD) against SGD and Adam on nets 64-80-80-80-10 with relu units,
   with and without batch norm, which comes after the activation functions as in the paper.

Run it:

    python tutorials/relative_units.py

It takes half a minute, prints tables, and writes relative_units.html. Needs the extra `demo`.
"""

import time

import altair as alt
import torch
from sklearn.datasets import load_digits
from torch import nn

import neuromanifold as nm
from neuromanifold.relative import Binary, layers, units

EPOCHS, BATCH = 8, 50
torch.set_num_threads(1)  # nets as small as these are slower with more

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
likelihood = nm.Categorical()
torch.manual_seed(0)

print("1. What a component's metric says\n")

# The metric of a unit's incoming weights is ν(a) x̃ x̃ᵀ, with a its pre-activation and x̃ = (x, 1)
# its input: the weights are well determined where ν is large, and not at all where it is zero.
a = torch.linspace(-4, 4, 9)
of_units = {
    "tanh, a sign": units.tanh(a),
    "tanh, Gaussian": units.gaussian(torch.tanh, a),
    "sigmoid, a bit": units.sigmoid(a),
    "sigmoid, Gaussian": units.gaussian(torch.sigmoid, a),
    "relu": units.relu(a),
    "softplus": units.smooth_relu(a),
    "elu": units.elu(a),
}
print("ν at a =".ljust(18) + "".join(f"{value:8.0f}" for value in a))
for name, nu in of_units.items():
    print(name.ljust(18) + "".join(f"{value:8.4f}" for value in nu))

# One unit, two metrics: a tanh that hands on the mean of a sign has sech², one with Gaussian noise
# sech⁴. Which one it is, is a choice; the library asks for it.
torch.testing.assert_close(of_units["tanh, a sign"], 1 / a.cosh() ** 2)
torch.testing.assert_close(of_units["tanh, Gaussian"], 1 / a.cosh() ** 4)

# The same without closed forms, for any module: give what it is given, and say what it answers.
unit = nn.Sequential(nn.Linear(64, 1), nn.Tanh())
pre = unit[0](x)
for response, nu in (
    (Binary((-1, 1)), units.tanh(pre)),
    (nm.Gaussian(), units.gaussian(torch.tanh, pre)),
):
    F = nm.relative.fisher(unit, x, response)
    torch.testing.assert_close(F.blocks[0].matrices, layers.nonlinear(x, nu).units())
    print(f"\nA tanh unit on digits, {response}: trace {F.trace():.3f} nats/parameter²", end="")

# Layers. Linear outputs know nothing of each other; class probabilities do, for they sum to one,
# and a change of all logits together changes nothing.
inputs, logits = torch.ones(1, 1), torch.tensor([[0.0, 0.0, 4.0]])
by_softmax = layers.softmax(inputs, logits, bias=False).dense()
print("\n\nLinear layer of three outputs, on one input of 1:")
print(layers.linear(inputs, 3, bias=False).dense().numpy())
print("Softmax of logits 0, 0, 4, diag(η) − η ηᵀ, whose rows sum to zero:")
print(by_softmax.numpy().round(4))
assert by_softmax.sum(1).abs().max() < 1e-6

# A batch norm makes its own scale and shift as good as independent, each with information 1,
# whatever the scale of what it is given; and it takes the bias of the layer before it away.
linear, norm = nn.Linear(64, 3), nn.BatchNorm1d(3)
print("Scale and shift of the first unit of a batch norm, behind a linear layer:")
print(layers.batch_norm(100 * linear(x), norm).units()[0].numpy().round(4) + 0.0)
below = layers.linear_batch_norm(x, linear(x), norm)
bias = torch.zeros(3, 65)
bias[:, -1] = 1
assert below.matmul(bias).abs().max() < 1e-4 * below.diagonal().max()

# The components of a network, from the bottom up: each by itself (`depth=0`), with one component
# above it, and with all of them; the last is the network's Fisher matrix, block by block.
net = nn.Sequential(
    nn.Sequential(nn.Linear(64, 20), nn.Tanh()),
    nn.Sequential(nn.Linear(20, 20), nn.Tanh()),
    nn.Linear(20, 10),
)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for batch in torch.randperm(len(x)).repeat(4).split(64):
    optimizer.zero_grad()
    likelihood.loss(net(x[batch]), y[batch]).backward()
    optimizer.step()
some = x[:300]
exact = nm.fisher(net, likelihood, some, nm.UnitWise(), estimator=nm.Exact())
seen = {depth: nm.relative.chain(net, some, likelihood, depth=depth) for depth in (0, 1, None)}
print("\nTraces of the components of a network, nats/parameter²:")
print("component      by itself  from the next   from the top    exact block")
for i, name in enumerate(("0.0", "1.0", "2")):
    traces = [float(links[i].fisher.trace()) for links in seen.values()]
    of_block = float(exact.block(name).trace())
    print(f"{i:<9}" + "".join(f"{trace:15.4f}" for trace in (*traces, of_block)))
    assert abs(traces[2] - of_block) < 1e-4 * of_block

# The last component's own metric is its block of the network's matrix: nothing is above it.
top = nm.relative.of(net, "2", some, likelihood)  # gets its inputs from a run of the network
torch.testing.assert_close(top.blocks[0].matrices, exact.blocks[2].matrices)

print("\n2. What a unit's own metric leaves out: how much the network cares for its response\n")

comparison = nm.relative.compare(net, likelihood, some)
print(comparison)
assert comparison["2"].cosine.min() > 0.999  # the output layer leaves nothing out
assert comparison["0.0"].cosine.max() < 1

# What it does not depend on: what is around the component, the coordinates of its inputs, the unit
# and the order of its outputs. The network's own block depends on all of its surroundings.
component = nn.Sequential(nn.Linear(64, 5), nn.Tanh()).double()
invariance = nm.relative.check_invariance(component, x[:50].double(), nm.Gaussian())
print(f"\n{invariance}")
assert invariance.passed
assert invariance.full_blocks_apart > 0.01

print("\n3. Following it: RNGD against SGD and Adam\n")


def perceptron(*, normalised):
    """Three hidden layers of 80 relu units."""
    torch.manual_seed(0)
    parts = []
    for fan_in in (64, 80, 80):
        parts += [nn.Linear(fan_in, 80), nn.ReLU()]
        if normalised:
            parts.append(nn.BatchNorm1d(80))
    return nn.Sequential(*parts, nn.Linear(80, 10))


def loss_of(model):
    """On all digits, in nats."""
    model.eval()
    with torch.no_grad():
        loss = float(likelihood.loss(model(x), y))
    model.train()
    return loss


def train(model, optimizer):
    """Loss on all digits before the first and after each epoch, and the seconds of training."""
    losses, seconds = [loss_of(model)], 0.0
    generator = torch.Generator().manual_seed(1)
    num_steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, total_iters=num_steps)
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            likelihood.loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - start
        losses.append(loss_of(model))
    return losses, seconds


def reached(losses, goal):
    """The first epoch after which a loss is there."""
    return next((epoch for epoch, loss in enumerate(losses) if loss <= goal), None)


# Each gets the best of three learning rates, falling to zero.
optimizers = {
    "SGD": (
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9),
        (0.03, 0.1, 0.2),
    ),
    "Adam": (lambda model, lr: torch.optim.Adam(model.parameters(), lr), (0.003, 0.01, 0.02)),
    "RNGD": (
        lambda model, lr: nm.optim.relative(model, likelihood, lr=lr, weight_decay=0.0),
        (0.02, 0.05, 0.1),
    ),
}
rows = []
for normalised in (False, True):
    title = "with batch norm" if normalised else "without batch norm"
    best = {}
    for name, (make, rates) in optimizers.items():
        runs = []
        for lr in rates:
            model = perceptron(normalised=normalised)
            runs.append((*train(model, make(model, lr)), lr))
        best[name] = min(runs, key=lambda run: run[0][-1])
    goal = best["SGD"][0][-1]
    print(f"Training loss in nats, 64-80-80-80-10 {title}:")
    print("epoch " + "".join(f"{name:>10}" for name in best))
    for epoch in range(EPOCHS + 1):
        print(f"{epoch:5} " + "".join(f"{losses[epoch]:10.4f}" for losses, _, _ in best.values()))
    print("rate  " + "".join(f"{lr:10}" for _, _, lr in best.values()))
    print("s     " + "".join(f"{seconds:10.2f}" for _, seconds, _ in best.values()))
    epochs = {name: reached(losses, goal) for name, (losses, _, _) in best.items()}
    print(f"Epochs to where SGD ends: {epochs}\n")
    assert epochs["RNGD"] is not None
    assert epochs["RNGD"] < epochs["SGD"]
    rows += [
        {"net": title, "optimizer": name, "epoch": epoch, "loss": loss}
        for name, (losses, _, _) in best.items()
        for epoch, loss in enumerate(losses)
    ]
print("A step of RNGD takes several times as long as one of SGD in nets as small as these: compare")
print("epochs times seconds before you choose.")

fine = torch.linspace(-4, 4, 161)
shapes = {
    "tanh, a sign": units.tanh(fine),
    "tanh, Gaussian": units.gaussian(torch.tanh, fine),
    "sigmoid, a bit": units.sigmoid(fine),
    "relu": units.relu(fine),
    "softplus": units.smooth_relu(fine),
}
nu = [
    {"a": at, "unit": name, "nu": value}
    for name, values in shapes.items()
    for at, value in zip(fine.tolist(), values.tolist(), strict=True)
]
of_unit = (
    alt.Chart(alt.Data(values=nu))
    .mark_line()
    .encode(
        x=alt.X("a:Q", title="pre-activation", axis=alt.Axis(grid=False)),
        y=alt.Y("nu:Q", title="ν"),
        color=alt.Color("unit:N", title="unit, its response", sort=list(shapes)),
    )
    .properties(width=300, height=180, title="What a unit's metric says of its incoming weights")
)
race = (
    alt.Chart(alt.Data(values=rows))
    .mark_line(point=True)
    .encode(
        x=alt.X("epoch:Q", axis=alt.Axis(grid=False)),
        y=alt.Y("loss:Q", scale=alt.Scale(type="log"), title="training loss, nats"),
        color=alt.Color("optimizer:N", title=None, sort=list(optimizers)),
        column=alt.Column("net:N", title=None, sort=["without batch norm", "with batch norm"]),
    )
    .properties(width=300, height=180, title="Nets 64-80-80-80-10 on digits")
)
chart = alt.vconcat(of_unit, race).resolve_scale(color="independent")
chart.save("relative_units.html", inline=True)
print("Wrote relative_units.html")
