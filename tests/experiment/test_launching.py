"""How an experiment starts its commands: on one node or several, by themselves or by the launcher."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cluster_parts import REPOSITORY, free_port

from latent_medi.cli import main
from latent_medi.core.config import build
from latent_medi.core.errors import BAD_INPUT, RESUME, Preempted, UserError
from latent_medi.core.processes import RUNNER_OPTIONS, environment
from latent_medi.experiment import commands, nodes, run
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.launching import PORTS, Launching, launching, port_after
from latent_medi.experiment.settings import ExperimentSettings

CPU = str(REPOSITORY / "configs" / "accelerate" / "cpu.yaml")


def words(code: str) -> list[str]:
    """A command that runs a line of Python."""
    return [sys.executable, "-c", code]


def test_a_process_per_gpu_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNNER_OPTIONS, raising=False)
    for gpus, asked, processes in ((0, 0, 1), (0, 2, 2), (8, 0, 8), (8, 3, 3), (1, 0, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert launching(asked).processes == processes
    with pytest.raises(UserError, match="launch_processes is 2, and this machine has 1 GPU\\."):
        launching(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each would run the whole experiment"):
        launching()


def test_the_launcher_starts_commands_of_several_processes() -> None:
    assert Launching().words(["encode", "data=x"])[-4:] == ["-m", "latent_medi.cli", "encode", "data=x"]
    several = Launching(8, 2, 1, "10.0.0.1", 29500, ("--multi_gpu",)).words(["encode", "data=x"], 4711)
    assert several[3:] == [
        "latent_medi.launch", "--multi_gpu", "--num_processes", "8", "--num_machines", "2", "--machine_rank", "1",
        "--main_process_ip", "10.0.0.1", "--main_process_port", "4711", "-m", "latent_medi.cli", "encode", "data=x",
    ]  # fmt: skip


def test_a_runner_that_was_launched_hands_the_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--config_file", CPU, "--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "-m"]
    monkeypatch.setenv(RUNNER_OPTIONS, json.dumps(given))
    found = launching()
    assert (found.processes, found.nodes, found.node, found.address) == (2, 2, 1, "10.0.0.1")  # 2 is the file's
    assert found.options == tuple(given)
    assert launching(1) == found
    with pytest.raises(UserError, match="launch_processes is 2, and the launcher was given 2 processes on 2 nodes"):
        launching(2)


def test_a_launcher_that_does_not_say_takes_a_process_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNNER_OPTIONS, json.dumps(["--num_machines", "2", "--machine_rank", "1", "-m"]))
    for gpus, asked, processes in ((0, 0, 2), (0, 3, 6), (8, 0, 16), (8, 3, 6)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert launching(asked).processes == processes
    with pytest.raises(UserError, match="launch_processes is 9, and this machine has 8 GPUs\\."):
        launching(9)


def test_the_launcher_becomes_the_runner_of_its_node(tmp_path: Path) -> None:
    """One process per node with its number, whose words are the user's; the settings are refused by ``run`` itself."""
    options = ["--config_file", CPU, "--num_processes", "2", "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", "latent_medi.launch", *options, "-m", "latent_medi.cli", "run", "sources=x"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == BAD_INPUT
    assert done.stderr.count("unknown setting 'sources'") == 1


def test_a_node_waits_for_no_dry_run_and_for_no_words_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--num_processes", "2", "--num_machines", "2", "--machine_rank", "1", "-m"]
    monkeypatch.setenv(RUNNER_OPTIONS, json.dumps(options))
    monkeypatch.setattr(run, "follow", lambda where: pytest.fail(f"{where} waits for a node that never leads"))
    assert main(["run", "dry_run=true"]) == 0
    assert main(["run", "sources=x"]) == BAD_INPUT


def test_several_processes_take_one_model_after_the_other(tmp_path: Path) -> None:
    settings = build(ExperimentSettings, {"data": str(tmp_path), "out": str(tmp_path / "out"), "parallel": 2})
    with pytest.raises(UserError, match="parallel is 2, and each model takes 4 processes"):
        Experiment(settings, Launching(4))


def test_a_notice_reaches_the_commands_and_says_that_the_run_goes_on() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    code = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); time.sleep(60)"
    parent = "import os, signal, time; time.sleep(3); os.kill(os.getppid(), signal.SIGUSR1)"
    with pytest.raises(Preempted, match="was asked to stop"):
        commands.run_words({"long": words(code), "who asks": words(parent + "; time.sleep(60)")})
    assert signal.getsignal(signal.SIGUSR1) is before
    with pytest.raises(Preempted):  # of which this process was not told
        commands.run_words({"long": words(f"raise SystemExit({RESUME})")})


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_notice_breaks_off_what_the_runner_does_itself(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # a repeated one lets it clean up

    with pytest.raises(Preempted), commands.resumable():
        work()
    assert signal.getsignal(number) is before


class Over(commands.NoOtherNodes):
    """Another node's part has failed."""

    def over(self) -> bool:
        """Always."""
        return True


def test_a_command_whose_other_part_has_failed_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_ALONE_FOR", 0.2)
    with pytest.raises(RuntimeError, match="Another node has failed"):
        commands.run_words({"alone": words("import time; time.sleep(60)")}, others=Over())


def test_a_command_that_hears_no_signal_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_ALONE_FOR", 3)
    monkeypatch.setattr(commands, "_STOP_WITHIN", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="Another node has failed"):
        commands.run_words({"deaf": words(code)}, others=Over())
    assert time.monotonic() < start + 30


class Follower(threading.Thread):
    """Node 1 of two, whose part of a command is a line of Python.

    Args:
        where: The nodes.
    """

    def __init__(self, where: Launching) -> None:
        super().__init__(daemon=True)
        self.where, self.error = where, None
        self.start()

    def run(self) -> None:
        try:
            nodes.follow(self.where)
        except Exception as error:
            self.error = error


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> tuple[Launching, Launching]:
    """Both nodes; each runs the words of a command as they are."""
    monkeypatch.setattr(Launching, "words", lambda self, command, port=0: [*command, str(self.node), str(port)])
    port = free_port()
    return tuple(Launching(2, 2, node, "127.0.0.1", port) for node in range(2))  # type: ignore[return-value]


def test_every_node_takes_part_in_each_command(two: tuple[Launching, Launching], tmp_path: Path) -> None:
    note = "import sys; open(f'{}/{}-{{sys.argv[1]}}', 'w').write(sys.argv[2])"
    allowed = range(two[0].port + 1, two[0].port + PORTS + 1)
    follower = Follower(two[1])
    with nodes.leading(two[0]) as leader:
        both = {name: words(note.format(tmp_path, name)) for name in ("first", "second")}
        nodes.run_launched(both, two[0], leader)
    follower.join(timeout=60)
    assert not follower.is_alive()
    assert follower.error is None
    for name in ("first", "second"):
        found = [(tmp_path / f"{name}-{node}").read_text() for node in range(2)]
        assert found[0] == found[1]
        assert int(found[0]) in allowed


def test_the_processes_of_a_command_meet_at_the_first_free_port_after_the_nodes_own() -> None:
    first = free_port()
    with socket.socket() as busy:
        busy.bind(("", first))
        busy.listen()
        assert first < port_after(first - 1) < first + PORTS
    assert port_after(first - 1) == first
    with pytest.raises(UserError, match="None of the 100 ports after 65535 is free"):
        port_after(65535)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(UserError("bad"), UserError), (Preempted("stop"), Preempted), (RuntimeError("bug"), RuntimeError)],
)
def test_all_nodes_end_alike(two: tuple[Launching, Launching], raised: Exception, expected: type[Exception]) -> None:
    follower = Follower(two[1])
    with pytest.raises(expected), nodes.leading(two[0]):
        raise raised
    follower.join(timeout=60)
    assert type(follower.error) is expected


