"""Unpacks the kit that it lies in and runs benchmarks/gpu.py with the node's own torch (docs/offline.md).

Needs nothing but Python. Nothing is installed: the packages that the node lacks are put on Python's path. Whatever is
written lies in the folder --work.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

KIT = Path(__file__).resolve().parent
MINIMUM = (3, 11)
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "timm": "timm",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "sklearn": "scikit-learn",
    "joblib": "joblib",
    "threadpoolctl": "threadpoolctl",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "psutil": "psutil",
    "tqdm": "tqdm",
    "diffusers": "diffusers",
    "regex": "regex",
    "filelock": "filelock",
    "fsspec": "fsspec",
}
"""Packages by what they are imported as, of the node or of the kit."""


def problem(text: str) -> SystemExit:
    """What ends the script: a message and exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    return SystemExit(2)


def unpack(archive: Path, sha256: str, folder: Path) -> None:
    """An archive of the kit into a folder, whole or not at all; not again if it lies there."""
    mark = folder.with_name(f".{folder.name}.sha256")
    if folder.is_dir() and mark.is_file() and mark.read_text() == sha256:
        return
    if not archive.is_file() or hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        raise problem(f"{archive} is damaged or missing.\n  Copy the kit again.")
    temporary = folder.with_name(folder.name + ".new")
    for old in (temporary, folder):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:xz") as tar:
            if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(temporary)
    except tarfile.CompressionError:  # a Python that was built without xz
        if os.spawnlp(os.P_WAIT, "tar", "tar", "-xJf", str(archive), "-C", str(temporary)):
            raise problem(
                "This Python and tar cannot unpack .xz.\n  Give another one: PYTHON=/path/to/python"
            ) from None
    temporary.rename(folder)
    mark.write_text(sha256)


def has(package: str, least: str) -> bool:
    """Whether the node has a package, in a version that is not too old."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return numbers(version) >= numbers(least)


def numbers(version: str) -> list[int]:
    """The numbers that a version begins with."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in found[0].split(".")] if found else []


def main() -> None:
    if sys.version_info < MINIMUM:
        raise problem(
            f"{sys.executable} is Python {sys.version.split()[0]}; {MINIMUM[0]}.{MINIMUM[1]} or newer is needed.\n"
            "  Give another one: PYTHON=/path/to/python sh start.sh"
        )
    parser = argparse.ArgumentParser(description=__doc__, epilog="All other options are those of benchmarks/gpu.py.")
    parser.add_argument("--work", type=Path, default=Path("gpu-work"), help="folder to unpack into (default gpu-work)")
    parser.add_argument("--out", type=Path, help="folder of results (default results in that of --work)")
    asked, others = parser.parse_known_args()
    contents = json.loads((KIT / "contents.json").read_text())
    work = asked.work.resolve()
    out = (asked.out or work / "results").resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name, part in contents["parts"].items():
        unpack(KIT / part["file"], part["sha256"], work / name)
    own = [
        name
        for name, package in contents["packages"].items()
        if name in contents["preferred"] or not has(name, package.get("least", ""))
    ]
    folders = [str(work / "packages" / name) for name in own]
    sys.path[:0] = folders
    importlib.invalidate_caches()
    if lacking := [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]:
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise problem(
            f"{sys.executable} lacks {', '.join(lacking)}.\n  Load the node's module for PyTorch, name its Python "
            f"(PYTHON=…), or build the kit with PYTHON_VERSION={here} PACKAGES='{' '.join(lacking)}'."
        )
    try:
        import diffusers  # noqa: F401 # it compares the versions of all that it needs
    except Exception as error:  # whatever another library's import may raise
        raise problem(f"diffusers cannot be imported here: {' '.join(str(error).split())}") from None
    repository = work / "repository"
    cache = work / "cache"
    surroundings = dict(os.environ)
    before = [entry for entry in surroundings.get("PYTHONPATH", "").split(os.pathsep) if entry]
    surroundings.update(
        PYTHONPATH=os.pathsep.join([str(repository), *folders, *before]),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(cache / "huggingface"),
        TORCH_HOME=str(cache / "torch"),
        TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"),
        TRITON_CACHE_DIR=str(cache / "triton"),
        MPLCONFIGDIR=str(cache / "matplotlib"),
        PYTHONDONTWRITEBYTECODE="1",
    )
    words = [sys.executable, str(repository / "benchmarks" / "gpu.py"), "--out", str(out)]
    words += ["--real", str(work / "real"), "--models", str(work / "models")]
    words += ["--other", str(work / "other"), *others]
    print(f"From the kit: {', '.join(own) or 'no package'}. Results: {out}", flush=True)
    os.execve(sys.executable, words, surroundings)


if __name__ == "__main__":
    main()
