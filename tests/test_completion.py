"""Completion of words in the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_medi.completion import completions


@pytest.mark.parametrize(
    ("line", "found", "not_found"),
    [
        ("tra", {"train", "translate"}, {"run"}),
        ("shards ", {"images", "verify", "tcga-ut"}, {"train"}),
        ("train --est", {"--estimate"}, set()),
        ("train --config demo/", {"demo/medi", "demo/cls"}, {"presets/8gb"}),
        ("train --config demo/medi max_", {"max_images=", "max_steps="}, set()),
        ("train --max", {"--max_images", "--max_steps"}, set()),
        ("train --mod", {"--model.fusion"}, set()),
        ("train --m", {"--model.", "--mixture"}, set()),
        ("train --model.f", {"--model.fields", "--model.fusion"}, {"--model."}),
        ("train precision=b", {"precision=bf16"}, {"precision=fp32"}),
        ("train --precision ", {"fp32", "bf16", "fp16"}, {"data="}),
        ("train compile=", {"compile=true", "compile=false"}, set()),
        ("train --data ", set(), {"out="}),
        ("train --json ", set(), {"out="}),
        ("select --filters copies out", {"outliers"}, {"out="}),
        ("select --filters copies ", {"outliers", "data="}, set()),
        ("run train.prec", {"train.precision="}, set()),
        ("evaluate data=", set(), set()),
        ("train --help max_", {"max_images"}, set()),
        ("no-such-verb ", set(), {"data="}),
    ],
)
def test_a_word_becomes_what_fits_there(line: str, found: set[str], not_found: set[str]) -> None:
    *words, prefix = line.split(" ")
    became = set(completions(words, prefix))
    assert became >= found
    assert not became & not_found
    assert all(word.startswith(prefix) for word in became)


def test_the_shell_is_answered(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    line = "latent-medi train --config demo/medi precision=b"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_COMP_WORDBREAKS": " \"'><=;|&(:"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found")}
    subprocess.run([sys.executable, "-m", "latent_medi.cli"], env=os.environ | asked, check=True, timeout=60)
    assert (tmp_path / "found").read_text() == "bf16 "  # bash takes = for the end of a word
