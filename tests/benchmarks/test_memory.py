"""Peak memory is measured in processes of their own, whatever happens in them."""

import pytest
import torch
from benchmarks.harness import peak_memory
from benchmarks.memory import guesses, measure
from benchmarks.peers import Peer
from benchmarks.progress import Progress
from benchmarks.suite import OURS
from rich.console import Console

CPU = torch.device("cpu")


def test_the_peak_is_what_is_alive_together():
    megabytes = 64

    def task():
        for _ in range(2):
            torch.ones(megabytes * 2**18)

    found = peak_memory(task, CPU)
    assert found == pytest.approx(megabytes * 2**20, rel=0.1)


def test_peaks_of_everyone_and_the_error_of_who_fails(monkeypatch):
    monkeypatch.setattr("benchmarks.memory.QUANTITIES", ("diagonal",))
    nobody = Peer("nobody", "torch", {("W1", "diagonal"): None})
    (found,) = measure("W1", [nobody], CPU, Progress({}, Console(quiet=True)))
    parameters = 4 * (785 * 512 + 513 * 512 + 513 * 10)
    assert found["unit_bytes"] > parameters  # gradients
    ours = found["answers"][OURS]
    assert ours["problem"] == ""
    assert parameters < ours["bytes"] < 20 * parameters
    assert found["answers"]["nobody"]["problem"].startswith("StopIteration")
    assert guesses("W1", [nobody]).keys() == {
        f"W1: memory of {what}"
        for what in (f"forward + backward: {OURS}", f"diagonal: {OURS}", "diagonal: nobody")
    }
