"""The speed suite: answers are checked, failures are shown, and times are judged fairly."""

import io
import json
import math
import time
from functools import partial

import pytest
import torch
from benchmarks.costs import small
from benchmarks.floors import counts, gram, kept_product, kronecker, operations
from benchmarks.harness import interleave
from benchmarks.page import write_page
from benchmarks.peers import Peer
from benchmarks.progress import Progress
from benchmarks.quantities import QUANTITIES, Drawn, check, check_drawn
from benchmarks.reference import reference
from benchmarks.rows import CALLS, LIKELIHOOD, ROWS, Row, diagonal
from benchmarks.slopes import QUANTITIES as GROWING
from benchmarks.slopes import Axis, perceptron, slope
from benchmarks.slopes import measure as measure_slopes
from benchmarks.suite import OURS, Mode, measure
from benchmarks.tables import memory as table_of_memory
from benchmarks.tables import problems as tables_of_problems
from benchmarks.tables import rows as table_of_rows
from benchmarks.tables import slopes as table_of_slopes
from benchmarks.verdicts import peaks, standing
from benchmarks.workloads import WORKLOADS, Workload
from rich.console import Console
from torch import nn

CPU = torch.device("cpu")
SMALL = small()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(batch, seed=0):
    outputs = batch.model(batch.inputs).detach()
    return LIKELIHOOD.sample(outputs, 1, generator=seeded(seed))[0]


def settled(answer):
    return answer() if callable(answer) else answer


def scaled(answer, factor):
    """Off by a factor in all that has a scale; factors of a Kronecker product get another shape."""
    if isinstance(answer, dict):
        return {name: scaled(value, factor) for name, value in answer.items()}
    if isinstance(answer, tuple):
        return tuple(x + x.trace() * (factor - 1) * torch.eye(len(x)) for x in answer)
    return factor * answer


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.workload} {row.quantity}")
def test_ours_is_right_and_what_is_off_is_not(row):
    batch, quantity = SMALL[row.workload], QUANTITIES[row.quantity]
    right = reference(batch, drawn(batch))
    answer, expected = settled(row.prepare(batch, seeded())()), quantity.expected(right)
    check(quantity, answer, expected, right)
    with pytest.raises(AssertionError, match="off by"):
        check(quantity, scaled(answer, 1.1), expected, right)


def test_every_quantity_has_a_row_and_says_how_it_is_asked_for():
    assert {row.quantity for row in ROWS} == set(QUANTITIES) == set(CALLS)


def test_labels_of_ones_own_are_judged_by_totals():
    batch, quantity = SMALL["W1"], QUANTITIES["diagonal"]
    others = [reference(batch, drawn(batch, seed)) for seed in range(1, 9)]
    answer = reference(batch, drawn(batch)).diagonal()
    check_drawn(quantity, Drawn(lambda: answer), others)
    with pytest.raises(AssertionError, match="standard errors apart"):
        check_drawn(quantity, Drawn(scaled(answer, 10.0)), others)
    with pytest.raises(AssertionError, match="no check is known"):
        check_drawn(QUANTITIES["mean-field"], Drawn(answer), others)


# ---- a run of the suite ----------------------------------------------------------------------


def from_reference(factor):
    """A peer that takes its answer from the reference, off by a factor."""

    def prepare(batch, labels):
        right = reference(batch, labels)
        return lambda: {name: (factor * d).float() for name, d in right.diagonal().items()}

    return prepare


def missing(batch, labels):
    raise ModuleNotFoundError("No module named 'missing'")


def failing_later(batch, labels):
    task, calls = from_reference(1.0)(batch, labels), []

    def call():
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("no more")
        return task()

    return call


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKLOADS, "tiny", Workload("tiny", lambda: small()["W1"]))
        yield


@pytest.fixture(scope="module")
def results(tiny):
    row = Row("tiny", "diagonal", diagonal, target=1e9)
    peers = [
        Peer(name, "torch", {("tiny", "diagonal"): prepare})
        for name, prepare in (
            ("right", from_reference(1.0)),
            ("twice", from_reference(2.0)),
            ("missing", missing),
            ("later", failing_later),
        )
    ]
    mode = Mode(rounds=3, seconds=10.0, step_rounds=3)
    return measure("tiny", [row], peers, mode, CPU, Progress({}, Console(quiet=True)))


