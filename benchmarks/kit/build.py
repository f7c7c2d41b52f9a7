"""The kit for a compute node without a connection: one folder with all that the node lacks (docs/offline.md).

    make gpu-kit REAL=/path/to/prostate MODELS=/path/to/models [OTHER=/path/to/patches] [PYTHON_VERSION=3.12]

It holds the repository at HEAD, packages for the node's Python, the weights, and the real biopsies stored as WebP:
every patch of a tumour, and of the benign ones as many as fit. OTHER, a folder of patches of other tissue, is what
`gpu.py --parts histodiffusion` pre-trains on; to make room, a tumour biopsy then gives few patches. Each part is one
archive. A kit of --limit MB or more is
not written, and the message lists the sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from latent_medi.cli import main as latent_medi
from latent_medi.core.errors import UserError
from latent_medi.core.files import sha256_file
from latent_medi.metadata.tables import read_table
from latent_medi.recipes.registry import load_recipe

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

LIMIT = 60.0  # MB (10⁶ bytes): what mail, chat and upload forms of clusters still take
BENIGN = 290
MOST = 60  # patches of a tumour biopsy, where patches of other tissue come along
PATCH_SIZE = 256
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
PACKAGES = (
    "diffusers",
    "importlib-metadata",
    "zipp",
    "huggingface-hub",
    "requests",
    "urllib3",
    "charset-normalizer",
    "idna",
    "certifi",
    "pytest",
    "pluggy",
    "iniconfig",
    "webdataset",
    "braceexpand",
    "httpx",
)
"""What a node with torch, transformers, accelerate, scikit-learn and matplotlib may still lack, or have too old:
diffusers and all that it looks for when it is imported, pytest for the tests that need a card, and webdataset for the
rates of encoding and features."""
OTHERWISE = {"huggingface-hub": "huggingface-hub<2"}
"""Other versions than the tests use: transformers before 5.20 takes no newer ones."""
PREFERRED = ("diffusers",)
"""Taken from the kit although the node has its own: this is the version that was tried."""
WEIGHTS = ("squeezenet/*.safetensors", "taef2/*.pth")


def pack(folder: Path, archive: Path) -> None:
    """A folder's files as .tar.xz; the same files give the same bytes."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False, filter=plain)


def repository(root: Path, out: Path) -> str:
    """The source tree at HEAD, with its revision in the file REVISION; returns the revision.

    Raises:
        UserError: It is no git repository.
    """
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"{root} is no git repository.", "Build the kit in a clone.")
    revision = answer.stdout.strip()
    changed = subprocess.run(["git", "-C", str(root), "status", "--porcelain"], capture_output=True, check=True).stdout
    if changed:
        print("The kit holds the last commit; what is not committed is not in it.", file=sys.stderr)
    out.mkdir()
    archive = subprocess.run(["git", "-C", str(root), "archive", revision], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(out)], input=archive, check=True)
    (out / "REVISION").write_text(revision + "\n")
    return revision


