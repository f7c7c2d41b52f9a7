"""The files for clusters: Accelerate's configurations, the Slurm script, and the launcher that it starts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from cluster_parts import (
    LONGEST,
    REPOSITORY,
    SMALL,
    free_port,
    images_logged,
    images_saved,
    launcher,
    losses,
    start,
    wait_until,
)

from latent_medi import launch
from latent_medi.core.errors import UserError

SCRIPT = REPOSITORY / "configs" / "cluster" / "slurm.sh"

# What Slurm does, as far as the script sees it: a task per node, signals passed on, the highest exit code.
SRUN = """
import os, signal, subprocess, sys
open(os.environ["RECORD"], "a").write("srun " + " ".join(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
while words[0].startswith("--"):
    del words[0]
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(node)}) for node in nodes]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
open(os.environ["RECORD"], "a").write("scontrol " + " ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "show":
    print("127.0.0.1\\nnode-b")
"""
# In place of Python: records its words, and ends as told or, told nothing, when the notice comes.
PYTHON = """
import os, signal, sys
names = ("OMP_NUM_THREADS", "MASTER_ADDR")
told = " ".join(f"{name}={os.environ.get(name)}" for name in names)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(os.environ["RECORD"], "a").write("python " + " ".join(sys.argv[1:]) + " " + told + "\\n")
if os.environ["CODE"]:
    sys.exit(int(os.environ["CODE"]))
while True:
    signal.pause()
"""


class Slurm:
    """A folder with stand-ins for Slurm's commands, and what was asked of them.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.record, self.printed = folder / "record", folder / "printed"
        for name, program in (("srun", SRUN), ("scontrol", SCONTROL), ("fake-python", PYTHON)):
            file = folder / name
            file.write_text(f"#!{sys.executable}\n{program}")
            file.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "fake-python"),
            "RECORD": str(self.record),
            "CODE": "",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "32",
        }
        self.environment.pop("OMP_NUM_THREADS", None)

    def submit(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start the script as slurmd would."""
        with open(self.printed, "ab") as file:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *words],
                cwd=REPOSITORY,
                env={**self.environment, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def asked(self, command: str) -> list[str]:
        """What a command was called with so far; the ends of lines that a writer has not finished are left out."""
        if not self.record.exists():
            return []
        lines = self.record.read_text().splitlines()
        return [line.removeprefix(f"{command} ") for line in lines if line.startswith(f"{command} ")]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    return Slurm(tmp_path)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations(file: Path) -> None:
    config = load_config_from_file(str(file))  # raises for a key that it does not know
    assert config.mixed_precision == "no"  # the precision belongs to the run
    assert config.num_processes % config.num_machines == 0
    several = config.num_processes > 1
    assert (config.distributed_type == DistributedType.MULTI_GPU) == several  # else one process is started
    expected = {"cpu": (1, 2), "one_gpu": (1, 1), "eight_gpus": (1, 8), "two_nodes": (2, 16)}[file.stem]
    assert (config.num_machines, config.num_processes) == expected
    assert config.use_cpu == (file.stem == "cpu")


def test_processes_that_were_not_started_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"(?s)--cpu.*cpu.yaml"):
        launch.make_accelerator()
    monkeypatch.delenv("MASTER_ADDR")
    assert isinstance(launch.make_accelerator(), Accelerator)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "Accelerator", lambda **_: type("Alone", (), {"num_processes": 1}))
        with pytest.raises(UserError, match="2 processes were launched, and this one sees 1"):
            launch.make_accelerator()


@pytest.mark.slow
def test_several_processes_under_cpu_are_refused(tiny: Path, tmp_path: Path) -> None:
    where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={tmp_path / 'run'}", "max_steps=2"]
    words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train.py"]
    process = start([*words, "--config", "demo/medi", *where, *SMALL], tmp_path / "errors")
    assert process.wait(timeout=LONGEST) != 0
    assert "configs/accelerate/cpu.yaml" in (tmp_path / "errors").read_text()
    assert not (tmp_path / "run").exists()


def test_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_slurm_script_starts_a_launcher_per_node(slurm: Slurm) -> None:
    assert slurm.submit("train.py", "--config", "demo/medi", "name=two words", CODE="0", MASTER_ADDR="x").wait(60) == 0
    assert slurm.asked("scontrol") == ["show hostnames node-[a-b]"]
    (step,) = slurm.asked("srun")
    assert step.startswith("--ntasks=2 --ntasks-per-node=1 ")
    started = sorted(slurm.asked("python"))
    assert len(started) == 2
    for node, words in enumerate(started):
        assert words.startswith(f"-m latent_medi.launch --machine_rank {node} --num_machines 2 --num_processes 8 ")
        assert "--main_process_ip 127.0.0.1 --main_process_port 14711 " in words
        assert words.endswith("train.py --config demo/medi name=two words OMP_NUM_THREADS=8 MASTER_ADDR=None")


def test_slurm_script_on_one_device(slurm: Slurm) -> None:
    one = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1", "CODE": "0"}
    assert slurm.submit("sample.py", **one).wait(60) == 0
    (words,) = slurm.asked("python")
    assert "--num_processes 1 " in words
    assert "--multi_gpu" not in words  # which Accelerate refuses for one process
    assert "main_process" not in words


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_slurm_script_requeues_what_can_go_on_and_nothing_else(code: int, slurm: Slurm) -> None:
    assert slurm.submit("train.py", CODE=str(code)).wait(60) == code
    assert slurm.asked("scontrol")[1:] == (["requeue 4711"] if code == 75 else [])


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, ["requeue 4711"]), (signal.SIGTERM, [])])
def test_slurm_script_passes_the_notice_on_and_waits(number: signal.Signals, requeued: list[str], slurm: Slurm) -> None:
    """SIGTERM means that the user cancelled the job, or that Slurm requeues it: both end the run, neither requeues."""
    process = slurm.submit("train.py")
    wait_until(lambda: len(slurm.asked("python")) == 2, process, slurm.printed)
    process.send_signal(number)
    assert process.wait(60) == 75
    assert slurm.asked("scontrol")[1:] == requeued


def test_slurm_script_says_how_to_use_it(slurm: Slurm) -> None:
    assert slurm.submit().wait(60) == 2
    assert "usage: sbatch" in slurm.printed.read_text()


# Each process notes that it is ready, and ends at the notice, or after some seconds as told.
RANK = """
import os, pathlib, signal, sys, time
if "deaf" not in sys.argv:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1], os.environ.get("RANK", "0")).touch()
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def launched(processes: int, folder: Path, seconds: float, code: int) -> tuple[list[str], Callable[[], bool]]:
    script = folder / "rank.py"
    script.write_text(RANK)
    (folder / "ready").mkdir()
    words = [*launcher(processes, free_port()), str(script), str(folder / "ready"), str(seconds), str(code)]
    if processes == 1:
        words = [sys.executable, "-m", "latent_medi.launch", "--cpu", "--num_processes", "1", *words[-4:]]
    return words, lambda: len(list((folder / "ready").iterdir())) == processes


