"""Two analyses as `collect` returns them, and a browser to look at pages with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neuromanifold.report import render

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--enable-logging=stderr",
    "--window-size=1200,1600",
)
SECONDS_PER_PAGE = 120

NASTY = '<b>&"</script><script>alert(1)</script>'
"""A name that would break out of an attribute, a script or a text if it were not escaped."""

# layer: type, parameters, share of the trace, errors of Kronecker, UnitWise and Diagonal
CONV_NET = {
    "conv1": ("Conv2d", 80, 0.075, 0.488, 0.857, 0.964),
    "conv2": ("Conv2d", 1168, 0.053, 0.650, 0.842, 0.992),
    "head": ("Linear", 2570, 0.872, 0.298, 0.482, 0.992),
}
NASTY_MLP = {
    f"{NASTY}0": ("Linear", 2080, 0.325, 0.284, 0.883, 0.994),
    f"{NASTY}2": ("Linear", 330, 0.675, 0.387, 0.302, 0.972),
}


def analysis(name: str, layers: dict[str, tuple[Any, ...]], *, power: float) -> dict[str, Any]:
    """What `collect` would return for a network whose k-th eigenvalue is 8.8 / k^power."""
    num_parameters = sum(size for _, size, *_ in layers.values())
    eigenvalues = [8.8 * rank**-power for rank in range(1, 481)]
    trace = sum(eigenvalues)
    dampings = [8.8 * 10 ** (exponent / 4) for exponent in range(-32, 5)]
    return {
        "kind": "neuromanifold.analysis",
        "version": 1,
        "name": name,
        "model": {
            "class": "Sequential",
            "num_parameters": num_parameters,
            "num_trainable": num_parameters,
        },
        "likelihood": "Categorical(ignore_index=-100)",
        "estimator": "Exact()",
        "num_samples": 400,
        "num_rows": 3600,
        "dtype": "float32",
        "training": None,
        "stderr": {
            "trace": 0.05 * trace,
            "frobenius": 0.4,
            "largest_eigenvalue": 0.5,
            "max_learning_rate": 0.013,
            "stable_rank": 0.1,
            "participation_ratio": 0.2,
            "effective_dimension": 0.3,
            "whole_errors": {
                "Diagonal": 0.001,
                "UnitWise": 0.01,
                "Kronecker": 0.02,
                "BlockDiagonal": 0.01,
            },
        },
        "trace": trace,
        "frobenius": sum(value**2 for value in eigenvalues) ** 0.5,
        "largest_eigenvalue": eigenvalues[0],
        "max_learning_rate": 2 / eigenvalues[0],
        "stable_rank": trace / eigenvalues[0],
        "participation_ratio": trace**2 / sum(value**2 for value in eigenvalues),
        "layers": [
            {
                "name": layer,
                "type": kind,
                "rule": kind.lower(),
                "num_parameters": size,
                "trace": share * trace,
                "share": share,
                "trace_per_parameter": share * trace / size,
                "largest_eigenvalue": share * eigenvalues[0],
                "kronecker_error": kronecker,
                "unitwise_error": unitwise,
                "diagonal_error": diagonal,
                "kronecker_trace_ratio": 1.0,
                "kronecker_largest_ratio": 0.8,
                "stderr": {
                    "trace": 0.1 * share * trace,
                    "share": 0.011,
                    "trace_per_parameter": 0.1 * share * trace / size,
                    "largest_eigenvalue": 0.2 * share,
                    "kronecker_error": 0.015,
                    "unitwise_error": 0.006,
                    "diagonal_error": 0.0004,
                },
            }
            for layer, (kind, size, share, kronecker, unitwise, diagonal) in layers.items()
        ],
        "whole_errors": {
            "Diagonal": 0.993,
            "UnitWise": 0.621,
            "Kronecker": 0.515,
            "BlockDiagonal": 0.437,
        },
        "diagonal": [
            {
                "parameter": f"{layer}.weight",
                "layer": layer,
                "count": size,
                "mean": share * trace / size,
                "min": 0.0,
                "max": 10 * share * trace / size,
                "quantiles": {
                    "0.05": 0.0,
                    "0.25": 0.2 * share * trace / size,
                    "0.5": 0.5 * share * trace / size,
                    "0.75": share * trace / size,
                    "0.95": 4 * share * trace / size,
                },
                "zeros": size // 10,
                "median_relative_error": 0.21,
                "stderr": {
                    "mean": 0.02 * share * trace / size,
                    "quantiles": {
                        "0.05": 0.0,
                        "0.25": 0.01 * share * trace / size,
                        "0.5": 0.05 * share * trace / size,
                        "0.75": 0.1 * share * trace / size,
                        "0.95": 0.2 * share * trace / size,
                    },
                },
                "histogram": None,
            }
            for layer, (_, size, share, *_) in layers.items()
        ],
        "spectrum": {
            "method": "Gram",
            "count": len(eigenvalues),
            "total_dimension": num_parameters,
            "leading": eigenvalues[:20],
            "stderr": {"leading": [0.06 * value for value in eigenvalues[:20]]},
            "eigenvalues": eigenvalues,
            "zeros": num_parameters - len(eigenvalues),
        },
        "effective_dimension": [
            {
                "damping": d,
                "value": sum(value / (value + d) for value in eigenvalues),
                "stderr": 0.3,
            }
            for d in dampings
        ],
        "own_metrics": {
            "layers": own_metrics({layer: size for layer, (_, size, *_) in layers.items()}),
            "left_out": {},
        },
        "estimators": {
            "rows": [
                row
                for group, kind, of in (
                    ("all parameters", "model", 1.0),
                    *((layer, "layer", share) for layer, (_, _, share, *_) in layers.items()),
                )
                for row in estimator_rows(group, kind, of * trace)
            ],
            "advice": [
                {
                    "group": group,
                    "estimator": "RandomSigns(probes=1)",
                    "sweeps": 5,
                    "reason": "5 sweeps of RandomSigns(probes=1) add less than 10%.",
                }
                for group in ("all parameters", *layers)
            ],
        },
        "coverage": [
            {
                "parameter": f"{layer}.weight",
                "block": layer,
                "rule": kind.lower(),
                "structure": "Gram",
                "exact": True,
                "note": "",
            }
            for layer, (kind, *_) in layers.items()
        ],
        "timing": {
            "seconds": 4.2,
            "estimators": {
                "MonteCarlo(samples=1)": 1.3,
                "RandomSigns(probes=1)": 1.3,
                "Exact()": 6,
            },
        },
        "notes": [],
    }


def own_metrics(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """One for each layer, as `collect` takes them from `nm.relative.compare`; the last is exact."""
    *hidden, last = sizes
    numbers = {
        name: (0.02 * 8**depth, 0.91 + 0.04 * depth, 0.8 - 0.3 * depth)
        for depth, name in enumerate(hidden)
    }
    numbers[last] = (1.0, 1.0, 0.0)
    return [
        {
            "name": name,
            "units": 10,
            "dead": 0,
            "num_parameters": sizes[name],
            "factor": {"lower": 0.8 * factor, "median": factor, "upper": 1.3 * factor}
            if name != last
            else dict.fromkeys(("lower", "median", "upper"), 1.0),
            "cosine": {"lower": cosine - 0.02, "median": cosine, "upper": min(cosine + 0.02, 1.0)}
            if name != last
            else dict.fromkeys(("lower", "median", "upper"), 1.0),
            "variation": {"lower": variation, "median": variation, "upper": variation},
        }
        for name, (factor, cosine, variation) in numbers.items()
    ]


def estimator_rows(group: str, kind: str, trace: float) -> list[dict[str, Any]]:
    """One for each estimator, as `collect` takes them from `nm.variance.compare`."""
    return [
        {
            "group": group,
            "kind": kind,
            "estimator": estimator,
            "sweeps": sweeps,
            "trace": trace,
            "relative_error": error,
            "relative_error_of_draws": draws,
            "bound_of_draws": bound,
            "tightness": tightness,
        }
        for estimator, sweeps, error, draws, bound, tightness in (
            ("MonteCarlo(samples=1)", 1, 0.562, 0.51, 0.9, 3.1),
            ("RandomSigns(probes=1)", 1, 0.36, 0.26, None, None),
            ("Exact()", 10, 0.247, 0.0, None, None),
        )
    ]


CONV_ANALYSIS = {
    **analysis("conv net", CONV_NET, power=1.5),
    "training": {
        "optimizer": "Adam(lr=0.003)",
        "epochs": 20,
        "train_accuracy": 0.994,
        "test_accuracy": 0.972,
        "loss": [2.11 * 0.7**epoch + 0.03 for epoch in range(20)],
        "seconds": 3.1,
    },
}
NASTY_ANALYSIS = {
    **analysis(NASTY, NASTY_MLP, power=1.1),
    "notes": [f"{NASTY} was left out."],
}


@pytest.fixture
def conv_net() -> dict[str, Any]:
    """The analysis of a small trained network; a test may change it."""
    return deepcopy(CONV_ANALYSIS)


@pytest.fixture
def nasty_mlp() -> dict[str, Any]:
    """The analysis of an untrained network whose names need escaping; a test may change it."""
    return deepcopy(NASTY_ANALYSIS)


@pytest.fixture
def deep(conv_net: dict[str, Any]) -> dict[str, Any]:
    """A network of 60 layers; the one in the middle has the largest trace, the first the least."""
    layer, group = conv_net["layers"][0], conv_net["diagonal"][0]
    names = [f"encoder.layer.{depth}.attention.output.dense" for depth in range(60)]
    traces = [1.0 + min(depth, 59 - depth) for depth in range(60)]
    conv_net["layers"] = [
        layer | {"name": name, "trace": trace, "share": trace / sum(traces)}
        for name, trace in zip(names, traces, strict=True)
    ]
    conv_net["diagonal"] = [
        group | {"parameter": f"{name}.weight", "quantiles": dict.fromkeys(group["quantiles"], q)}
        for name, q in zip(names, traces, strict=True)
    ]
    return conv_net


@pytest.fixture(scope="session")
def page() -> str:
    """Both analyses as one page."""
    return render([CONV_ANALYSIS, NASTY_ANALYSIS], title=f"Two networks {NASTY}")


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page.

    Attributes:
        dom: the document after its scripts ran, without the scripts.
        attributes: of the root element.
        console: messages, also those of uncaught errors and of blocked requests.
        requests: addresses that the page asked the network for.
    """

    dom: str
    attributes: str
    console: list[str]
    requests: list[str]


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of a browser; without one the test is skipped, or fails where one is required."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    missing = f"No browser found, looked for {', '.join(BROWSERS)}."
    if os.environ.get("NEUROMANIFOLD_REQUIRE_BROWSER") == "1":
        pytest.fail(missing)
    # A developer's machine may have no browser; the check run sets the variable above.
    pytest.skip(missing)