def test_everyone_who_is_right_is_timed(results):
    answers = results[0]["answers"]
    assert list(answers) == [OURS, "right", "twice", "missing", "later"]
    for who in (OURS, "right"):
        assert answers[who]["problem"] == ""
        low, median, high = answers[who]["quartiles"]
        assert 0 < low <= median <= high


def test_a_wrong_answer_and_a_failure_are_said_and_not_judged(results):
    answers = results[0]["answers"]
    assert answers["twice"]["problem"].startswith("wrong: 0.weight: off by 1.0e+00")
    assert answers["missing"]["problem"] == "ModuleNotFoundError: No module named 'missing'"
    assert answers["later"] == {"problem": "MemoryError: no more"}
    found = standing(results[0])
    assert list(found.peers) == ["right"]
    assert set(found.problems) == {"twice", "missing", "later"}


def test_a_slow_task_has_fewer_rounds_and_a_very_slow_one_a_single_call(tiny):
    mode = Mode(rounds=9, seconds=1.0, step_rounds=3)
    assert [mode.rounds_of(s) for s in (0.001, 0.2, 5.0)] == [9, 5, 3]
    calls = []

    def prepare(batch, generator):
        return lambda: calls.append(time.sleep(0.01))

    progress = Progress({}, Console(quiet=True))
    row = Row("tiny", "diagonal", prepare)
    (found,) = measure("tiny", [row], [], Mode(9, 0.005, 3), CPU, progress)
    assert len(calls) == 1 + 1  # operations are counted in one more
    answer = found["answers"][OURS]
    assert answer["problem"].startswith("not checked: ")
    assert len(answer["seconds"]) == 1
    low, median, high = answer["quartiles"]
    assert 0 < low == median == high


def test_tasks_with_fewer_rounds_take_part_in_the_first():
    calls = []
    tasks = {name: partial(calls.append, name) for name in ("few", "many")}
    seconds = interleave(tasks, {"few": 1, "many": 2}, warm_up=1)
    assert {name: len(times) for name, times in seconds.items()} == {"few": 1, "many": 2}
    assert sorted(calls[:4]) == ["few"] * 2 + ["many"] * 2
    assert calls[4:] == ["many"]


def test_progress_says_what_took_how_long_and_what_is_left():
    console = Console(file=io.StringIO(), width=80)
    progress = Progress({"one": 60.0, "two": 60.0}, console)
    progress.start("one")
    progress.start("two", 5.0)
    progress.finish()
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("00:00  one: 0.0 s; about 00:")
    assert second.startswith("00:00  two: 0.0 s; about 00:00 left")


def test_tables_lose_nothing_where_there_is_little_space(results):
    results = [results[0] | {"floor": 2e9}]
    console = Console(file=io.StringIO(), width=90)
    console.print(table_of_rows(results, trusted=True))
    console.print(*tables_of_problems(results))
    text = console.file.getvalue()
    assert "…" not in text
    assert "below" in text


def memory_of_a_peer():
    return {
        "workload": "W1",
        "quantity": "diagonal",
        "unit_bytes": 100,
        "answers": {
            OURS: {"problem": "", "bytes": 250},
            "lean": {"problem": "", "bytes": 150},
            "broken": {"problem": "KeyError: 'x'"},
        },
    }


def test_peaks_of_memory_are_in_that_of_the_unit():
    found = memory_of_a_peer()
    assert peaks(found) == {"lean": 1.5, OURS: 2.5}
    console = Console(file=io.StringIO(), width=120)
    console.print(table_of_memory([found]), *tables_of_problems([found]))
    for words in ("2.50", "1.5 lean", "KeyError: 'x'"):
        assert words in console.file.getvalue()


