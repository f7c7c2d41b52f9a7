"""What the built package does without the repository: installed from its wheel, in an environment of its own.

    python benchmarks/wheel.py --python python3.11 python3.12 python3.13 --out runs/wheel [--parts help …] [--json FILE]

For each Python: the Dockerfile's installation commands (environment, torch, dependencies, package) with a folder in
place of /opt, and then, in an empty folder, the parts:

- ``help``: the help of the program and of every verb, and ``doctor``;
- ``recipe``: NCT-CRC in its published layout, random pixels, as a dataset folder;
- ``configuration``: ``train`` and ``sample`` with the packaged demo/medi, a few updates on a small cohort;
- ``processes``: the same training in two processes, started by ``accelerate launch -m latent_medi.training``;
- ``demo``: ``latent-medi demo``, and its headline against what the demo is there to show.

Results are kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from output import report
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
UPDATES = 20
SMALL = f"max_steps={UPDATES} global_batch=8 log_every_images=80 checkpoint_every_images=160".split()
CUDA = ("nvidia", "triton")
"""Folders of an environment that torch without CUDA does not need."""


def docker_commands(dockerfile: Path) -> list[str]:
    """The commands that a Dockerfile runs, in order, without Docker's own options such as mounts."""
    text = dockerfile.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^RUN\s+(.*)$", text, re.MULTILINE)
    return [re.sub(r"--mount=\S+\s+", "", command) for command in commands]


class Installed:
    """The package in an environment of its own.

    Args:
        python: An interpreter's command.
        folder: Holds the environment, the folder that commands run in, and the finished parts' numbers.
    """

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder.resolve()
        self.python = python
        self.prefix = self.folder / "opt" / "venv"
        self.work = self.folder / "work"
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.environment["PATH"] = f"{self.prefix / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def run(self, words: Sequence[str], log: str, **extra: str) -> float:
        """Run a command in the working folder; returns its processor seconds.

        Raises:
            SystemExit: It failed; the message ends with the end of what it said.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{log}.log").open("w") as out:
            process = subprocess.Popen(words, cwd=self.work, env=self.environment | extra, stdout=out, stderr=out)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said = (self.folder / f"{log}.log").read_text(errors="replace")[-2000:]
            raise SystemExit(f"{self.python}: {' '.join(words)} ended with {process.returncode}:\n{said}")
        return usage.ru_utime + usage.ru_stime

    def latent_medi(self, *words: str, log: str) -> float:
        """Run the installed command; returns its processor seconds."""
        return self.run(["latent-medi", *words], log)

    def packages(self) -> Path:
        """The environment's folder of packages."""
        return next((self.prefix / "lib").glob("python3*")) / "site-packages"


def copy_context(out: Path) -> None:
    """Copy what the Dockerfile sees: the files of the repository that .dockerignore lets in."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    names = subprocess.run(["git", "ls-files", "-z", *let_in], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, out / name)


def install(there: Installed) -> dict[str, float]:
    """Run the Dockerfile's commands with this interpreter, and weigh what they installed."""
    build = there.folder / "build"
    shutil.rmtree(there.folder / "opt", ignore_errors=True)
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    copy_context(build)
    start = time.perf_counter()
    for number, command in enumerate(docker_commands(ROOT / "Dockerfile")):
        if "useradd" in command:  # the container's user
            continue
        command = command.replace("/opt/venv", str(there.prefix)).replace("/src", str(build))
        command = re.sub(r"^python(?= -m venv)", there.python, command)
        there.run(["sh", "-ec", command], f"install_{number}")
    seconds = time.perf_counter() - start
    shutil.rmtree(build)
    sizes = {path.name: size_of(path) for path in there.packages().iterdir()}
    whole = size_of(there.prefix)
    return {"install_s": seconds, "GB": whole, "GB_without_CUDA": whole - sum(sizes.get(name, 0.0) for name in CUDA)}


