"""Each recipe on a small copy of its source's true layout."""

from __future__ import annotations

import io
import json
import os
import shlex
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from source_layouts import image_bytes, picture, write_camelyon, write_nct_crc, write_pannuke

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.tables import read_table
from latent_medi.recipes.registry import load_recipe, recipes
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import encode_image
from latent_medi.shards.writing.writer import Patch, write_dataset


def open_clean(folder: Path) -> PatchDataset:
    dataset = PatchDataset.open(folder)
    assert dataset.verify(images=True) == []
    return dataset


def test_every_recipe_is_tested_here_or_in_its_own_file() -> None:
    assert set(recipes()) == {"camelyon17-wilds", "nct-crc", "pannuke", "prostate", "tcga-tiles", "tcga-ut"}


def test_camelyon17(tmp_path: Path) -> None:
    source = write_camelyon(tmp_path / "camelyon17_v1.0")
    assert main(["shards", "camelyon17-wilds", str(source), str(tmp_path / "out"), "--patch-size", "48"]) == 0
    index = open_clean(tmp_path / "out").index
    assert index["key"].iloc[0] == "patient_004_node_4/x_3328_y_21792"
    assert index.groupby("site")["split_wilds"].first().to_dict() == {
        "centre 0": "train",
        "centre 1": "val",
        "centre 2": "test",
        "centre 3": "train",
    }
    assert index["class"].tolist()[:3] == ["normal", "tumour", "normal"]
    (source / "patches" / "patient_004_node_4" / "patch_patient_004_node_4_x_3328_y_21792.png").unlink()
    with pytest.raises(UserError, match="No such file"):
        load_recipe("camelyon17-wilds").build(source, tmp_path / "again")


def test_nct_crc(tmp_path: Path) -> None:
    source = write_nct_crc(tmp_path / "crc", classes=("ADI", "TUM"))
    assert main(["shards", "nct-crc", str(source), str(tmp_path / "out"), "--patch-size", "112"]) == 0
    dataset = open_clean(tmp_path / "out")
    assert dataset.info["mpp"] == 1.0
    assert dataset.info["splits"]["published"]["counts"]["test"]["patches"] == 4
    assert (dataset.patient_is, dataset.info["counts"]["patients"]) == ("image", 10)
    assert "each image counts as one" in dataset.patients_note
    (source / "CRC-VAL-HE-7K" / "TUMOR").mkdir()
    with pytest.raises(UserError, match="closest: 'TUM'"):
        load_recipe("nct-crc").build(source, tmp_path / "x")
    with pytest.raises(UserError, match="holds none of the folders"):
        load_recipe("nct-crc").build(source / "CRC-VAL-HE-7K", tmp_path / "x")


def test_pannuke(tmp_path: Path) -> None:
    source = write_pannuke(tmp_path / "pannuke")
    assert main(["shards", "pannuke", str(source), str(tmp_path / "out")]) == 0
    dataset = open_clean(tmp_path / "out")
    assert dataset.index["class"].tolist()[:3] == ["Breast", "Colon", "Bile-duct"]
    original = np.load(source / "Fold 2" / "images" / "fold2" / "images.npy")[3]
    row = dataset.index.index[dataset.index["key"] == "fold2/00003"][0]
    assert np.array_equal(dataset.read([row])[0], original.astype(np.uint8))
    assert set(dataset.index.loc[dataset.index["fold"] == "3", "split_published"]) == {"test"}
    assert (dataset.patient_is, dataset.index["patient"].nunique()) == ("image", 15)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    load_recipe("pannuke").build(source, tmp_path / "out", jobs=2)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    target = source / "Fold 1" / "images" / "fold1"
    np.save(target / "images.npy", np.full((5, 256, 256, 3), 300.0))
    with pytest.raises(UserError, match="Image 0 of fold 1 is not"):
        load_recipe("pannuke").build(source, tmp_path / "bad")
    np.save(target / "types.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is no plain array"):
        load_recipe("pannuke").build(source, tmp_path / "bad")


