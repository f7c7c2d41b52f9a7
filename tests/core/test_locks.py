"""Two jobs never write one folder: real processes, real kills."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from latent_medi.core import locks
from latent_medi.core.errors import UserError
from latent_medi.core.lock_owner import Owner
from latent_medi.core.locks import LOCK_FILE, STALE_AFTER, output_lock

HOLD = """
import sys, time
from latent_medi.core.locks import output_lock
with output_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float = 600) -> subprocess.Popen[str]:
    """A process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_job_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    first = holder(tmp_path / "out")
    try:
        with pytest.raises(UserError) as refusal, output_lock(tmp_path / "out"):
            pass
        told = str(refusal.value)
        assert f"process {first.pid} of " in told
        assert socket.gethostname() in told
        assert f"{tmp_path}/out 600" in told  # its command
        assert str(tmp_path / "out" / LOCK_FILE) in told  # what to remove
    finally:
        first.terminate()
        first.wait()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_s_folder_is_taken_over_at_once(tmp_path: Path, reaped: bool) -> None:
    first = holder(tmp_path / "out")
    first.kill()
    if reaped:
        first.wait()
    else:  # a zombie keeps its number
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    start = time.monotonic()
    with output_lock(tmp_path / "out"):
        assert Path(tmp_path / "out" / LOCK_FILE).is_file()
    first.wait()
    assert time.monotonic() - start < 5
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_process_number_that_is_used_again_is_another_owner(tmp_path: Path) -> None:
    owner = Owner.this_process()
    write_lock(tmp_path, {**vars(owner), "pid": os.getppid(), "started": owner.started - 3600})
    with output_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_folder_is_held_again_by_the_process_that_holds_it(tmp_path: Path) -> None:
    with output_lock(tmp_path / "run"):
        with output_lock(tmp_path / "run"), output_lock(tmp_path / "run" / "medi"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).is_file()
    assert not (tmp_path / "run").exists()  # made by the lock, and nothing was written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_behind_by_errors_and_signals(tmp_path: Path, number: int) -> None:
    (tmp_path / "mine").write_text("1")
    with pytest.raises(ZeroDivisionError), output_lock(tmp_path):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    # Both as in a terminal: in the background a shell has its commands ignore SIGINT.
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n" + HOLD
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "600"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    process.wait(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def write_lock(folder: Path, values: dict, age: float = 0.0) -> None:
    """A lock as another machine left it."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(values))
    os.utime(folder / LOCK_FILE, (time.time() - age,) * 2)


def elsewhere() -> dict:
    return {**vars(Owner.this_process()), "host": "another-host", "token": "theirs"}


def test_an_owner_on_another_machine_lives_while_it_renews_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    write_lock(tmp_path, elsewhere(), age=STALE_AFTER - 60)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.5):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=renew)
    thread.start()
    told = r"on another-host, since .*\n.*If there is no such job any more, remove "
    try:
        with pytest.raises(UserError, match=told), output_lock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_lock_of_another_machine_that_is_not_renewed_is_taken_over(tmp_path: Path) -> None:
    write_lock(tmp_path, elsewhere(), age=STALE_AFTER + 1)
    with output_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] != "theirs"
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_that_grows_stale_while_one_waits_is_taken_over(tmp_path: Path) -> None:
    write_lock(tmp_path, elsewhere(), age=STALE_AFTER - 3)
    start = time.monotonic()
    with output_lock(tmp_path):
        assert time.monotonic() - start > 1


def test_an_owner_renews_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    with output_lock(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (1, 1))
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK_FILE).stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 1


def test_an_owner_that_lost_its_folder_ends(tmp_path: Path) -> None:
    """A machine that slept finds its folder taken by another."""
    code = "import latent_medi.core.locks as locks; locks.HEARTBEAT = 0.1\n" + HOLD
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    theirs = tmp_path / "theirs"
    theirs.write_text(json.dumps(elsewhere()))
    os.replace(theirs, tmp_path / LOCK_FILE)
    assert process.wait(timeout=120) != 0
    assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] == "theirs"  # the new owner's lock stays
    process.communicate()


def test_a_lock_that_names_nobody_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    """On a file system without links, its writer may have died while writing it."""
    (tmp_path / LOCK_FILE).write_text('{"pid"')
    os.utime(tmp_path / LOCK_FILE, (time.time() - STALE_AFTER - 1,) * 2)
    with output_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_is_no_lock_is_one_message(tmp_path: Path) -> None:
    for name, make in (("folder", Path.mkdir), ("pipe", os.mkfifo), ("link", lambda p: p.symlink_to("nowhere"))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / LOCK_FILE)
        with pytest.raises(UserError, match="no lock of this program"), output_lock(tmp_path / name):
            pass


def test_without_links_a_lock_is_made_in_one_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with output_lock(tmp_path):
        told = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path), "0"], capture_output=True, text=True, check=False
        )
        assert "is being written by" in told.stderr
    write_lock(tmp_path, elsewhere(), age=STALE_AFTER + 1)
    with output_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


MANY = """
import os, random, sys, time
from pathlib import Path
from latent_medi.core.errors import UserError
from latent_medi.core.locks import output_lock
folder, begin = Path(sys.argv[1]), float(sys.argv[2])
WON, REFUSED, TWO = 10, 11, 12
def job():
    try:
        with output_lock(folder):
            try:
                os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                os._exit(TWO)
            time.sleep(0.002)
            os.unlink(folder / "inside")
            if random.random() < 0.5:
                os._exit(WON)  # dies with the lock
    except UserError:
        os._exit(REFUSED)
    os._exit(WON)
time.sleep(max(0, begin - time.time()))
end = time.time() + 6
codes = []
while time.time() < end:
    child = os.fork()
    if not child:
        job()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes.count(WON), codes.count(REFUSED))
sys.exit(f"{set(codes)}" if set(codes) - {WON, REFUSED} else 0)
"""


@pytest.mark.slow
def test_many_at_once_are_never_two_at_once(tmp_path: Path) -> None:
    """Taking, releasing and taking over, by eight processes as fast as they can."""
    folder = tmp_path / "out"
    folder.mkdir()
    begin = str(time.time() + 10)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MANY, str(folder), begin], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs
    assert sum(int(out.split()[0]) for out, _ in outputs) > 50, outputs
    with output_lock(folder):
        pass
    assert not list(folder.iterdir())
