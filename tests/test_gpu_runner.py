"""benchmarks/gpu.py: what is run in which order, what is kept, that it ends in time. Its rows have no torch here."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_parts import plan, records  # noqa: E402
from gpu_parts.plan import Group, Part  # noqa: E402
from gpu_parts.runner import Machine, Options, Runner  # noqa: E402

from latent_medi.training.estimate.measured import Measured, measured_text, read_measured  # noqa: E402

ROWS_MODULE = """
import os, subprocess, sys, time
from pathlib import Path
from gpu_parts.child import NotHere

def count(context):
    file = context.out / f"count-{context.row}"
    file.write_text(str(int(file.read_text()) + 1 if file.exists() else 1))

def good(context):
    count(context)
    context.show(answer=42.0)

def bad(context):
    count(context)
    context.within("difference", 0.5, 0.1)

def raises(context):
    count(context)
    raise ValueError("no such thing")

def dies(context):
    count(context)
    os._exit(3)

def sleeps(context):
    context.figures(half=0.5)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.out / "other").write_text(str(other.pid))
    if "SHORT" not in os.environ:
        time.sleep(600)
    other.kill()

def gpu(context):
    count(context)
    context.only_on_gpu()

def trains(context):
    context.figures(preset="S", precision="bf16", compiled=True, batch=256, steps_per_s=20.0, peak_bytes=3 * 2**30)

def slow(context):
    context.goal("ratio", 1.0, least=1.5)

def absent(context):
    raise NotHere("no folder")

ROWS = dict(good=good, better=good, best=good, bad=bad, raises=raises, dies=dies, sleeps=sleeps, gpu=gpu, absent=absent,
            slow=slow, trains=trains)
