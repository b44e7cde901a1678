"""`python -m benchmarks.large`: a language model of 124 million parameters on this machine.

GPT-2 small with random weights, its head tied to its embedding of 50,257 tokens, on one or two
short sequences; time and peak memory of each structure in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import neuromanifold as nm
from benchmarks.harness import crowded, environment, write_results

STRUCTURES = {"Diagonal": nm.Diagonal(), "Kronecker": nm.Kronecker()}
SEQUENCES, LENGTH = 2, 64
LIMIT = 12 * 2**30


def measure(structure: str) -> dict[str, Any]:
    """Seconds, peak resident bytes of the whole process, and what represents the parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel  # an extra, imported where it is needed

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=128)).eval()
    tokens = torch.randint(50257, (SEQUENCES, LENGTH))
    likelihood = nm.Categorical()
    start = time.perf_counter()
    likelihood.loss(model(tokens).logits, tokens).backward()
    unit = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    before = peak()
    start = time.perf_counter()
    F = nm.fisher(model, likelihood, tokens, STRUCTURES[structure])
    seconds = time.perf_counter() - start
    kinds = Counter((entry.rule, entry.structure, entry.note) for entry in F.coverage)
    return {
        "structure": structure,
        "parameters": F.num_parameters,
        "seconds": seconds,
        "unit_seconds": unit,
        "peak_bytes": peak(),
        "peak_bytes_of_model_and_backward": before,
        "trace": float(F.trace()),
        "coverage": [{"entries": count, "is": kind} for kind, count in kinds.items()],
    }


def peak() -> int:
    """Of resident memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Each structure in a fresh process; a table, and JSON."""
    trusted = not crowded()
    found = []
    for structure in STRUCTURES:
        command = [sys.executable, "-m", "benchmarks.large", structure]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(answer.stdout))
    title = f"GPT-2 small, {SEQUENCES} sequences of {LENGTH}; {torch.get_num_threads()} threads"
    table = Table(
        "structure", "seconds", "forward + backward", "peak GiB", "of which before", title=title
    )
    for row in found:
        table.add_row(
            row["structure"],
            f"{row['seconds']:.1f}",
            f"{row['unit_seconds']:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['peak_bytes_of_model_and_backward'] / 2**30:.2f}",
        )
        assert row["peak_bytes"] < LIMIT
    Console(width=100).print(table)
    for kind in found[-1]["coverage"]:
        Console(width=100).print(kind["entries"], "parameters:", *kind["is"])
    write_results("large", {"environment": environment(), "trusted": trusted, "rows": found})


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.stdout.write(json.dumps(measure(sys.argv[1])))
    else:
        main()
