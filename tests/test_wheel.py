"""The package as it is built: complete in its source archive, working from its wheel without the repository.

``benchmarks/wheel.py`` installs it with everything that it needs, on several Pythons; here the packages of this
environment serve.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from latent_medi.shards.dataset import PatchDataset

ROOT = Path(__file__).resolve().parents[1]
OTHER_PYTHONS = ("3.12", "3.13")


def _benchmark() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("wheel_benchmark", ROOT / "benchmarks" / "wheel.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


benchmark = _benchmark()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(source)], check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_the_wheel_works_alone(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    there = benchmark.Installed(sys.executable, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(there.prefix)], check=True)
    # A path alone: the package that is installed for development there is not found by it.
    (there.packages() / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(there.prefix / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True)
    there.run(["python", "-c", "import latent_medi; print(latent_medi.__file__)"], "where")
    assert str(there.prefix) in (tmp_path / "where.log").read_text()

    for part in ("help", "recipe", "configuration", "processes"):
        benchmark.PARTS[part](there)

    assert PatchDataset.open(there.work / "crc").schema.field("class").values == ("adipose", "tumour")
    for name in ("one", "two"):
        assert (there.work / name / "model" / "model_index.json").is_file()
    assert "2 processes" in (tmp_path / "two.log").read_text()


@pytest.mark.slow
def test_what_the_archives_hold(built: Path, tmp_path: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"latent_medi"}
    configurations = {str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*") if p.is_file()}
    assert {f"latent_medi/{name}" for name in configurations} <= set(names)
    assert "License-Expression: Apache-2.0" in metadata
    # PyPI shows the README: it has no folder beside it.
    assert "](docs/" not in metadata
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"train.py", "sample.py", "pyproject.toml", "LICENSE", "shards/nct_crc.py"} <= inside

    context = tmp_path / "context"
    benchmark.copy_context(context)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(context)]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(tmp_path / wheel.name) as archive:
        assert set(archive.namelist()) == set(names)  # the container's package is the same


@pytest.mark.slow
@pytest.mark.parametrize("python", OTHER_PYTHONS)
def test_every_package_has_a_wheel_for(python: str, built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    words += ["--python-version", python, "--target", str(tmp_path / "none")]
    words += ["--constraint", str(ROOT / "requirements" / "constraints.txt"), "--report", str(tmp_path / "report.json")]
    words += [f"{wheel}[lora,track,slides,web,cluster,remote]"]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = {part["metadata"]["name"].lower() for part in json.loads((tmp_path / "report.json").read_text())["install"]}
    assert {"torch", "diffusers", "openslide-bin", "torchmetrics"} <= found