def plain_name(name: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def download(names: Sequence[str], python: str, out: Path) -> None:
    """Wheels for a Python on Linux, without what they depend on; the versions that the tests use, or :data:`OTHERWISE`.

    Raises:
        UserError: pip finds none.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--implementation", "cp", "--python-version", python, "--dest", str(out)]
    versions = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    constraints = out.parent / "constraints.txt"
    constraints.write_text("\n".join(v for v in versions if plain_name(v.partition("==")[0]) not in OTHERWISE) + "\n")
    words += ["--constraint", str(constraints)]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    asked = [OTHERWISE.get(name, name) for name in names]
    done = subprocess.run([*words, *asked], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"Packages for Python {python} cannot be downloaded: {last}", "Check --python and --package.")


def unpack_wheels(wheels: Path, names: Sequence[str], out: Path) -> dict[str, dict[str, str]]:
    """Each wheel into a folder of its own, so that the node takes only what it lacks.

    Returns:
        By package its "version", and the "least" one that others of them need, if they say so.

    Raises:
        UserError: A package has no wheel, or one that must be installed rather than unpacked.
    """
    found = {}
    for name in names:
        files = sorted(wheels.glob(f"{name.replace('-', '_')}-*.whl"))
        if not files:
            raise UserError(f"{wheels} has no wheel of {name}.", "Put one there, or leave out --wheels to download it.")
        with zipfile.ZipFile(files[0]) as wheel:
            if any(".data/" in member for member in wheel.namelist()):
                raise UserError(f"{files[0].name} cannot be used by unpacking it alone.", "Leave it out.")
            wheel.extractall(out / name)
        found[name] = {"version": files[0].name.split("-")[1]}
    for file in out.glob("*/*.dist-info/METADATA"):
        for line in file.read_text(encoding="utf-8").splitlines():
            needed = re.match(r"Requires-Dist: ([\w.-]+)[^;]*>=([\d.]+)[^;]*$", line)
            if needed and plain_name(needed[1]) in found:
                found[plain_name(needed[1])]["least"] = needed[2]
    return found


def smaller(table: pd.DataFrame, benign: int, most: int = 0) -> pd.DataFrame:
    """All patches of a tumour, or ``most`` of each biopsy, and ``benign`` others, in equal parts of each biopsy as far
    as it has them, so that the split by biopsy stays that of the whole."""
    order = table["image"].map(lambda name: hashlib.sha256(name.encode()).hexdigest())
    turn = order.groupby([table["patient"], table["class"] == "benign"]).rank()  # every biopsy's first, then its second
    tumour = (table["class"] != "benign") & (turn <= (most or len(table)))
    others = table[table["class"] == "benign"].index
    chosen = pd.DataFrame({"turn": turn, "order": order}).loc[others].sort_values(["turn", "order"]).index[:benign]
    return table[tumour | table.index.isin(chosen)]


def real_patches(source: Path, out: Path, benign: int, most: int, jobs: int) -> None:
    """The dataset folder of the real biopsies, every patch stored as WebP.

    Raises:
        UserError: The source has another layout.
    """
    table = read_table(source / "manifest.csv")
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary)
        smaller(table, benign, most).to_csv(part / "manifest.csv", index=False)
        for name in sorted({Path(image).parts[0] for image in table["image"]}):
            (part / name).symlink_to((source / name).resolve())
        load_recipe("prostate").build(part, out, patch_size=PATCH_SIZE, codec="webp", jobs=jobs)


def other_patches(source: Path, out: Path, jobs: int) -> None:
    """The dataset folder of patches of other tissue, without classes, each stored as WebP.

    Raises:
        UserError: The folder has no images.
    """
    words = ["shards", "images", f"folder={source}", f"out={out}", r"pattern=.*\.(?:jpe?g|png)", "name=other"]
    words += ["class_field=", "patient_is=image", "source_mpp=1.0", "max_bad=0.1", "codec=webp", f"jobs={jobs}"]
    if latent_medi([*words, f"patch_size={PATCH_SIZE}"]):
        raise UserError(f"{source} cannot be packed.", "OTHER=/path/to/patches, a folder of images")


def build(
    out: Path,
    real: Path,
    models: Path,
    other: Path | None = None,
    python: str = "3.12",
    packages: Sequence[str] = (),
    wheels: Path | None = None,
    benign: int = BENIGN,
    limit: float = LIMIT,
    jobs: int = 1,
    root: Path = ROOT,
) -> dict[str, int]:
    """Write the kit.

    Args:
        out: Folder to write; a kit that is there is replaced.
        real: The prostate recipe's source: manifest.csv and images.
        models: Folder with squeezenet/ and taef2/.
        other: Folder of patches of other tissue.
        python: The node's Python.
        packages: Further packages, in addition to :data:`PACKAGES`.
        wheels: Folder of wheels; by default they are downloaded.
        benign: Benign patches.
        limit: MB that the folder must stay below.
        jobs: Processes.
        root: Git repository that is packed.

    Returns:
        Bytes by file.

    Raises:
        UserError: Something is not there; or the kit is too large, with the size of each part.
    """
    if out.exists() and not (out / "start.py").is_file():
        raise UserError(f"{out} is there and is no kit.", "Name another folder.")
    weights = [file for pattern in WEIGHTS for file in sorted(models.glob(pattern))]
    if {file.parent.name for file in weights} != {"squeezenet", "taef2"}:
        raise UserError(f"{models} lacks squeezenet/*.safetensors or taef2/*.pth.", "MODELS=/path/to/weights")
    if not (real / "manifest.csv").is_file():
        raise UserError(f"{real} has no manifest.csv.", "REAL=/path/to/patches, as `latent-medi shards prostate` reads")
    out.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([*PACKAGES, *packages]))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        work, kit = Path(temporary), Path(temporary, "kit")
        kit.mkdir()
        revision = repository(root, work / "repository")
        if wheels is None:
            wheels = work / "wheels"
            download(names, python, wheels)
        versions = unpack_wheels(wheels, names, work / "packages")
        for file in weights:
            (work / "models" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, work / "models" / file.parent.name / file.name)
        real_patches(real, work / "real", benign, MOST if other else 0, jobs)
        if other is not None:
            other_patches(other, work / "other", jobs)
        parts = {}
        for name in ("repository", "packages", "models", "real", *(["other"] if other else [])):
            archive = kit / f"{name}.tar.xz"
            pack(work / name, archive)
            parts[name] = {"file": archive.name, "sha256": sha256_file(archive)}
        contents = {"revision": revision, "python": python, "parts": parts, "packages": versions}
        contents["preferred"] = list(PREFERRED)
        (kit / "contents.json").write_text(json.dumps(contents, indent=1) + "\n")
        for name in ("start.sh", "start.py"):
            shutil.copy(HERE / name, kit / name)
        shutil.copyfile(ROOT / "docs" / "offline.md", kit / "README.md")
        sizes = {file.name: file.stat().st_size for file in sorted(kit.iterdir())}
        if (total := sum(sizes.values())) >= limit * 1e6:
            sizes_text = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sizes.items())
            raise UserError(
                f"The kit would have {total / 1e6:.2f} MB, and must stay below {limit:g} MB: {sizes_text}.",
                "Take fewer benign patches (--benign), or set --limit.",
            )
        if out.exists():
            shutil.rmtree(out)
        kit.rename(out)
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kit-dist"), help="folder to write (default kit-dist)")
    parser.add_argument("--real", type=Path, required=True, help="folder with manifest.csv and the images it names")
    parser.add_argument("--models", type=Path, required=True, help="folder with squeezenet and taef2")
    parser.add_argument("--other", type=Path, help="folder of patches of other tissue, for --parts histodiffusion")
    parser.add_argument("--python", default="3.12", help="the node's Python (default 3.12)")
    parser.add_argument("--package", action="append", default=[], help="one more that the node lacks; may be repeated")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to take instead of downloading them")
    parser.add_argument("--benign", type=int, default=BENIGN, help=f"benign patches (default {BENIGN})")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"MB that the kit stays below (default {LIMIT:g})")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    asked = parser.parse_args(argv)
    try:
        sizes = build(
            asked.out,
            asked.real,
            asked.models,
            asked.other,
            asked.python,
            asked.package,
            asked.wheels,
            asked.benign,
            asked.limit,
            asked.jobs,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, size in sizes.items():
        print(f"{size / 1e6:8.2f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:8.2f} MB  in {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