@pytest.mark.parametrize("processes", [1, 2])
def test_launcher_returns_the_exit_code(processes: int, tmp_path: Path) -> None:
    for code in (0, 3):
        folder = tmp_path / str(code)
        folder.mkdir()
        words, _ = launched(processes, folder, 0, code)
        assert start(words, folder / "errors").wait(timeout=LONGEST) == code, (folder / "errors").read_text()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_launcher_passes_a_notice_on(number: signal.Signals, processes: int, tmp_path: Path) -> None:
    words, ready = launched(processes, tmp_path, LONGEST, 0)
    process = start(words, tmp_path / "errors")
    wait_until(ready, process, tmp_path / "errors")
    process.send_signal(number)
    assert process.wait(timeout=60) == launch.RESUME, (tmp_path / "errors").read_text()


def test_a_process_that_ends_before_it_can_take_notice_may_go_on_too(tmp_path: Path) -> None:
    words, ready = launched(2, tmp_path, LONGEST, 0)
    process = start([*words, "deaf"], tmp_path / "errors")
    wait_until(ready, process, tmp_path / "errors")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == launch.RESUME, (tmp_path / "errors").read_text()


@pytest.mark.slow
def test_a_job_that_is_noticed_twice_ends_with_the_unbroken_run(tiny: Path, tmp_path: Path, slurm: Slurm) -> None:
    """The real script, launcher and training on two nodes; stand-ins only for Slurm."""
    real = {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def words(name: str) -> list[str]:
        where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={tmp_path / name}"]
        run = ["max_steps=60", "global_batch=8", "log_every_images=8", "checkpoint_every_images=480", *SMALL]
        return ["train.py", "--config", "demo/medi", *where, *run]

    for start_number in range(3):
        process = slurm.submit(*words("noticed"), MASTER_PORT=str(free_port()), **real)
        if start_number < 2:
            until = 8 * 20 * (start_number + 1)
            wait_until(lambda: images_logged(tmp_path / "noticed") >= until, process, slurm.printed)  # noqa: B023
            process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=LONGEST) == (0 if start_number == 2 else 75), slurm.printed.read_text()[-4000:]
        if start_number < 2:  # the notice's own: none other is written before the end
            assert until <= images_saved(tmp_path / "noticed") < 480
        assert slurm.asked("scontrol").count("requeue 4711") == min(start_number + 1, 2)
    assert slurm.submit(*words("whole"), MASTER_PORT=str(free_port()), **real).wait(timeout=LONGEST) == 0
    assert losses(tmp_path / "noticed") == losses(tmp_path / "whole")
    assert images_saved(tmp_path / "noticed") == 480
