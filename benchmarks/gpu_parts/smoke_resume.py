"""A run that is really killed, and the same command again."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from gpu_parts.child import Context
from gpu_parts.smoke_train import patches
from latent_medi.core.processes import environment, python_words
from latent_medi.training.log import read_log

BOUNDS = {"fp32": 1e-5, "bf16": 0.02}
"""Of the loss of each update that was made twice, relative."""

AFTER = 3
"""Updates beyond the checkpoint that must have been made before the kill."""


def _start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            python_words("latent_medi.cli", *words), env=environment(), stdout=output, stderr=subprocess.STDOUT
        )


def _kill_and_resume(precision: str) -> Callable[[Context], None]:
    def row(context: Context) -> None:
        folder, out = patches(context), context.work / f"resume-{precision}"
        shutil.rmtree(out, ignore_errors=True)
        batch, every = (4, 5) if context.quick else (32, 10)
        log = context.pictures / f"resume-{precision}.log"
        log.unlink(missing_ok=True)
        words = [
            "train",
            "--config",
            "demo/medi",
            f"data={folder / 'data'}",
            f"latents={folder / 'latents'}",
            f"out={out}",
            "split=",
            "balance=[]",
            f"global_batch={batch}",
            f"max_steps={60 if context.quick else 150}",
            "lr=2e-4",
            f"log_every_images={batch}",
            f"checkpoint_every_images={every * batch}",
            f"precision={precision}",
        ]
        context.command = "latent-medi " + " ".join(words)
        process = _start(words, log)
        while process.poll() is None:
            kept = [int(path.name.partition("-")[2]) for path in (out / "checkpoints").glob("images-*")]
            seen = [int(line["images"]) for line in read_log(out / "log.csv")]
            if kept and seen and seen[-1] >= max(kept) + AFTER * batch:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        context.require(code == -signal.SIGKILL, f"the run ended with {code} before it was killed")
        before = {int(line["images"]): float(line["loss"]) for line in read_log(out / "log.csv")}
        length = log.stat().st_size
        context.require(_start(words, log).wait() == 0, "the same command did not continue the run")
        said = log.read_bytes()[length:].decode(errors="replace")
        found = re.search(r"Continuing at ([\d,]+) images", said)
        context.require(found is not None, "it began anew")
        start = int(found[1].replace(",", "")) if found else 0
        after = {int(line["images"]): float(line["loss"]) for line in read_log(out / "log.csv")}
        twice = [images for images in before if images > start and images in after]
        context.show(killed_at=max(before, default=0), resumed_at=start, compared=len(twice))
        context.require(bool(twice), "no update was made twice")
        if twice:
            context.within("difference", max(abs(after[i] / before[i] - 1) for i in twice), BOUNDS[precision])

    return row


ROWS: dict[str, Callable[[Context], None]] = {f"kill and resume {p}": _kill_and_resume(p) for p in BOUNDS}
