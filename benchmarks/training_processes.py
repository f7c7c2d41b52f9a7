"""Images per second of training in two processes against one, each process pinned to a core of its own.

    python benchmarks/training_processes.py [--quick] [--json FILE]

The demo's network (latents 4×16×16) at global batches of 16, 64 and 256, and UNet S (latents 4×32×32) at 8 and 64, in
fp32. One process runs what ``train.py`` does; two are started by ``accelerate launch --config_file
configs/accelerate/cpu.yaml``. Each has one thread, and the global batch is the same. They run in turns; the median
window after the first counts. Two lose to the exchange of the gradients, the optimizer and the averages, which are as
much work whatever the batch, and to whatever else the machine does: run nothing else meanwhile.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from output import options, report

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One comparison.

    Args:
        config: The training configuration.
        edge: Width and height of the latents.
        batch: Global batch.
        window: Updates between two rows of the log.
        windows: Rows of the log.
    """

    config: str
    edge: int
    batch: int
    window: int
    windows: int


JOBS = {
    "demo_16": Job("demo/medi", 16, 16, 20, 4),
    "demo_64": Job("demo/medi", 16, 64, 8, 4),
    "demo_256": Job("demo/medi", 16, 256, 3, 3),
    "unet_s_8": Job("presets/8gb", 32, 8, 2, 3),
    "unet_s_64": Job("presets/8gb", 32, 64, 1, 3),
}


def train_pinned(words: list[str]) -> int:
    """Train in this process, on the core whose number among those allowed is the process's on this machine."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0"))]})
    from latent_medi.cli import main as command

    return command(["train", *words])


def rates(settings: Path, out: Path, processes: int) -> list[float]:
    """Images per second of each window after the first."""
    from latent_medi.training.log import read_log

    script = [str(Path(__file__).resolve()), "--pinned", "--config", str(settings), f"out={out}"]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu.yaml")]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)
    return [float(row["images_per_s"]) for row in read_log(out / "log.csv")[1:]]


def compare(job: Job, folder: Path, turns: int) -> dict[str, float]:
    """Images per second of one process and of two, and their ratio."""
    from training import make_data

    from latent_medi.core import config
    from latent_medi.training.settings import TrainSettings

    make_data(folder, 256, job.edge)
    words = ["--config", job.config, f"data={folder / 'data'}", f"latents={folder / 'latents'}", "out=-"]
    settings = replace(
        config.parse(TrainSettings, [*words, "split="], "train"),
        global_batch=job.batch,
        device_batch=job.batch,
        max_images=0,
        max_steps=job.window * job.windows,
        warmup_images=0,
        log_every_images=job.window * job.batch,
        checkpoint_every_images=0,
        precision="fp32",
        compile=False,
    )
    config.save_settings(settings, folder / "train.yaml")
    seen: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(turns):
        for processes in (1, 2) if turn % 2 == 0 else (2, 1):
            seen[processes] += rates(folder / "train.yaml", folder / f"run-{turn}-{processes}", processes)
    one, two = (statistics.median(seen[processes]) for processes in (1, 2))
    return {"one_images_per_s": one, "two_images_per_s": two, "two_over_one": two / one}


def main() -> None:
    """Measure and report."""
    parser = options(__doc__, "fewer windows, one turn")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="some of them")
    arguments = parser.parse_args()
    result: dict[str, float] = {}
    for name in arguments.jobs:
        job = JOBS[name]
        quick = replace(job, window=-(-job.window // 4), windows=3) if arguments.quick else job
        with tempfile.TemporaryDirectory() as folder:
            found = compare(quick, Path(folder), 1 if arguments.quick else 2)
        result |= {f"{name}_{key}": value for key, value in found.items()}
    report(result, arguments.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pinned"]:
        sys.exit(train_pinned(sys.argv[2:]))
    main()