"""


def part(name: str, *rows: str, seconds: float = 90, chain: bool = False) -> Part:
    """A part of one group of the rows above."""
    return Part(name, seconds, (Group("planted_rows", rows, chain=chain),))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of results; the rows above can be imported by the processes."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted_rows.py").write_text(ROWS_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.setattr(records, "revision", lambda: "r1")
    return tmp_path / "out"


def call(out: Path, *parts: Part, budget: float = 120, card: str = "CPU") -> tuple[int, str]:
    """Run; returns the exit code and the table."""
    code = Runner(parts, Options(out, budget, least=0), Machine(card, "2.0")).go()
    return code, (out / "table.txt").read_text()


def statuses(out: Path, name: str, *rows: str) -> list[str]:
    """Status of rows, "" for one without a record."""
    return [(records.read(out, name, row) or {}).get("status", "") for row in rows]


def counts(out: Path, *rows: str) -> list[int]:
    """How often each row ran."""
    return [int(file.read_text()) if (file := out / f"count-{row}").exists() else 0 for row in rows]


def wait_for_end(process: int) -> None:
    """Wait until a process is gone."""
    patience = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < patience, "it was left behind"
            time.sleep(0.05)


def test_what_each_row_came_to_is_kept_and_told(out: Path) -> None:
    rows = ("good", "bad", "raises", "dies", "better", "gpu", "absent")
    code, table = call(out, part("smoke", *rows))
    assert code == 1
    assert statuses(out, "smoke", *rows) == [
        "passed",
        "failed",
        "failed",
        "failed",
        "passed",
        "needs a GPU",
        "not here",
    ]
    assert counts(out, "good", "better", "dies") == [1, 1, 1]  # a process that fell over takes no other row with it
    record: dict[str, Any] = records.read(out, "smoke", "good") or {}
    assert (record["revision"], record["card"], record["torch"], record["quick"]) == ("r1", "CPU", "2.0", False)
    assert record["figures"] == {"answer": 42.0}
    assert record["command"]
    assert (out / "smoke" / record["log"]).is_file()
    assert "exit code 3" in (records.read(out, "smoke", "dies") or {})["note"]
    assert "no such thing" in table
    assert "difference 0.5, bound 0.1" in table
    assert {row["row"] for row in json.loads((out / "results.json").read_text())["rows"]} == set(rows)


def test_exit_code_of_rows_that_hold(out: Path) -> None:
    code, table = call(out, part("smoke", "good", "gpu", "slow"), part("real", "absent", chain=True))
    assert code == 0
    assert "1 passed, 1 needs a GPU, 1 below goal, 1 not here" in table
    assert "ratio 1, goal 1.5" in table


def test_what_is_done_is_not_repeated_until_all_is_done(out: Path) -> None:
    call(out, part("smoke", "good"))
    both = part("smoke", "good", "gpu", "absent")
    bare = part("real", "absent", "best", chain=True)
    call(out, both, bare)
    assert counts(out, "good", "gpu", "best") == [1, 1, 0]
    call(out, both, bare)  # nothing is left, so all is done once more
    assert counts(out, "good", "gpu") == [2, 2]
    call(out, both, card="H100")
    assert counts(out, "good", "gpu") == [3, 3]


def test_another_revision_begins_anew(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = part("smoke", "good")
    call(out, smoke)
    kept = out / "work" / "smoke" / "kept"
    kept.touch()
    monkeypatch.setattr(records, "revision", lambda: "r2")
    call(out, smoke)
    assert counts(out, "good") == [2]
    assert not kept.exists()


def test_what_failed_is_tried_again_and_what_was_cut_off_goes_on(out: Path) -> None:
    smoke = part("smoke", "good", "bad", "better")
    call(out, smoke)
    record: dict[str, Any] = records.read(out, "smoke", "better") or {}
    records.write(records.record_file(out, "smoke", "better"), {**record, "status": "cut off"})
    kept = out / "work" / "smoke" / "kept"
    kept.touch()
    call(out, smoke)
    assert counts(out, "good", "bad", "better") == [1, 2, 2]
    assert kept.exists()


def test_order_of_parts(out: Path) -> None:
    parts = [part(name, "good") for name in ("smoke", "real", "rates", "demo")]

    def order() -> list[str]:
        return [p.name for p in Runner(parts, Options(out, 60), Machine("CPU", "2.0")).order()]

    def put(name: str, started: str, revision: str = "r1") -> None:
        made = {"part": name, "row": "good", "status": "passed", "started": started, "revision": revision}
        records.write(records.record_file(out, name, "good"), {**made, "card": "CPU", "quick": False})

    assert order() == ["smoke", "real", "rates", "demo"]
    put("smoke", "2026-01-02T00:00:00+00:00")
    put("rates", "2026-01-01T00:00:00+00:00")
    assert order() == ["real", "demo", "rates", "smoke"]
    put("demo", "2026-01-01T00:00:00+00:00", revision="r0")
    assert order() == ["real", "demo", "rates", "smoke"]


def test_a_chain_stops_where_a_row_does_not_hold(out: Path) -> None:
    real = part("real", "good", "bad", "better", chain=True)
    code, table = call(out, real)
    assert code == 1
    assert statuses(out, "real", "good", "bad", "better") == ["passed", "failed", ""]
    assert "left out, real: better" in table
    call(out, real)
    assert counts(out, "good", "bad", "better") == [1, 2, 0]


def test_what_training_did_on_a_card_is_what_an_estimate_reads(out: Path) -> None:
    call(out, part("rates", "trains", "good"))
    (row,) = read_measured(out / "measured.json")
    assert row == Measured(row.card, row.revision, "S", "bf16", True, 5120.0, 3.0)
    assert "5120 images/s, peak 3.00 GiB" in measured_text([row], "S")[0]


def wait_for_the_end(pid: int) -> None:
    patience = time.monotonic() + 60
    while psutil.pid_exists(pid):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        assert time.monotonic() < patience
        time.sleep(0.05)


def test_it_ends_within_its_budget_and_says_what_it_left_out(out: Path) -> None:
    start, parts = time.monotonic(), (part("smoke", "good"), part("real", "sleeps", "best", chain=True))
    code, table = call(out, *parts, budget=6)
    assert time.monotonic() - start < 6
    assert code == 0
    assert statuses(out, "real", "sleeps")[0] in ("cut off", "")  # "" on a machine that is slow to start a process
    assert re.search(r"left out, real: .*best", table)
    assert "The same command goes on" in table
    if (record := records.read(out, "real", "sleeps")) is not None:
        assert record["figures"] == {"half": 0.5}
        if (out / "other").is_file():
            wait_for_end(int((out / "other").read_text()))


def test_time_that_is_left_is_given_to_what_was_left_out(out: Path) -> None:
    call(out, part("smoke", "better", seconds=0), part("rates", "good"))
    assert statuses(out, "smoke", "better") + statuses(out, "rates", "good") == ["passed", "passed"]
    first, second = (records.read(out, *row) or {} for row in (("rates", "good"), ("smoke", "better")))
    assert first["log"] < second["log"]


def test_a_runner_that_is_killed_takes_its_processes_along_and_is_gone_on_with(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.append(sys.argv[1])\n"
        "from gpu_parts import records; records.revision = lambda: 'r1'\n"
        "from gpu_parts.plan import Group, Part; from gpu_parts.runner import Machine, Options, Runner\n"
        "rows = Part('smoke', 90, (Group('planted_rows', ('good', 'sleeps', 'better')),))\n"
        "Runner([rows], Options(Path(sys.argv[2]), 600), Machine('CPU', '2.0')).go()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(ROOT / "benchmarks"), str(out)], cwd=out.parent)
    patience = time.monotonic() + 60
    while not (out / "other").is_file() or not (out / "other").read_text():
        assert time.monotonic() < patience
        time.sleep(0.05)
    other = int((out / "other").read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_end(other)
    monkeypatch.setenv("SHORT", "1")
    code, _ = call(out, part("smoke", "good", "sleeps", "better"))
    assert code == 0
    assert counts(out, "good", "better") == [1, 1]
    assert statuses(out, "smoke", "good", "sleeps", "better") == ["passed"] * 3


def test_every_row_of_the_plan_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [p.name for p in plan.PARTS] == ["smoke", "real", "rates", "demo", "histodiffusion"]
    assert sum(p.seconds for p in plan.TOGETHER) == plan.BUDGET
    for whole in plan.PARTS:
        names = [row for group in whole.groups for row in group.rows]
        assert len(set(map(records.file_name, names))) == len(names)
        for group in whole.groups:
            assert set(group.rows) == set(importlib.import_module(group.module).ROWS)


@pytest.mark.parametrize(
    ("words", "said"), [(["--parts", "smoke,rate"], "There is no part rate."), (["--budget", "0"], "--budget is 0")]
)
def test_words_that_mean_nothing_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "out"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_whole_command_in_tiny_sizes_on_a_cpu(tmp_path: Path) -> None:
    words = ["--quick", "--device", "cpu", "--budget", "3000", "--out", str(tmp_path / "out"), "--real", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words], capture_output=True, text=True, check=False
    )
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out" not in done.stdout.replace("left out, real", "")
    assert {row["status"] for row in rows} == {"passed", "needs a GPU", "not here"}
    bare = [row["row"] for row in rows if row["status"] == "not here"]
    assert set(bare) <= {"patches", "8-bit AdamW"}