def write_tar(path: Path, samples: list[tuple[str, str]], edge: int = 256) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, label in samples:
            for ending, data in (("jpg", image_bytes(edge, "JPEG")), ("json", json.dumps({"label": label}).encode())):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


SLIDES = [
    ("TCGA-NA-A4QV-01Z-00-DX1", "Uterine_Carcinosarcoma", "train"),
    ("TCGA-E2-A14V-01Z-00-DX1", "Breast", "train"),
    ("TCGA-73-4658-01Z-00-DX1", "Lung", "valid"),
    ("TCGA-60-2706-01Z-00-DX1", "Lung", "test"),
]


def metadata(tmp_path: Path) -> tuple[Path, Path]:
    table = "case_submitter_id,gender,race,age_at_index\n"
    table += "TCGA-NA-A4QV,female,black or african american,72\nTCGA-E2-A14V,female,not reported,'--\n"
    (tmp_path / "clinical.csv").write_text(table)
    codes = "TSS Code\tSource Site\tStudy Name\tBCR\nNA\tDuke University\tU\tB\nE2\tRoswell Park\tB\tB\n"
    (tmp_path / "codes.tsv").write_text(codes + "73\tRoswell Park\tL\tB\n60\tRoswell\tL\tB\n")
    return tmp_path / "clinical.csv", tmp_path / "codes.tsv"


def check_tcga_ut(dataset: PatchDataset) -> None:
    index = dataset.index
    # The crop's size in the scanner's pixels tells hospital and class: it is a field, and not in the key.
    assert set(index["key"].str.rpartition("/")[2]) == {"0_8", "1_3"}
    assert sorted(index["scan_mpp"].unique()) == [0.2457, 0.5039]
    assert dataset.schema.field("scan_mpp").unit == "µm per pixel"
    assert dataset.schema.names == ("class", "site", "tss", "gender", "race", "age", "scan_mpp")
    assert dataset.schema.field("tss").values == ("60", "73", "E2", "NA")
    by_patient = index.drop_duplicates("patient").set_index("patient")
    assert by_patient["site"].to_dict() == {
        "TCGA-NA-A4QV": "Duke University",
        "TCGA-E2-A14V": "Roswell Park",
        "TCGA-73-4658": "Roswell Park",
        "TCGA-60-2706": "Roswell Park",
    }
    assert by_patient.loc["TCGA-NA-A4QV", ["gender", "race", "age", "tss"]].tolist() == [
        "female",
        "black or african american",
        72.0,
        "NA",
    ]
    assert by_patient.loc["TCGA-E2-A14V", "race"] == "unknown"
    assert np.isnan(by_patient.loc["TCGA-73-4658", "age"])
    assert dataset.info["mpp"] == 1.0


