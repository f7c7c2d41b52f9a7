"""The same picture under two patients is found, turned or encoded again, and lies on one side of every split."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.demo.tissue import random_shape, random_stain, render
from latent_medi.metadata.schema import Schema
from latent_medi.shards.checking import likeness as likeness_module
from latent_medi.shards.checking.duplicates import duplicates_report, duplicates_text, patients_together
from latent_medi.shards.checking.likeness import close_pairs, fingerprint, likeness, shared_pictures
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.layout import FINGERPRINT, PICTURE
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings
from latent_medi.shards.writing.writer import Patch, write_dataset

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "datasets"


def encoded(image: np.ndarray, quality: int, subsampling: int = 2) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))


def view(image: np.ndarray, number: int) -> np.ndarray:
    turned = np.rot90(image, number % 4)
    return np.ascontiguousarray(turned[:, ::-1] if number >= 4 else turned)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """48 patches of procedural tissue, all in one stain."""
    stain = random_stain(np.random.default_rng(5))
    draws = [np.random.default_rng(i) for i in range(48)]
    return np.stack([render(random_shape(rng), stain, rng) for rng in draws])


def found(images: Sequence[np.ndarray], patients: Sequence[str]) -> list[int]:
    stack = np.stack(images)
    return shared_pictures([fingerprint(image) for image in stack], patients, lambda rows: stack[rows]).tolist()


def cohort(
    images: Sequence[np.ndarray], patients: Sequence[str], sites: Sequence[str] | None = None, origin: str = "real"
) -> list[Patch]:
    return [
        Patch(
            f"{p}/{i:03d}", image, p, p, -1, -1, 0.5, {"class": "ab"[i % 2], "site": sites[i] if sites else "s"}, origin
        )
        for i, (image, p) in enumerate(zip(images, patients, strict=True))
    ]


def written(folder: Path, patches: list[Patch], **more: object) -> PatchDataset:
    schema = Schema.from_table(pd.DataFrame([dict(p.fields) for p in patches]), "class", ["site"])
    return write_dataset(folder, patches, "d", schema, len(patches[0].image), 0.5, **more)  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{f"view {number}": lambda image, number=number: view(image, number) for number in range(8)},
    **{f"JPEG {quality}": lambda image, quality=quality: encoded(image, quality) for quality in (75, 90, 95)},
    "JPEG twice, turned": lambda image: view(encoded(encoded(image, 90), 75), 5),
    "a little brighter": lambda image: np.clip(image.astype(int) + 4, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_under_another_patient_is_found(tissue: np.ndarray, change: str) -> None:
    copies = [CHANGES[change](image) for image in tissue[:16]]
    patients = [f"a{i % 4}" for i in range(48)] + [f"b{i % 3}" for i in range(16)]
    numbers = found([*tissue, *copies], patients)
    assert numbers[:16] == list(range(16))
    assert numbers[16:48] == [-1] * 32
    assert numbers[48:] == list(range(16))


def test_alike_is_not_the_same(tissue: np.ndarray) -> None:
    """One stain, different tissue; overlapping neighbours of one slide; one patient's own copies; empty patches."""
    everybody = [f"p{i}" for i in range(48)]
    assert set(found(list(tissue), everybody)) == {-1}
    half = tissue.shape[1] // 2
    strip = [np.concatenate([tissue[i], tissue[i + 1]], axis=1) for i in range(0, 12, 2)]
    neighbours = [s[:, x : x + 2 * half] for s in strip for x in (0, half, 2 * half)]
    assert set(found(neighbours, [f"p{i}" for i in range(18)])) == {-1}
    assert set(found([tissue[0], tissue[0], view(tissue[0], 3)], ["p", "p", "p"])) == {-1}
    white = np.full((64, 64, 3), 243, np.uint8)
    rng = np.random.default_rng(0)
    glass = [np.clip(white + rng.normal(0, 2, white.shape), 0, 255).astype(np.uint8) for _ in range(4)]
    slope = np.clip(white - np.arange(64)[None, :, None] // 4, 0, 255).astype(np.uint8)  # uneven light
    slopes = [encoded(np.clip(slope + rng.normal(0, 1, slope.shape), 0, 255).astype(np.uint8), 90) for _ in range(4)]
    empty = [white, white, *glass, *slopes, white * 0, white * 0]
    assert set(found(empty, [f"p{i}" for i in range(len(empty))])) == {-1}


def test_every_pair_within_the_radius_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and the order along one direction leave nothing out."""
    rng = np.random.default_rng(0)
    shares = rng.random((300, 48)).astype(np.float32)
    shares[150:] = shares[:150] + rng.uniform(0, 0.06, (150, 1)).astype(np.float32) * rng.normal(size=(150, 48))
    shares /= np.linalg.norm(shares, axis=1, keepdims=True)
    owner = rng.integers(0, 40, 300)
    owner[:20] = -1
    monkeypatch.setattr(likeness_module, "_ROWS", 32)
    monkeypatch.setattr(likeness_module, "_COLUMNS", 48)
    distance = np.linalg.norm(shares[:, None].astype(float) - shares[None], axis=2)
    close = (distance <= 0.15) & ((owner[:, None] != owner) | (owner[:, None] < 0))
    sure, wanted = np.abs(distance - 0.15) > 1e-4, np.triu(close, 1)
    assert wanted.sum() > 20
    got = np.zeros_like(wanted)
    got[tuple(close_pairs(shares, owner).T)] = True
    assert np.array_equal(got & sure, wanted & sure)


def test_what_is_kept_does_not_depend_on_the_view(tissue: np.ndarray) -> None:
    for image in tissue[:8]:
        kept = {fingerprint(view(image, number))[12:] for number in range(8)}
        assert len(kept) <= 2  # but for rounding
        assert len({len(fingerprint(image)), 76}) == 1
        assert likeness(image, view(encoded(image, 75), 6)) > 0.9 > 0.5 > likeness(image, tissue[20])


@pytest.fixture
def doubled(tissue: np.ndarray, tmp_path: Path) -> PatchDataset:
    """Twelve patients of four patches; p0 and p1 share a picture, p1 and p2 another, and p5 has one twice."""
    images = [image.copy() for image in tissue]
    images[4], images[9], images[21] = images[0], view(images[5], 3), images[20]
    patients = [f"p{i // 4}" for i in range(48)]
    return written(tmp_path / "d", cohort(images, patients, ["north"] * 8 + ["south"] * 40))


def test_import_records_them(doubled: PatchDataset, caplog: pytest.LogCaptureFixture) -> None:
    told = doubled.info["duplicates"]
    assert (told["pictures"], told["patches"], told["patients"], told["same_pixels"]) == (2, 4, 3, 1)
    assert told["within_patients"] == 1
    assert told["by_class"] == {"a": 2, "b": 2}
    assert told["several_classes"] == 0
    assert told["examples"][0] == {"patches": ["p0/000", "p1/004"], "patients": ["p0", "p1"]}
    assert doubled.index.loc[doubled.index[PICTURE] >= 0, "key"].tolist() == ["p0/000", "p1/004", "p1/005", "p2/009"]
    assert patients_together(doubled.index) == [["p0", "p1", "p2"]]
    assert patients_together(doubled.index, ["p2"]) == [["p0", "p1"]]
    assert patients_together(doubled.index, ["*"]) == []
    assert "p0/000 = p1/004" in caplog.text or "p0/000 = p1/004" in duplicates_text(told)


def test_a_split_keeps_who_shares_a_picture_together(doubled: PatchDataset, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(6):
        words = ["split", str(doubled.folder), f"name=s{seed}", f"seed={seed}", "fractions={train: 0.5, test: 0.5}"]
        assert main(words) == 0
        assert "share a picture: p0, p1, p2" in capsys.readouterr().out
        index = PatchDataset.open(doubled.folder).index
        part = index.groupby("patient")[f"split_s{seed}"].first()
        assert part["p0"] == part["p1"] == part["p2"]
        assert set(part) == {"train", "test"}
    again = PatchDataset.open(doubled.folder)
    assert again.verify() == []
    told = duplicates_report(again)["splits"]["s0"]
    assert told["several_parts"] == 0
    assert sum(told["parts"].values()) == 4


def test_whole_sites_take_their_copies_along(doubled: PatchDataset) -> None:
    """p0 and p1 are at the site that is held out; p2, elsewhere, shares a picture with p1."""
    words = ["split", str(doubled.folder), "sites=[north]", "fractions={train: 0.7, val: 0.3}"]
    assert main(words) == 0
    part = PatchDataset.open(doubled.folder).index.groupby("patient")["split_main"].first()
    assert sorted(part.index[part == "test"]) == ["p0", "p1", "p2"]
    allowed = [*words, "name=allowed", "allow_duplicates=[p1]"]
    assert main(allowed) == 0
    opened = PatchDataset.open(doubled.folder)
    part = opened.index.groupby("patient")["split_allowed"].first()
    assert sorted(part.index[part == "test"]) == ["p0", "p1"]
    assert opened.info["splits"]["allowed"]["recipe"]["allow_duplicates"] == ["p1"]
    assert opened.verify() == []  # it was allowed by name
    assert duplicates_report(opened)["splits"]["allowed"]["several_parts"] == 1


def test_where_they_cannot_be_kept_together_the_split_is_refused(
    tissue: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One picture under everybody; and a scheme that goes by site, whatever patients have in common."""
    images = [image if i % 4 else tissue[0] for i, image in enumerate(tissue)]
    data = written(tmp_path / "d", cohort(images, [f"p{i // 4:02d}" for i in range(48)]))
    assert main(["split", str(data.folder)]) == 2
    error = capsys.readouterr().err
    assert "12 patients share pictures" in error
    assert "allow_duplicates='[p00, p01]'" in error
    assert main(["split", str(data.folder), "allow_duplicates=['*']"]) == 0
    sites = ["nesw"[i // 12] for i in range(48)]
    images = [image if i not in (0, 47) else tissue[0] for i, image in enumerate(tissue)]
    data = written(tmp_path / "e", cohort(images, [f"p{i // 4:02d}" for i in range(48)], sites))
    table = tmp_path / "e.csv"  # whose order of rows decides
    data.index[["slide", "patient", "class", "site"]].to_csv(table, index=False)
    medi = ["split", str(data.folder), "scheme=medi", f"table={table}", "medi_fields=[]", "medi_share=0.5"]
    assert main(medi) == 2
    error = capsys.readouterr().err
    assert "'p00/000' of 'p00' (train) and 'p11/047' of 'p11' (test)" in error
    assert PatchDataset.open(data.folder).splits == []
    assert main([*medi, "allow_duplicates=[p11]"]) == 0


def test_no_writer_records_a_split_with_a_picture_on_both_sides(
    doubled: PatchDataset, tissue: np.ndarray, tmp_path: Path
) -> None:
    parts = ["test" if p in ("p0", "p7") else "train" for p in doubled.index["patient"]]
    with pytest.raises(UserError, match=r"'main' has the same picture in several parts.*'p0/000' of 'p0' \(test\)"):
        doubled.add_split("main", parts, {})
    doubled.add_split(
        "main", ["" if p == "p0" else part for p, part in zip(doubled.index["patient"], parts, strict=True)], {}
    )
    doubled.add_split("other", parts, {"allow_duplicates": ["p0"]})
    images = [*tissue[:8], tissue[0]]
    patches = cohort(images, [*(f"p{i}" for i in range(8)), "q"])
    split = {p.patient: "test" if p.patient == "q" else "train" for p in patches}
    with pytest.raises(UserError, match="'q/008' of 'q'"):
        written(tmp_path / "e", patches, splits={"main": (split, {})})
    written(tmp_path / "e", patches, splits={"main": (split, {"allow_duplicates": ["*"]})})


def test_a_published_split_is_refused_or_allowed_by_name(tissue: np.ndarray, tmp_path: Path) -> None:
    rows = []
    for i, image in enumerate([*tissue[:6], view(tissue[2], 1)]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "patient": f"p{i}", "class": "a", "part": "train" if i < 5 else "test"})
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    settings = ImportSettings(
        table=str(tmp_path / "t.csv"), out=str(tmp_path / "d"), patch_size=64, source_mpp=0.5, split_column="part"
    )
    with pytest.raises(UserError, match=r"'main' has the same picture.*'2' of 'p2' \(train\) and '6' of 'p6' \(test\)"):
        import_images(settings)
    data = import_images(replace(settings, allow_duplicates=["p6"]))
    assert data.info["duplicates"]["pictures"] == 1
    assert data.verify() == []
    before = (data.folder / "index.parquet").stat().st_mtime_ns
    import_images(replace(settings, allow_duplicates=["p6"]))
    assert (data.folder / "index.parquet").stat().st_mtime_ns == before


def test_verify_and_audit_tell_of_them(
    doubled: PatchDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubled.add_split(
        "main",
        ["test" if p in ("p0", "p7") else "train" for p in doubled.index["patient"]],
        {"allow_duplicates": ["*"]},
    )
    for words in (["shards", "verify"], ["audit"]):
        assert main([*words, str(doubled.folder), "--json", str(tmp_path / "told.json")]) == 0
        out = capsys.readouterr().out
        assert "pictures under several patients: 2 (4 patches of 3 patients; 1 with equal pixels" in out
        assert "patches by class: a 2, b 2" in out
        assert "p0/000 = p1/004" in out
        assert "patches in split main: test 1, train 3; pictures in several parts: 1" in out
        told = json.loads((tmp_path / "told.json").read_text())["duplicates"]
        assert told["splits"]["main"] == {"parts": {"test": 1, "train": 3}, "several_parts": 1}


def test_a_folder_of_an_earlier_version(tissue: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has neither column: its patches are read when somebody asks, and a split records what was found."""
    patients = [f"p{i // 2}" for i in range(12)]
    data = written(tmp_path / "d", cohort([*tissue[:11], view(tissue[0], 2)], patients))
    crossing = ["test" if p == "p5" else "train" for p in data.index["patient"]]
    data.add_split("main", crossing, {"allow_duplicates": ["*"]})
    strip_duplicates(data.folder)
    assert PatchDataset.open(data.folder).verify() == []  # nobody looked
    assert main(["audit", str(data.folder)]) == 0
    assert "p0/000 = p5/011" in capsys.readouterr().out
    assert main(["audit", str(data.folder), "duplicates=false"]) == 0
    assert "p5/011" not in capsys.readouterr().out
    assert main(["shards", "verify", str(data.folder)]) == 2
    assert "'main' has the same picture in several parts" in capsys.readouterr().err
    assert main(["split", str(data.folder), "replace=true", "fractions={train: 0.5, test: 0.5}"]) == 0
    opened = PatchDataset.open(data.folder)
    assert opened.info["duplicates"]["pictures"] == 1
    assert opened.index.groupby("patient")["split_main"].first()[["p0", "p5"]].nunique() == 1
    assert main(["shards", "verify", str(data.folder)]) == 0


def strip_duplicates(folder: Path) -> None:
    """A folder as it was before duplicates were looked for."""
    table = pd.read_parquet(folder / "index.parquet").drop(columns=[FINGERPRINT, PICTURE])
    info = json.loads((folder / "dataset.json").read_text("utf-8"))
    for key in ("duplicates", "seal", "index_sha256"):
        info.pop(key, None)
    for split in info["splits"].values():
        split["recipe"].pop("allow_duplicates", None)
    table.to_parquet(folder / "index.parquet", index=False)
    (folder / "dataset.json").write_text(json.dumps(info), "utf-8")


def test_synthetic_patches_are_not_compared(tissue: np.ndarray, tmp_path: Path) -> None:
    """They have the copy gate."""
    images, patients = [*tissue[:4], *tissue[:4]], [f"p{i}" for i in range(8)]
    made = written(tmp_path / "d", cohort(images, patients, origin="synthetic"))
    assert "duplicates" not in made.info
    assert not {FINGERPRINT, PICTURE} & set(made.index.columns)
    patches = [*cohort(images[:4], patients[:4]), *cohort(images, patients, origin="synthetic")[4:]]
    mixed = written(tmp_path / "e", patches)
    assert mixed.info["duplicates"]["pictures"] == 0
    assert mixed.index[FINGERPRINT].tolist()[4:] == [""] * 4
    with pytest.raises(UserError, match="cannot be called 'shared_picture'"):
        written(tmp_path / "f", [replace(p, extra={PICTURE: 1}) for p in cohort(images, patients)])


@pytest.mark.slow
def test_no_two_real_biopsies_share_a_picture_and_planted_copies_are_found(shared: Path) -> None:
    folder = shared / "data" / "prostate"
    table = pd.read_csv(folder / "manifest.csv", dtype=str)
    images = np.stack([np.asarray(Image.open(folder / path).convert("RGB")) for path in table["image"]])
    small = np.stack(
        [np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS)) for image in images]
    )
    rng = np.random.default_rng(0)
    for stack in (images, small):
        rows = rng.choice(len(stack), 400, replace=False)
        copies = [view(encoded(stack[row], (75, 90, 95)[i % 3]), i % 8) for i, row in enumerate(rows)]
        numbers = np.array(found([*stack, *copies], [*table["patient"], *(f"copy {i}" for i in range(400))]))
        assert (numbers[len(stack) :] == numbers[rows]).all()
        assert (numbers[len(stack) :] >= 0).all()
        assert set(np.delete(numbers[: len(stack)], rows)) == {-1}
