"""Launched processes learn together that another job has the folder, and all end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cluster_parts import REPOSITORY, launcher

from latent_medi.core.locks import LOCK_FILE, output_lock
from latent_medi.latents.autoencoder import Autoencoder


@pytest.mark.slow
def test_two_processes_are_refused_together(tiny: Path, tmp_path: Path, autoencoder: Autoencoder) -> None:
    script = tmp_path / "verb.py"
    script.write_text("import sys\nfrom latent_medi.cli import main\nsys.exit(main())\n")
    out = tmp_path / "latents"
    words = [
        *launcher(2, 0, module="accelerate.commands.launch"),
        str(script),
        "encode",
        f"data={tiny / 'data'}",
        f"out={out}",
        f"autoencoder={autoencoder.source}",
        "reconstruction_error.patches=0",
    ]

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)

    with output_lock(out):
        refused = run()
        assert refused.returncode != 0
        assert f"{out} is being written by " in refused.stderr
        assert f"process {os.getpid()} of " in refused.stderr
        assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    done = run()
    assert done.returncode == 0, done.stderr
    assert not (out / LOCK_FILE).exists()
    assert (out / "latents.json").is_file()
