"""A whole experiment with several processes for each stage: on one node, and on two that talk over the loopback
interface."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from cluster_parts import LONGEST, everything, free_port, images_logged, images_saved, kill, launcher, start, wait_until
from experiment_parts import NETWORK
from parts import make_cohort

from latent_medi.core.errors import RESUME
from latent_medi.shards.dataset import PatchDataset

STEPS, BATCH = 30, 8
WHOLE = 3 * LONGEST  # seconds that a whole experiment may take


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models on a few patches, with the demo's autoencoder and encoder; every stage but the classifier's."""
    folder = tmp_path_factory.mktemp("nodes")
    dataset = make_cohort(folder / "data", ("aster", "birch"))
    patients = sorted(set(dataset.index["patient"]))
    part = dict(zip(patients, ["train", "train", "probe", "test"] * len(patients), strict=False))
    dataset.add_split("three", [part[p] for p in dataset.index["patient"]], {})
    train = {"max_steps": STEPS, "global_batch": BATCH, "log_every_images": BATCH, "checkpoint_every_images": 2 * BATCH}
    values = {
        "data": str(folder / "data"),
        "split": "three",
        "train": {**train, "model": NETWORK},
        "seen_per_cell": 3,
        "generate": {"sampler": {"steps": 2}, "device_batch": 8},
        "evaluate": {"unseen": False, "downstream": False, "real_splits": 0},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(values))
    return folder / "experiment.yaml"


class Nodes:
    """An experiment on two nodes of one process each.

    Args:
        config: Its configuration.
        out: Its folder.
    """

    def __init__(self, config: Path, out: Path) -> None:
        self.words = ["-m", "latent_medi.cli", "run", "--config", str(config), f"out={out}"]
        self.errors = [out.with_name(f"{out.name}-{node}.log") for node in range(2)]
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start both nodes, the second first."""
        port, found = free_port(), {}
        for node in (1, 0):
            options = ["--num_machines", "2", "--machine_rank", str(node), "--main_process_ip", "127.0.0.1"]
            found[node] = start([*launcher(2, port, *options, "--same_network"), *self.words], self.errors[node])
        self.running = [found[0], found[1]]

    def end(self) -> list[int]:
        """Wait for both nodes; returns their exit codes."""
        return [process.wait(timeout=WHOLE) for process in self.running]

    def printed(self) -> str:
        """The end of what both nodes printed."""
        return "\n".join(errors.read_text()[-3000:] for errors in self.errors if errors.is_file())

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self.running:
            if process.poll() is None:
                kill(process)


def run_here(config: Path, out: Path, processes: int) -> None:
    """Run the experiment on one node."""
    command = [sys.executable, "-m", "latent_medi.cli", "run", "--config", str(config), f"out={out}"]
    log = out.with_name(f"{out.name}.log")
    process = start([*command, f"launch_processes={processes}", "processes=1"], log)
    assert process.wait(timeout=WHOLE) == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def two_processes(config: Path) -> Path:
    """Folder of the experiment whose stages have two processes each."""
    out = config.parent / "two"
    run_here(config, out, 2)
    return out


@pytest.fixture
def nodes(config: Path, tmp_path: Path) -> Iterator[Nodes]:
    """The experiment on two nodes."""
    found = Nodes(config, tmp_path / "out")
    yield found
    found.stop()


def assert_same_result(a: Path, b: Path) -> None:
    """Models and samples agree in every bit."""
    for name in ("medi", "cls"):
        ours, theirs = everything(a / name), everything(b / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        shards = [PatchDataset.open(folder / "synthetic" / name).info["shards"] for folder in (a, b)]
        assert [shard["sha256"] for shard in shards[0]] == [shard["sha256"] for shard in shards[1]]
    assert (a / "plan-medi.csv").read_bytes() == (b / "plan-medi.csv").read_bytes()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(config: Path, two_processes: Path, tmp_path: Path) -> None:
    """To rounding: sums of gradients are taken in another order."""
    run_here(config, tmp_path / "one", 1)
    assert "2 processes; the first has cpu" in two_processes.with_name("two.log").read_text()
    for name in ("medi", "cls"):
        one, two = everything(tmp_path / "one" / name), everything(two_processes / name)
        weights = [key for key in one if key.startswith("model/unet")]
        before, after = (torch.cat([run[key].double().flatten() for key in weights]) for run in (one, two))
        assert float((before - after).norm() / before.norm()) <= 1e-5
        images = [PatchDataset.open(f / "synthetic" / name) for f in (tmp_path / "one", two_processes)]
        # Keys begin with the model's hash, and the weights differ in the last digits.
        assert [[key.split("-")[2:] for key in each.index["key"]] for each in images] == 2 * [
            [key.split("-")[2:] for key in images[0].index["key"]]
        ]
        rows = range(len(images[0]))
        pixels = [torch.stack([torch.from_numpy(p) for p in each.read(list(rows))]).int() for each in images]
        assert int((pixels[0] - pixels[1]).abs().max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_node_that_dies_in_training_costs_nothing(
    dies: int, two_processes: Path, nodes: Nodes, tmp_path: Path
) -> None:
    """Nor does one that is asked to stop alone while both sample."""
    out = tmp_path / "out"
    nodes.start()
    until = BATCH * STEPS // 2
    wait_until(lambda: images_logged(out / "medi") >= until, nodes.running[0], nodes.errors[0])
    kill(nodes.running[dies])
    assert nodes.running[1 - dies].wait(timeout=WHOLE) not in (0, 75), nodes.printed()
    assert images_saved(out / "medi") > 0
    assert not (out / "medi" / "model").exists()
    nodes.start()
    if dies == 0:
        wait_until(lambda: "dpmpp_2m" in nodes.printed(), nodes.running[0], nodes.errors[0], every=0.1)
        nodes.running[1].terminate()
        assert nodes.end() == [RESUME, RESUME], nodes.printed()
        assert not (out / "metrics.json").exists()
        nodes.start()
    assert nodes.end() == [0, 0], nodes.printed()
    assert_same_result(two_processes, out)
    assert (out / "report.html").is_file()
