"""Running a documented command in a prepared folder, at a size for tests."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

from commands import REPOSITORY

from latent_medi.cli import main

_ASSIGNMENT = re.compile(r"[A-Z_]+=")


def words_of(text: str, extra: str = "") -> list[str]:
    """A command split as by a shell: what a page leaves open (…) is left out, ``extra`` appended."""
    words: list[str] = []
    for word in shlex.split(text):
        if "…" in word:
            if word == "…" and words and words[-1] in ("--config", "--main_process_ip", "--weights"):
                words.pop()
            continue
        words.append(word)
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    return words + shlex.split(extra)


def run_here(words: list[str]) -> int:
    """Run a command's program in this process: that of each launched process where a launcher starts several."""
    try:
        return _started(words)
    except SystemExit as end:  # as --help ends
        return int(end.code or 0)


def _started(words: list[str]) -> int:
    program, rest = words[0], words[1:]
    if program == "latent-medi":
        return main(rest)
    if program == "sbatch":
        at = next(i for i, word in enumerate(rest) if word.endswith(".sh"))
        assert (REPOSITORY / rest[at]).is_file(), rest[at]
        return _launched(rest[at + 1 :])
    if (program, *rest[:1]) == ("accelerate", "launch"):
        return _by_launcher(rest[1:])
    if (program, *rest[:2]) == ("python", "-m", "latent_medi.launch"):
        return _by_launcher(rest[2:])
    assert program == "python", words
    script = REPOSITORY / rest[0]
    with mock.patch.object(sys, "argv", rest), mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
        runpy.run_path(str(script), run_name="__main__")
    return 0


def _by_launcher(words: list[str]) -> int:
    """What the launcher would start; its own options have to be options that it knows, and its file has to exist."""
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(words)
    assert options.config_file is None or (REPOSITORY / options.config_file).is_file(), options.config_file
    module = ["-m"] if options.module else []
    return _launched([*module, options.training_script, *options.training_script_args])


def _launched(words: list[str]) -> int:
    if words[0] == "-m":
        assert words[1] in ("latent_medi.cli", "latent_medi.training"), words
        return main((["train"] if words[1].endswith("training") else []) + words[2:])
    assert (REPOSITORY / words[0]).is_file(), words
    return main([words[0].removesuffix(".py"), *words[1:]])


def run_launched(words: list[str]) -> int:
    """Run a command as it stands, launcher and all, without a GPU; the folder has links to what the repository has."""
    for name in ("train.py", "sample.py", "configs"):
        if not Path(name).exists():
            Path(name).symlink_to(REPOSITORY / name)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": "hub",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(words, env=environment, timeout=600, check=False).returncode