@pytest.mark.parametrize(("code", "expected"), [(3, RuntimeError), (RESUME, Preempted)])
def test_a_part_that_fails_or_stops_ends_the_command_everywhere(
    two: tuple[Launching, Launching], monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    monkeypatch.setattr(commands, "_ALONE_FOR", 0.2)
    follower = Follower(two[1])
    part = f"import sys, time; time.sleep(60) if sys.argv[1] == '0' else sys.exit({code})"
    with pytest.raises(expected), nodes.leading(two[0]) as leader:
        nodes.run_launched({"train": words(part)}, two[0], leader)
    follower.join(timeout=60)
    assert type(follower.error) is expected


def test_a_node_that_has_stopped_begins_no_further_command(two: tuple[Launching, Launching], tmp_path: Path) -> None:
    """Node 0 may be through with a command when the other's part of it stops, and go on to the next one."""
    follower, leader = Follower(two[1]), nodes.Leader(two[0])
    leader.announce(words(f"import sys; sys.exit({RESUME})"))
    leader.announce(words(f"open({str(tmp_path / 'begun')!r}, 'w')"))
    follower.join(timeout=30)
    assert type(follower.error) is Preempted
    assert leader.asked_to_stop()
    assert not (tmp_path / "begun").exists()


def test_all_nodes_stop_when_the_first_is_asked_to(two: tuple[Launching, Launching], tmp_path: Path) -> None:
    """At once, and not after the time that a part may go on alone."""
    follower, begun = Follower(two[1]), time.monotonic()
    part = words(f"import time; open({str(tmp_path / 'started')!r}, 'w').close(); time.sleep(60)")

    def lead(leader: nodes.Leader) -> None:
        leader.announce(part)
        wait_for(tmp_path / "started")
        raise Preempted("stop")

    with pytest.raises(Preempted), nodes.leading(two[0]) as leader:
        lead(leader)
    follower.join(timeout=60)
    assert type(follower.error) is Preempted
    assert time.monotonic() - begun < commands._ALONE_FOR


def wait_for(path: Path) -> None:
    """Wait until another process has made a file."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)


def other_process(code: str) -> subprocess.Popen[bytes]:
    """A process that imports the nodes' code and runs more, whose first line is ``ready``."""
    head = (
        "import time\nfrom latent_medi.experiment import nodes\n"
        "from latent_medi.experiment.launching import Launching\n"
    )
    process = subprocess.Popen(words(head + code), env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def leader_process(port: int, then: str = "") -> subprocess.Popen[bytes]:
    """Node 0 of two, which lives for a minute."""
    leader = f"leader = nodes.Leader(Launching(2, 2, 0, '127.0.0.1', {port}))\n{then}\n"
    return other_process(leader + "print('ready', flush=True); time.sleep(60)")


def test_a_node_notices_that_the_first_is_gone(two: tuple[Launching, Launching]) -> None:
    leader = leader_process(two[0].port)
    follower = Follower(two[1])
    time.sleep(1)
    leader.kill()
    follower.join(timeout=60)
    assert not follower.is_alive()
    assert "Node 0 is gone" in str(follower.error)
    leader.wait()


def test_a_command_stops_when_the_first_node_is_gone(
    two: tuple[Launching, Launching], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(commands, "_ALONE_FOR", 0.2)
    code = f"import time; open({str(tmp_path / 'started')!r}, 'w').close(); time.sleep(600)"
    leader = leader_process(two[0].port, f"leader.announce({words(code)!r})")
    follower = Follower(two[1])
    wait_for(tmp_path / "started")
    leader.kill()
    follower.join(timeout=60)
    assert not follower.is_alive()
    assert "Node 0 is gone" in str(follower.error)
    leader.wait()


def test_the_first_node_notices_that_another_is_gone(
    two: tuple[Launching, Launching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_ALONE_FOR", 0.2)
    monkeypatch.setattr(nodes, "_SILENT_FOR", 2)
    leader = nodes.Leader(two[0])
    beat = "nodes._BEAT_EVERY = 0.1\nprint('ready', flush=True)\n"
    follower = other_process(f"{beat}nodes.follow(Launching(2, 2, 1, '127.0.0.1', {two[0].port}))")
    while not leader._store.check(["alive/1"]):
        time.sleep(0.1)
    for _ in range(30):  # longer than a node may be silent
        assert not leader.over()
        time.sleep(0.1)
    follower.kill()
    follower.wait()
    encode = {"encode": words("import time; time.sleep(60)")}
    with pytest.raises(RuntimeError, match="Another node has failed"):
        nodes.run_launched(encode, two[0], leader)


def following_process(port: int) -> subprocess.Popen[bytes]:
    """Node 1 of two, which ends as ``latent-medi run`` would when it is asked to stop."""
    return other_process(
        "import sys\nfrom latent_medi.core.errors import Preempted\n"
        "from latent_medi.experiment.commands import resumable\n"
        "Launching.words = lambda self, command, port=0: [*command, str(self.node), str(port)]\n"
        f"print('ready', flush=True)\n"
        "try:\n"
        f"    with resumable(): nodes.follow(Launching(2, 2, 1, '127.0.0.1', {port}))\n"
        f"except Preempted: sys.exit({RESUME})\n"
    )


STOPS = """
import pathlib, signal, sys, time
folder, node = pathlib.Path({folder!r}), sys.argv[1]
def stop(*_):
    (folder / ("stops-" + node)).touch()
    time.sleep(1)  # to save
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / ("started-" + node)).touch()
while node == "1" or not (folder / "stops-1").exists(): time.sleep(0.01)
sys.exit({code})  # as processes do that have lost the others
"""


@pytest.mark.parametrize("code", ["1", "time.sleep(60)"])
def test_a_node_that_is_asked_to_stop_alone_ends_all_as_stopped(
    two: tuple[Launching, Launching], tmp_path: Path, code: str
) -> None:
    """Whether the processes of the others fail for want of the first ones', or would have gone on."""
    follower = following_process(two[0].port)
    part = {"encode": words(STOPS.format(folder=str(tmp_path), code=code))}

    def ask() -> None:
        wait_for(tmp_path / "started-0")
        wait_for(tmp_path / "started-1")
        follower.terminate()

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Preempted), nodes.leading(two[0]) as leader:
        nodes.run_launched(part, two[0], leader)
    assert follower.wait(timeout=60) == RESUME


def test_a_node_that_takes_long_to_save_ends_as_stopped(two: tuple[Launching, Launching], tmp_path: Path) -> None:
    leader = leader_process(two[0].port, f"leader.announce({words(STOPS.format(folder=str(tmp_path), code='1'))!r})")
    follower = following_process(two[0].port)
    wait_for(tmp_path / "started-1")
    follower.terminate()
    wait_for(tmp_path / "stops-1")
    leader.kill()
    leader.wait()
    assert follower.wait(timeout=60) == RESUME


def test_a_node_may_be_asked_to_stop_between_two_commands(two: tuple[Launching, Launching]) -> None:
    leader, follower = nodes.Leader(two[0]), following_process(two[0].port)
    while not leader._store.check(["alive/1"]):
        time.sleep(0.05)
    follower.terminate()
    assert follower.wait(timeout=60) == RESUME
    with pytest.raises(Preempted, match="node 1 was asked to stop"):
        leader.announce(["encode"])