def test_the_page_holds_everything_and_loads_nothing(results, tmp_path):
    path = tmp_path / "bench.json"
    lines = {"axis": "width", "network": "MLP", "quantity": "diagonal", "sizes": [1, 2, 4]}
    grown = lines | {"seconds": [0.1, 0.2, 0.4], "slope": 1.0, "stderr": 0.0}
    machine = {"cpu": "some <cpu>", "threads": 1, "torch": torch.__version__}
    found = {
        "environment": machine,
        "mode": "smoke",
        "device": "cpu",
        "precision": "float32",
        "crowded_at_start": True,
        "peers": {"right": "1.0", "missing": None},
        "not_run": ["cuda: not run (no device)"],
        "rows": results,
        "memory": [memory_of_a_peer()],
        "slopes": [grown],
    }
    path.write_text(json.dumps(found))
    page = write_page(path).read_text()
    for words in ("some &lt;cpu&gt;", "right 1.0", "cuda: not run", "No module named", "twice"):
        assert words in page
    assert "How cost grows with width" in page
    assert "times mean nothing" in page
    assert '"description": "tiny: ' in page
    assert "Peak memory" in page
    assert "default-src 'none'" in page


# ---- verdicts, floors, slopes ----------------------------------------------------------------


def result(ours, theirs, target=1.0, problem="", floor=None):
    return {
        "target": target,
        "floor": floor,
        "answers": {
            OURS: {"quartiles": ours, "problem": problem},
            "peer": {"quartiles": theirs, "problem": ""},
        },
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "target", "against"),
    [
        ([0.8, 0.9, 1.0], [1.1, 1.2, 1.3], "reached", "ahead"),
        ([0.9, 1.0, 1.1], [1.0, 1.2, 1.3], "unclear", "level"),
        ([1.1, 1.2, 1.3], [0.8, 0.9, 1.0], "missed", "behind"),
    ],
)
def test_quartiles_decide(ours, theirs, target, against):
    found = standing(result(ours, theirs))
    assert (found.target, found.against) == (target, against)
    assert found.lead == pytest.approx(theirs[1] / ours[1])


@pytest.mark.parametrize(("floor", "below"), [(None, False), (0.9, False), (1.1, True)])
def test_a_target_below_the_floor_is_said_to_be(floor, below):
    assert standing(result([1.2] * 3, [2.0] * 3, floor=floor)).below_floor is below


def test_what_is_wrong_reaches_no_target():
    found = standing(result([0.1, 0.1, 0.1], [1.0, 1.0, 1.0], problem="wrong: off"))
    assert (found.ours, found.target, found.against) == (None, "", "")


def test_floors_of_a_perceptron_are_those_counted_by_hand():
    batch = SMALL["W1"]
    c = counts(batch)
    shapes = [(24, 16), (16, 16), (16, 4)]
    forward = sum(2 * 8 * i * o for i, o in shapes)
    back = sum(2 * 8 * i * o for i, o in shapes[1:])
    assert (c.forward, c.inputs, c.weights, c.classes) == (forward, back, forward, 4)
    factors = sum(8 * ((i + 1) * (i + 2) + o * (o + 1)) for i, o in shapes)
    assert kronecker(c) == forward + back + factors
    assert gram(c) == forward + back + sum(8 * 9 * (i + o) for i, o in shapes)
    assert kept_product(c) == 2 * forward


def test_operations_are_two_for_each_multiplication():
    layer = nn.Linear(3, 5)
    assert operations(lambda: layer(torch.ones(7, 3))) == 2 * 7 * 3 * 5


def test_slopes_are_measured_along_an_axis():
    axis = Axis("width", "MLP", (8, 16, 32), lambda width: perceptron(width=width, batch=8))
    found = measure_slopes(axis, 1, CPU, Progress({}, Console(quiet=True)))
    assert [row["quantity"] for row in found] == list(GROWING)
    assert all(len(row["seconds"]) == 3 for row in found)
    console = Console(file=io.StringIO(), width=120)
    console.print(table_of_slopes(found))
    assert console.file.getvalue().count("MLP") == len(found)


def test_the_slope_of_a_power_law_is_its_exponent():
    sizes = (1, 2, 4, 8, 16)
    exact = slope(sizes, [3.0 * s**1.5 for s in sizes])
    assert exact["slope"] == pytest.approx(1.5)
    assert exact["stderr"] < 1e-9
    noisy = slope(sizes, [s * math.exp(0.1 * (-1) ** s) for s in sizes])
    assert noisy["stderr"] > 0.01