@pytest.fixture(scope="session")
def visit(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Visit]]:
    """A function that opens HTML in the browser, on a light screen unless `dark`."""

    def open_page(html: str, *, dark: bool = False) -> Visit:
        folder = tmp_path_factory.mktemp("visit")
        file, log = folder / "page.html", folder / "network.json"
        file.write_text(html, encoding="utf-8")
        run = subprocess.run(
            [
                browser,
                *FLAGS,
                f"--user-data-dir={folder / 'profile'}",
                f"--log-net-log={log}",
                "--host-resolver-rules=MAP * ~NOTFOUND",  # the attempt is seen, nothing leaves
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=SECONDS_PER_PAGE,
            check=True,
        )
        shutil.rmtree(folder / "profile", ignore_errors=True)
        root = re.search(r"<html([^>]*)>", run.stdout)
        assert root, f"The browser showed no document: {run.stderr[-2000:]}"
        return Visit(
            dom=re.sub(r"<script\b.*?</script>", "", run.stdout, flags=re.DOTALL),
            attributes=root[1],
            console=[line for line in run.stderr.splitlines() if ":CONSOLE" in line],
            requests=sorted(outside_requests(log)),
        )

    return open_page


def outside_requests(log: Path) -> set[str]:
    """Addresses that a page asked for, without those that the browser asks for by itself."""
    events = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    return {
        params["url"]
        for params in events
        if params.get("initiator", "not an origin") != "not an origin"
        and re.match(r"(https?|wss?)://", params.get("url", ""))
    }