def test_tcga_ut_from_the_hubs_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "hub"
    for part in ("train", "valid", "test"):
        samples = [(f"{s}/{n}", label) for s, label, p in SLIDES if p == part for n in ("0_8_521", "1_3_254")]
        write_tar(source / "data" / f"dataset_internal_{part}_part000.tar", samples)
    (source / "data").rename(tmp_path / "store")  # as on a cluster: the folder of data is a link
    (source / "data").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "._dataset_internal_train_part000.tar").write_bytes(b"\0\5\x16\7")
    clinical, codes = metadata(tmp_path)
    words = ["--patch-size", "128", "--metadata", str(clinical), "--codes", str(codes)]
    assert main(["shards", "tcga-ut", str(source), str(tmp_path / "out"), *words]) == 0
    dataset = open_clean(tmp_path / "out")
    check_tcga_ut(dataset)
    assert dataset.index.groupby("patient")["split_internal"].first().to_dict() == {
        "TCGA-NA-A4QV": "train",
        "TCGA-E2-A14V": "train",
        "TCGA-73-4658": "val",
        "TCGA-60-2706": "test",
    }
    gone = source / "data" / "dataset_internal_test_part009.tar"
    gone.symlink_to(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"part009.tar cannot be used: a link to"):
        load_recipe("tcga-ut").build(source, tmp_path / "x")
    gone.unlink()
    write_tar(source / "data" / "dataset_internal_test_part001.tar", [("TCGA-E2-A14V-01Z-00-DX2/0_8_521", "Breast")])
    assert load_recipe("tcga-ut").build(source, tmp_path / "x", 128).splits == []  # not one by patient
    assert "No split 'internal': 1 patients are in several parts of it, such as TCGA-E2-A14V" in caplog.text


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tcga_ut_has_the_published_split_whatever_the_order_of_its_tars(
    shared: Path, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    tables = shared / "data" / "tcga_metadata"
    if not tables.is_dir():
        pytest.skip(f"{tables} is absent")
    published, labels = {"TCGA-NA-A4QV-01Z-00-DX9": ""}, {"TCGA-NA-A4QV-01Z-00-DX9": "Uterine_Carcinosarcoma"}
    for part, name in (("train", "train"), ("test", "holdout")):
        rows = read_table(tables / f"{name}_metadata_df_complex.csv")
        rows = rows[rows["cancer_type"].isin(["Uterine_Carcinosarcoma", "Kidney_Chromophobe"])]
        published |= dict.fromkeys(rows["slide_submitter_id"], part)
        labels |= dict(zip(rows["slide_submitter_id"], rows["cancer_type"], strict=True))
    assert Counter(published.values()) == {"train": 54 + 60, "test": 17 + 22, "": 1}
    draw = np.random.default_rng(seed)
    parts = {patient: ("train", "valid", "test")[draw.integers(3)] for patient in sorted({s[:12] for s in labels})}
    samples = [(slide, f"{slide}/{i}_0_256") for slide in sorted(labels) for i in range(2)]
    for part in ("train", "valid", "test"):
        mine = [(name, labels[slide]) for slide, name in draw.permutation(samples) if parts[slide[:12]] == part]
        write_tar(tmp_path / "hub" / f"dataset_internal_{part}_part000.tar", mine, edge=16)
    table = tables / "all_slide_metadata.csv"
    dataset = load_recipe("tcga-ut").build(tmp_path / "hub", tmp_path / "out", 16, metadata=table)
    found = dict(zip(dataset.index["slide"], dataset.index["split_medi"], strict=True))
    assert found == published
    assert "lacks 1 of 154 slides (2 patches), such as TCGA-NA-A4QV-01Z-00-DX9" in caplog.text
    assert set(dataset.index.loc[dataset.index["split_medi"] == "train", "tss"]) >= {"NA"}
    if seed:
        return
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    told = load_recipe("tcga-ut").listing(tmp_path / "hub", 16, metadata=table)
    assert (told.schema, told.counts) == (dataset.schema, [shard["count"] for shard in dataset.info["shards"]])
    columns = ["key", "patient", "slide", *dataset.schema.names, "split_internal", "split_medi"]
    assert told.index[columns].astype(str).to_numpy().tolist() == dataset.index[columns].astype(str).to_numpy().tolist()
    again = load_recipe("tcga-ut").build(tmp_path / "hub", tmp_path / "out", 16, metadata=table)
    assert again.splits == ["internal", "medi"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_a_split_of_the_users_own_called_medi_is_kept(tmp_path: Path) -> None:
    slides = [f"TCGA-{site}-A4Q{i}-01Z-00-DX1" for site in ("NA", "E2") for i in range(4)]
    write_tar(tmp_path / "hub" / "dataset_internal_train_part000.tar", [(f"{s}/0_0_256", "Lung") for s in slides], 16)
    table = tmp_path / "slides.csv"
    rows = [f"{slide},{slide[:12]},Lung,{('female', 'male')[i % 2]},white" for i, slide in enumerate(slides)]
    table.write_text("\n".join(["slide_submitter_id,case_submitter_id,class,gender,race", *rows]))
    recipe, out = load_recipe("tcga-ut"), tmp_path / "out"
    mine = ["train"] * 4 + ["probe"] * 4
    recipe.build(tmp_path / "hub", out, 16).add_split("medi", mine, {"kind": "by hand"})
    with pytest.raises(UserError, match="has a split 'medi' that is not MeDi's"):
        recipe.build(tmp_path / "hub", out, 16, metadata=table)
    assert PatchDataset.open(out).index["split_medi"].tolist() == mine


def test_a_picture_in_both_parts_of_medis_split_is_allowed_by_the_command_that_is_told(tmp_path: Path) -> None:
    slides = [f"TCGA-{site}-A4Q{i}-01Z-00-DX1" for site in ("NA", "E2") for i in range(4)]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    pixels[7] = pixels[0]  # of a training and a test patient
    (tmp_path / "hub").mkdir()
    with tarfile.open(tmp_path / "hub" / "dataset_internal_train_part000.tar", "w") as tar:
        for slide, image in zip(slides, pixels, strict=True):
            for ending, data in (("png", encode_image(image)), ("json", b'{"label": "Lung"}')):
                member = tarfile.TarInfo(f"{slide}/0_0_256.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table = tmp_path / "slides.csv"
    rows = [f"{slide},{slide[:12]},Lung,{('female', 'male')[i % 2]},white" for i, slide in enumerate(slides)]
    table.write_text("\n".join(["slide_submitter_id,case_submitter_id,class,gender,race", *rows]))
    recipe, out = load_recipe("tcga-ut"), tmp_path / "out"
    with pytest.raises(UserError, match="Split 'medi' has the same picture in several parts") as refused:
        recipe.build(tmp_path / "hub", out, 16, metadata=table)
    written = (out / "data" / "part-000000.tar").stat().st_mtime_ns
    told = refused.value.hint.split("`")[1]
    assert told.startswith("latent-medi split ")
    assert main(shlex.split(told)[1:]) == 0
    assert recipe.build(tmp_path / "hub", out, 16, metadata=table).splits == ["internal", "medi"]
    assert (out / "data" / "part-000000.tar").stat().st_mtime_ns == written


def test_tcga_ut_from_zenodos_folders(tmp_path: Path) -> None:
    source = tmp_path / "zenodo"
    for slide, label, _ in SLIDES:
        for name in ("0_8_521", "1_3_254"):
            target = source / label / "0" / slide / f"{name}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(image_bytes(256, "JPEG"))
        (source / label / "3" / slide).mkdir(parents=True)
        (source / label / "3" / slide / "0_8_900.jpg").write_bytes(image_bytes(256, "JPEG"))
        (source / label / "0" / slide / "._0_8_521.jpg").write_bytes(b"\0\5\x16\7")  # as macOS leaves it
    clinical, codes = metadata(tmp_path)
    recipe = load_recipe("tcga-ut")
    dataset = recipe.build(source, tmp_path / "out", 128, metadata=clinical, codes=codes, jobs=2)
    check_tcga_ut(open_clean(dataset.folder))
    assert dataset.splits == []
    with pytest.raises(UserError, match="scale 3 is not documented"):
        recipe.build(source, tmp_path / "x", scale=3)
    with pytest.raises(UserError, match="holds neither"):
        recipe.build(tmp_path / "out", tmp_path / "x")
    (source / "Lung" / "0" / "TCGA-73-4658-01Z-00-DX1" / "cover.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is not <slide>/<region>_<patch>_<pixels>"):
        recipe.build(source, tmp_path / "x")


def test_tcga_tiles_of_true_files(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "tcga_tiles"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    dataset = load_recipe("tcga-tiles").build(source, tmp_path / "out", 128, mpp=0.5, jobs=2)
    assert dataset.verify() == []
    assert len(dataset) == 15 * 9  # 500 µm ÷ 2 per tile, 3 × 3 patches of 64 µm
    assert set(dataset.schema.names) == {"class", "site", "tss", "gender", "race", "age"}
    assert dataset.index["tss"].tolist() == dataset.index["patient"].str[5:7].tolist()
    assert dataset.index["patient"].nunique() == dataset.index["slide"].nunique() == 15
    assert "Johns Hopkins" in set(dataset.index["site"])
    assert dataset.index["key"].str.endswith("/512_512").sum() == 15


def test_a_tcga_ut_folder_of_an_earlier_version_opens_and_made_again_it_has_the_site_code_as_a_field(
    tmp_path: Path,
) -> None:
    slide = "TCGA-NA-A4QV-01Z-00-DX1"
    path = tmp_path / "zenodo" / "Uterine_Carcinosarcoma" / "0" / slide / "0_1_256.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(image_bytes(256, "JPEG"))
    fields = {"class": "Uterine_Carcinosarcoma", "scan_mpp": "0.5"}
    patch = Patch(f"{slide}/0_1", picture(128), slide[:12], slide, -1, -1, 0.5, fields, extra={"tss": "NA"})
    schema = Schema.from_table(pd.DataFrame([fields]), "class", continuous=["scan_mpp"])
    earlier = write_dataset(tmp_path / "out", [patch], "tcga-ut", schema, 128, 1.0)
    earlier.add_split("mine", ["train"], {"kind": "by hand"})
    assert PatchDataset.open(tmp_path / "out").index["tss"].tolist() == ["NA"]
    load_recipe("tcga-ut").build(tmp_path / "zenodo", tmp_path / "out", 128)
    dataset = open_clean(tmp_path / "out")
    assert dataset.schema.field("tss").values == ("NA",)
    assert dataset.index["split_mine"].tolist() == ["train"]


def test_a_clinical_table_with_a_row_per_treatment_is_read_and_one_that_contradicts_itself_named(
    tmp_path: Path,
) -> None:
    source = tmp_path / "zenodo"
    for i, slide in enumerate(("TCGA-NA-A4QV-01Z-00-DX1", "TCGA-E2-A14V-01Z-00-DX1")):
        path = source / "Lung" / "0" / slide / f"0_{i}_256.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (256, 256), (200, 100, 150)).save(path)
    names = "cases.submitter_id\tdemographic.race\tdemographic.gender\ttreatments.treatment_type"
    rows = ["TCGA-NA-A4QV\twhite\tfemale\tRadiation", "TCGA-NA-A4QV\t'--\tfemale\tPharmaceutical"]
    clinical = tmp_path / "clinical.tsv"
    clinical.write_text("\n".join([names, *rows]))
    index = load_recipe("tcga-ut").build(source, tmp_path / "out", 128, metadata=clinical).index
    assert index.set_index("patient")["race"].to_dict() == {"TCGA-NA-A4QV": "white", "TCGA-E2-A14V": "unknown"}
    clinical.write_text("\n".join([names, *rows, "TCGA-NA-A4QV\tasian\tfemale\tSurgery"]))
    with pytest.raises(UserError, match=r"patient 'TCGA-NA-A4QV' has race asian and white \(1 such patients\)"):
        load_recipe("tcga-ut").build(source, tmp_path / "other", 128, metadata=clinical)


def test_a_recipe_run_again_keeps_splits_and_waits_for_no_pipe(tmp_path: Path) -> None:
    path = tmp_path / "zenodo" / "Lung" / "0" / "TCGA-NA-A4QV-01Z-00-DX1" / "0_1_256.jpg"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (256, 256), (200, 100, 150)).save(path)
    recipe = load_recipe("tcga-ut")
    dataset = recipe.build(tmp_path / "zenodo", tmp_path / "out", 128)
    dataset.add_split("mine", ["test"], {})
    again = recipe.build(tmp_path / "zenodo", tmp_path / "out", 64)
    assert (again.patch_size, again.index["split_mine"].tolist()) == (64, ["test"])
    again.add_selection("best", {"": np.array([True])}, {}, {})
    with pytest.raises(UserError, match="has the selections best"):
        recipe.build(tmp_path / "zenodo", tmp_path / "out", 128)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe or device"):
        recipe.build(tmp_path / "zenodo", tmp_path / "out", 128)
