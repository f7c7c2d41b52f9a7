"""The kit for a node without a connection: what it holds, how large it may be, and that it starts from itself alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import latent_medi
from latent_medi.core.errors import UserError
from latent_medi.evaluation.provenance import git_revision
from latent_medi.shards.dataset import PatchDataset

KIT = Path(__file__).resolve().parents[2] / "benchmarks" / "kit"
CELLS = {"benign": (5, 7), "gleason3": (3, 4), "gleason4": (2, 3)}
"""Biopsies and patches of each, by class."""
NEWER = "huggingface-hub"
"""A package that is older here than diffusers needs."""
GPU = """
import json, os, sys
from importlib.metadata import version
import diffusers, lacking
given = {"words": sys.argv[1:], "diffusers": diffusers.__file__, "lacking": lacking.__file__}
given |= {"offline": os.environ["HF_HUB_OFFLINE"]}
given |= {"versions": {name: version(name) for name in ("huggingface-hub", "zipp", "pytest")}}
print(json.dumps(given))
sys.exit(7)
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kit_{name}", KIT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load("build")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small stand-ins of what a kit is made from."""
    folder = tmp_path_factory.mktemp("parts")
    rng, rows = np.random.default_rng(0), []
    (folder / "real" / "images").mkdir(parents=True)
    for tumour, (biopsies, patches) in CELLS.items():
        for site in ("karolinska", "radboud"):
            for biopsy in range(biopsies):
                for number in range(patches):
                    patient = f"{tumour}{site}{biopsy}"
                    image = f"images/{patient}_{number}.png"
                    grey = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(64, 0).repeat(64, 1)
                    Image.fromarray(grey).save(folder / "real" / image)
                    rows.append({"image": image, "patient": patient, "class": tumour, "site": site, "isup_grade": "1"})
    pd.DataFrame(rows).to_csv(folder / "real" / "manifest.csv", index=False)
    for file in ("squeezenet/squeezenet1_0.safetensors", "taef2/taef2_encoder.pth", "taef2/taef2_decoder.pth"):
        (folder / "models" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "models" / file).write_bytes(b"weights")
    (folder / "wheels").mkdir()
    for name in (*builder.PACKAGES, "lacking"):
        module = name.replace("-", "_")
        with zipfile.ZipFile(folder / "wheels" / f"{module}-9999.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}/__init__.py", "")
            needs = f"Requires-Dist: {NEWER}<99999,>=9998.0\nRequires-Dist: zipp>=0.1\n" if name == "diffusers" else ""
            wheel.writestr(f"{module}-9999.0.dist-info/METADATA", f"Name: {name}\nVersion: 9999.0\n{needs}")
    root = folder / "root"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "gpu.py").write_text(GPU)
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (root / "not committed").touch()
    return {name: folder / name for name in ("real", "models", "wheels", "root")}


def build(parts: dict[str, Path], out: Path, **changes: object) -> dict[str, int]:
    return builder.build(out=out, **{**parts, "packages": ["lacking"], "benign": 12, **changes})


