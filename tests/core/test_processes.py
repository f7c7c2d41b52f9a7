"""What the commands start: it runs no file of the working folder, and ends with the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parts import random_images
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = str(Path(sys.executable).with_name("latent-medi"))
SHADOWED = (
    "accelerate",
    "cloudpickle",
    "contextvars",
    "ctypes",
    "diffusers",
    "json",
    "joblib",
    "argcomplete",
    "logging",
    "loky",
    "numpy",
    "openslide",
    "pandas",
    "PIL",
    "psutil",
    "pyarrow",
    "random",
    "re",
    "scipy",
    "secrets",
    "selectors",
    "socket",
    "tempfile",
    "tqdm",
    "yaml",
)


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A working folder whose files have names of modules, and say so if they are run; with images to import."""
    folder = tmp_path / "work"
    (folder / "images").mkdir(parents=True)
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r} + ' ')\nraise ImportError({name!r})\n"
        )
    rows = ["image,patient,class"]
    for i, image in enumerate(random_images(6)):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        rows.append(f"{i}.png,p{i},{'ab'[i % 2]}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


def surroundings(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


IMPORT = ["shards", "images", "table=table.csv", "root=images", "out=out", "source_mpp=0.5", "patch_size=32", "jobs=2"]
SLIDES = ["shards", "slides", "source=slides", "out=out", "mpp=1.0", "patch_size=64"]


@pytest.mark.parametrize("words", [IMPORT, SLIDES], ids=["images", "slides"])
@pytest.mark.parametrize(
    ("command", "path"),
    [
        ([COMMAND], str(REPOSITORY)),
        ([COMMAND], f"{REPOSITORY}{os.pathsep}"),  # as `PYTHONPATH=$PYTHONPATH:…` leaves it
        ([sys.executable, "-m", "latent_medi.cli"], str(REPOSITORY)),
    ],
    ids=["command", "empty entry", "module"],
)
def test_no_file_of_the_working_folder_is_run(
    shadowed: Path, tmp_path: Path, command: list[str], path: str, words: list[str]
) -> None:
    (shadowed / "slides").mkdir()
    (shadowed / "slides" / "broken.svs").write_bytes(b"no slide")  # its process is started, which is enough
    done = subprocess.run(
        [*command, *words], cwd=shadowed, env=surroundings(PYTHONPATH=path), capture_output=True, text=True, timeout=300
    )
    executed = tmp_path / "executed"
    assert not executed.exists(), f"{executed.read_text()}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if words is IMPORT else 2), done.stderr


def test_steps_and_launched_processes_run_none_either(shadowed: Path, tmp_path: Path) -> None:
    step = (
        "import sys; sys.path[:] = [p for p in sys.path if p not in ('', sys.argv[1])]\n"
        "from latent_medi.experiment.commands import run_in_parallel\n"
        "run_in_parallel({'step': ['audit', '--help']}, threads=1)"
    )
    launch = ["-m", "latent_medi.launch", "--config_file", str(REPOSITORY / "configs" / "accelerate" / "cpu.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "latent_medi.training", "--help"]
    for words in (["-c", step, str(shadowed)], launch):
        subprocess.run([sys.executable, *words], cwd=shadowed, env=surroundings(), check=True, timeout=300)
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


def test_a_source_tree_that_is_not_installed_starts_its_helpers_from_anywhere(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "latent_medi", tmp_path / "tree" / "latent_medi")
    program = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1]); from latent_medi.core import processes\n"
        "words = [sys.executable, '-P', '-c', 'import latent_medi; print(latent_medi.__file__)']\n"
        "subprocess.run(words, env=processes.environment(), check=True)\n"
    )
    plain = {name: value for name, value in surroundings().items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", program, str(tmp_path / "tree")]
    done = subprocess.run(words, cwd=tmp_path, env=plain, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str(tmp_path / "tree" / "latent_medi" / "__init__.py")


def test_importing_says_nothing_of_kernels_that_are_not_used(tmp_path: Path) -> None:
    said = []
    for program in (
        "from latent_medi.diffusion.pipeline import MediPipeline",
        "import latent_medi, logging; logging.getLogger('bitsandbytes.backends.cpu.ops').warning('something else')",
    ):
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, cwd=tmp_path, env=surroundings(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    assert "gemm_4bit_forward" not in said[0]
    assert "something else" in said[1]


ENDING = """
import atexit, ctypes, os, sys, threading, time
from latent_medi.core.processes import run_program
abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p)
ctypes.pythonapi.Py_AtExit(abort)  # a library that aborts once Python has ended

def main():
    atexit.register(print, "cleaned up")
    threading.Timer(0.2, print, ["thread has ended"]).start()
    print("main has ended")
    how = sys.argv[1]
    if how == "fails":
        raise RuntimeError("planted")
    if how == "exits":
        sys.exit(75)
    return int(how)

run_program(main)
"""


@pytest.mark.parametrize(("how", "code"), [("0", 0), ("3", 3), ("exits", 75), ("fails", 1)])
def test_a_library_that_aborts_at_the_end_does_not_change_the_exit_code(how: str, code: int, tmp_path: Path) -> None:
    words = [sys.executable, "-c", ENDING, how]
    done = subprocess.run(words, cwd=tmp_path, env=surroundings(), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["main has ended", "thread has ended", "cleaned up"]
    assert ("planted" in done.stderr) == (how == "fails")


def test_every_program_ends_so(tmp_path: Path) -> None:
    """With a library that aborts, as the programs are started."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes\nctypes.pythonapi.Py_AtExit(ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p))\n"
    )
    env = surroundings() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    for words in (
        ["-m", "latent_medi.cli", "--version"],
        ["-m", "latent_medi.training", "no_such_setting=1"],
        [str(REPOSITORY / "train.py"), "no_such_setting=1"],
        [str(REPOSITORY / "sample.py"), "no_such_setting=1"],
        ["-c", "from latent_medi.cli import program; program()"],
    ):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, timeout=300)
        assert done.returncode in (0, 2), (words, done.stderr)


def test_output_that_is_lost_at_the_end_is_no_success(tmp_path: Path) -> None:
    """A full disk is noticed when the last lines are written; a closed output is none of its own."""
    words = [sys.executable, "-m", "latent_medi.cli", "--version"]
    env = {name: value for name, value in surroundings().items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=tmp_path, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, "No space left on device" in done.stderr) == (2, True), done.stderr
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *words]
    done = subprocess.run(closed, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
