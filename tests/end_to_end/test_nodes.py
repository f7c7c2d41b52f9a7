"""Two nodes, each with a launcher of its own, that talk over the loopback interface."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_parts import (
    LONGEST,
    SMALL,
    assert_same_bits,
    free_port,
    images_logged,
    images_saved,
    kill,
    launcher,
    losses,
    start,
    wait_until,
)

BATCH, STEPS, PATCHES = 20, 48, 48  # 20 epochs, whose ends lie inside batches
SOON = 90  # seconds within which a node must end after the other has died


class Job:
    """One run on two nodes of two processes each.

    Args:
        tiny: Folder with data and latents.
        folder: Where everything of this run goes.
    """

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.out, self.records = folder / "run", folder / "records"
        self.records.mkdir(parents=True)
        self.errors = [folder / f"node-{node}" for node in range(2)]
        where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={self.out}"]
        run = [f"max_steps={STEPS}", f"global_batch={BATCH}", f"log_every_images={BATCH}", *SMALL]
        script = str(Path(__file__).with_name("recorded_train.py"))
        self.arguments = [script, str(self.records), "--config", "demo/medi", *where, *run]
        self.arguments.append(f"checkpoint_every_images={4 * BATCH}")
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start both nodes, the second first, as happens on a cluster."""
        port = free_port()
        nodes = {}
        for node in (1, 0):
            options = ["--num_machines", "2", "--machine_rank", str(node), "--main_process_ip", "127.0.0.1"]
            words = [*launcher(4, port, *options, "--same_network"), *self.arguments]
            nodes[node] = start(words, self.errors[node])
        self.nodes = [nodes[0], nodes[1]]

    def told(self) -> str:
        """The end of what both nodes printed."""
        return "\n".join(errors.read_text()[-3000:] for errors in self.errors)

    def finish(self) -> None:
        """Run to the end."""
        self.start()
        assert [node.wait(timeout=LONGEST) for node in self.nodes] == [0, 0], self.told()

    def stop(self) -> None:
        """Kill what still runs."""
        for node in self.nodes:
            if node.poll() is None:
                kill(node)

    def read(self) -> list[str]:
        """The keys of the whole run in the order of the run; a step done again must have read the same."""
        steps: dict[tuple[int, int], list[str]] = {}
        for line in "".join(file.read_text() for file in sorted(self.records.iterdir())).splitlines():
            note = json.loads(line)
            assert steps.setdefault((note["number"], note["rank"]), note["keys"]) == note["keys"]
        assert set(steps) == {(number, rank) for number in range(STEPS) for rank in range(4)}
        return [steps[n, rank][i] for n in range(STEPS) for i in range(BATCH // 4) for rank in range(4)]


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The run that nobody disturbs."""
    job = Job(tiny, tmp_path_factory.mktemp("unbroken"))
    yield job
    job.stop()


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Iterator[Job]:
    """The run that is disturbed."""
    job = Job(tiny, tmp_path)
    yield job
    job.stop()


@pytest.mark.slow
def test_every_patch_once_per_epoch_and_a_dead_node_costs_nothing(unbroken: Job, job: Job) -> None:
    unbroken.finish()
    assert len(losses(unbroken.out)) == STEPS
    order = unbroken.read()
    epochs = [order[i : i + PATCHES] for i in range(0, len(order), PATCHES)]
    assert len(epochs) == 20
    for epoch in epochs:
        assert len(set(epoch)) == PATCHES
    assert len({tuple(epoch) for epoch in epochs}) == 20  # each in an order of its own

    # Each node dies once: the one with the main process, and the other.
    saved = 0
    for dies, until in ((1, 14), (0, 30)):
        job.start()
        wait_until(lambda: images_logged(job.out) >= until * BATCH, job.nodes[0], job.errors[0])  # noqa: B023
        left = [psutil.Process(p.pid) for p in psutil.Process(job.nodes[1 - dies].pid).children(recursive=True)]
        kill(job.nodes[dies])
        died = time.monotonic()
        assert job.nodes[1 - dies].wait(timeout=SOON) not in (0, 75), job.told()
        print(f"node {1 - dies} ended {time.monotonic() - died:.1f} s after node {dies}")
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive
        assert not (job.out / "model").exists()
        assert images_saved(job.out) > saved
        saved = images_saved(job.out)
    job.finish()
    assert job.read() == order
    assert_same_bits(unbroken.out, job.out)