@pytest.fixture(scope="module")
def kit(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kit") / "kit"
    build(parts, out)
    return out


def start(kit: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""}
    return subprocess.run(
        ["sh", str(kit / "start.sh"), *words], cwd=folder, env=surroundings, capture_output=True, text=True, check=False
    )


def test_it_starts_from_itself_alone_and_writes_into_its_folder_only(kit: Path, tmp_path: Path) -> None:
    done = start(kit, tmp_path, "--quick", "--parts", "real")
    assert done.returncode == 7, done.stderr  # gpu.py's own
    told, work = json.loads(done.stdout.splitlines()[-1]), tmp_path / "gpu-work"
    assert told["words"] == [
        "--out",
        str(work / "results"),
        "--real",
        str(work / "real"),
        "--models",
        str(work / "models"),
        "--other",
        str(work / "other"),
        "--quick",
        "--parts",
        "real",
    ]
    assert told["diffusers"] == str(work / "packages/diffusers/diffusers/__init__.py"), "the kit's, not the node's"
    assert told["lacking"] == str(work / "packages/lacking/lacking/__init__.py")
    assert told["offline"] == "1"
    assert told["versions"] == {NEWER: "9999.0", "zipp": version("zipp"), "pytest": version("pytest")}
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-work"]
    assert not (work / "repository" / "not committed").exists()
    revision = json.loads((kit / "contents.json").read_text())["revision"]
    assert (work / "repository" / "REVISION").read_text().strip() == revision
    assert (work / "models" / "taef2" / "taef2_decoder.pth").read_bytes() == b"weights"


def test_every_patch_is_webp_and_every_biopsy_stays_on_its_side(kit: Path, parts: dict[str, Path]) -> None:
    work = kit.parent / "work"
    start(kit, kit.parent, "--work", str(work))
    dataset = PatchDataset.open(work / "real")
    assert dataset.info["codec"] == "webp"
    assert dataset.patch_size == 256
    assert dataset.verify(images=True) == []
    manifest = pd.read_csv(parts["real"] / "manifest.csv", dtype=str)
    whole, here = (t.groupby("class")["patient"].agg(["size", "nunique"]) for t in (manifest, dataset.index))
    assert here.loc[["gleason3", "gleason4"]].equals(whole.loc[["gleason3", "gleason4"]])
    assert here.loc["benign"].tolist() == [12, 10], "two biopsies give two patches, and none is left out"
    recipe = builder.load_recipe("prostate")
    assert dict(zip(dataset.index["patient"], dataset.index["split_main"], strict=True)) == recipe.split_patients(
        manifest.rename(columns={"image": "path"})
    )


def test_with_other_tissue_a_tumour_biopsy_gives_fewer_patches(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "MOST", 2)
    (tmp_path / "other").mkdir()
    for number in range(3):
        image = np.full((256, 256, 3), (200, 80 + 50 * number, 160), np.uint8)
        Image.fromarray(image).save(tmp_path / "other" / f"{number}.png")
    build(parts, tmp_path / "kit", other=tmp_path / "other")
    start(tmp_path / "kit", tmp_path, "--work", str(tmp_path / "work"))
    real, other = (PatchDataset.open(tmp_path / "work" / name) for name in ("real", "other"))
    assert real.index.groupby("class")["patient"].value_counts()["gleason3"].tolist() == [2] * 6
    assert (real.index["class"] == "benign").sum() == 12
    assert len(other) == 3
    assert other.info["codec"] == "webp"


def test_it_is_unpacked_once_and_damage_is_named(kit: Path, tmp_path: Path) -> None:
    assert start(kit, tmp_path).returncode == 7
    kept = tmp_path / "gpu-work" / "repository" / "kept"
    kept.touch()
    assert start(kit, tmp_path).returncode == 7
    assert kept.exists()
    archive = kit / "models.tar.xz"
    whole = archive.read_bytes()
    try:
        archive.write_bytes(whole[:-40] + b"\0" * 40)
        done = start(kit, tmp_path, "--work", "other")
    finally:
        archive.write_bytes(whole)
    assert done.returncode == 2
    assert f"{archive} is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_node_lacks_is_named(kit: Path, tmp_path: Path) -> None:
    # An interpreter of the same Python that sees no packages but its own.
    program = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'
    (tmp_path / "bare").write_text(program)
    (tmp_path / "bare").chmod(0o755)
    done = subprocess.run(
        ["sh", str(kit / "start.sh")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": str(tmp_path / "bare"), "PYTHONPATH": ""},
    )
    assert done.returncode == 2, done.stderr
    assert "lacks torch, torchvision, transformers" in done.stderr
    assert "diffusers" not in done.stderr.split("\n")[0], "the kit has it"


def test_a_kit_that_is_too_large_is_not_written(parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must stay below 0\.001 MB: .*packages\.tar\.xz 0\.00.*real\.tar\.xz"):
        build(parts, tmp_path / "kit", limit=0.001)
    assert list(tmp_path.iterdir()) == []


def test_what_it_is_made_from_must_be_there(parts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for changes, why in (
        ({"models": tmp_path}, "lacks squeezenet"),
        ({"real": tmp_path}, "no manifest.csv"),
        ({"wheels": tmp_path}, "no wheel of diffusers"),
        ({"root": tmp_path}, "no git repository"),
    ):
        with pytest.raises(UserError, match=why):
            build({**parts, **changes}, tmp_path / "kit")
    with pytest.raises(UserError, match="is no kit"):
        build(parts, tmp_path / "mine")


def test_results_of_an_unpacked_kit_name_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_medi, "__file__", str(tmp_path / "latent_medi" / "__init__.py"))
    assert git_revision() is None
    for text, told in (("0f" * 20 + "\n", "0f" * 20), ("another program's", None)):
        (tmp_path / "REVISION").write_text(text)
        assert git_revision() == told


def test_a_python_without_xz_leaves_unpacking_to_tar(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = json.loads((kit / "contents.json").read_text())["parts"]["models"]
    monkeypatch.setitem(sys.modules, "lzma", None)
    load("start").unpack(kit / part["file"], part["sha256"], tmp_path / "models")
    assert (tmp_path / "models" / "taef2" / "taef2_encoder.pth").read_bytes() == b"weights"