def size_of(path: Path) -> float:
    """GB (10⁹ bytes) that a file or folder takes on disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(p.stat().st_blocks * 512 for p in files) / 1e9


def help_texts(there: Installed) -> dict[str, float]:
    """Processor seconds of the program's help, and the most of any verb's."""
    top = there.latent_medi("--help", log="help")
    verbs = re.findall(r"^ {2}([a-z][a-z-]+)", (there.folder / "help.log").read_text(), re.MULTILINE)
    if len(verbs) < 20:
        raise SystemExit(f"{there.python}: the help names {len(verbs)} verbs.")
    each = [there.latent_medi(verb, "--help", log=f"help_{verb}") for verb in verbs]
    there.run(["sh", "-c", "latent-medi doctor || [ $? = 1 ]"], "doctor")
    return {"help_s": top, "longest_verb_help_s": max(each), "verbs": len(verbs)}


def recipe(there: Installed) -> dict[str, float]:
    """A recipe for a public dataset, with the published names of folders."""
    rng = np.random.default_rng(0)
    for name in ("ADI", "TUM"):
        folder = there.work / "source" / "NCT-CRC-HE-100K" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-{i}.tif")
    shutil.rmtree(there.work / "crc", ignore_errors=True)
    return {"recipe_s": there.latent_medi("shards", "nct-crc", "source", "crc", "--patch-size", "224", log="recipe")}


def small_latents(there: Installed) -> None:
    """A small cohort of the demo's tissue, and its latents."""
    if not (there.work / "latents").exists():
        shutil.rmtree(there.work / "small", ignore_errors=True)
        there.latent_medi("shards", "demo", "out=small", "scale=0.1", log="cohort")
        there.latent_medi("encode", "data=small", "autoencoder=demo", "out=latents", log="encode")


def configuration(there: Installed) -> dict[str, float]:
    """A packaged configuration, for training and then for samples."""
    small_latents(there)
    shutil.rmtree(there.work / "one", ignore_errors=True)
    words = ["--config", "demo/medi", "data=small", "latents=latents", "out=one", *SMALL]
    seconds = there.latent_medi("train", *words, log="train")
    shutil.rmtree(there.work / "samples", ignore_errors=True)
    condition = ["--class", "solid", "--site", "cedar", "--n", "4", "sampler.steps=2"]
    there.latent_medi("sample", "model=one/model", "out=samples", *condition, log="sample")
    return {"train_s": seconds}


def processes(there: Installed) -> dict[str, float]:
    """The same training in two processes, with the packaged file for the launcher."""
    small_latents(there)
    shutil.rmtree(there.work / "two", ignore_errors=True)
    file = there.packages() / "latent_medi" / "configs" / "accelerate" / "cpu.yaml"
    words = ["python", "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "latent_medi.training"]
    words += ["--config", "demo/medi", "data=small", "latents=latents", "out=two", *SMALL]
    return {"two_processes_s": there.run(words, "two", ACCELERATE_USE_CPU="true")}


def demo(there: Installed) -> dict[str, float]:
    """The demo, whose headline must show what it is there to show."""
    start = time.perf_counter()
    there.latent_medi("demo", log="demo")
    seconds = time.perf_counter() - start
    check = ROOT / "tests" / "end_to_end" / "check_headline.py"
    there.run(["python", str(check), "runs/demo/headline.json"], "demo_check")
    return {"demo_s": seconds}


PARTS: dict[str, Callable[[Installed], dict[str, float]]] = {
    "help": help_texts,
    "recipe": recipe,
    "configuration": configuration,
    "processes": processes,
    "demo": demo,
}


def main() -> None:
    """Run as the docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what is tried")
    parser.add_argument("--out", type=Path, required=True, help="folder for the environments and results")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    numbers: dict[str, float | None] = {}
    for python in options.python:
        there = Installed(python, options.out / Path(python).name)
        there.folder.mkdir(parents=True, exist_ok=True)
        for name, part in {"install": install, **{name: PARTS[name] for name in options.parts}}.items():
            done = there.folder / f"{name}.json"
            if not done.exists():
                done.write_text(json.dumps(part(there)))
            found = json.loads(done.read_text())
            numbers |= {f"{Path(python).name} {key}": value for key, value in found.items()}
            print(f"{python}: {name} {found}", file=sys.stderr, flush=True)
    report(numbers, options.json)


if __name__ == "__main__":
    main()
