"""A corpus of several datasets: without the patients of others, and with a share of the images for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_medi.core.errors import UserError
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.metadata.schema import Schema
from latent_medi.shards.checking.shared_patients import shared_patients
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.settings import JoinSettings
from latent_medi.shards.writing.join import join
from latent_medi.shards.writing.writer import Patch, write_dataset
from latent_medi.training.data import open_data
from latent_medi.training.settings import TrainSettings


def images(count: int, seed: int, edge: int) -> list[np.ndarray]:
    """Pictures with content of their own: sums of some waves."""
    draw, found = np.random.default_rng(seed), []
    y, x = np.mgrid[0:edge, 0:edge] / edge
    for _ in range(count):
        waves = sum(
            draw.normal() * np.cos(np.pi * (draw.integers(1, 7) * x + draw.integers(1, 7) * y) + draw.random())
            for _ in range(6)
        )
        grey = 130 + 30 * waves[..., None] + np.array([20.0, -20.0, 10.0])
        found.append(np.clip(grey, 0, 255).astype(np.uint8))
    return found


def folder(
    path: Path,
    pictures: list[np.ndarray],
    patients: list[str],
    patient_is: str = "patient",
    prefix: str = "",
    mpp: float = 0.5,
) -> PatchDataset:
    edge = len(pictures[0])
    patches = [
        Patch(f"{path.name}/{i}", image, prefix + patient, prefix + patient, i, 0, mpp, {"class": "a"})
        for i, (image, patient) in enumerate(zip(pictures, patients, strict=True))
    ]
    schema = Schema.from_table(pd.DataFrame({"class": ["a"]}), "class")
    return write_dataset(path, patches, path.name, schema, edge, mpp, patches_per_shard=7, patient_is=patient_is)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[PatchDataset, PatchDataset, PatchDataset]:
    """Two datasets of 40 and 20 patches of 64 px; and a labelled one, which has a patient of the first by name, and one
    picture of the second, mirrored."""
    one = folder(tmp_path / "one", images(40, 0, 64), [f"p{i // 4}" for i in range(40)])
    other = folder(tmp_path / "other", images(20, 1, 64), [f"q{i // 2}" for i in range(20)])
    labelled = images(6, 2, 64)
    labelled[0] = images(20, 1, 64)[7][:, ::-1]  # patch 7 of "other", of patient q3
    target = folder(tmp_path / "target", labelled, ["z", "z", "p2", "p2", "y", "y"])
    return one, other, target


def test_patients_are_found_by_name_and_by_picture(parts) -> None:
    one, other, target = parts
    found = shared_patients(one, [target])
    assert (found.by_name, found.by_picture) == ({"p2"}, set())
    found = shared_patients(other, [target])
    assert (found.by_name, found.by_picture) == (set(), {"q3"})


def test_the_name_of_an_image_is_no_person(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", images(4, 0, 64), ["1", "2", "3", "4"], "image")
    target = folder(tmp_path / "target", images(4, 3, 64), ["1", "2", "3", "4"], "image")
    assert shared_patients(one, [target]).all == set()


def test_pictures_are_found_in_another_size(parts, tmp_path: Path) -> None:
    _, other, _ = parts
    large = folder(tmp_path / "large", [*images(2, 5, 96), images(20, 1, 96)[7][:, ::-1]], ["a", "a", "b"])
    assert shared_patients(other, [large]).by_picture == {"q3"}


def test_a_slide_is_the_same_one_where_its_patient_is_not_known(tmp_path: Path) -> None:
    schema = Schema.from_table(pd.DataFrame({"class": ["a"]}), "class")
    patches = [
        Patch(f"k{i}", image, f"P{i // 4}", f"S{i // 2}", i, 0, 0.5, {"class": "a"})
        for i, image in enumerate(images(8, 5, 64))
    ]
    persons = write_dataset(tmp_path / "persons", patches, "persons", schema, 64, 0.5)
    slides = folder(tmp_path / "slides", images(4, 4, 64), ["S1", "S1", "P1", "other"], "slide")
    assert shared_patients(persons, [slides]).by_name == {"P0"}  # slide S1; that a slide is called P1 is chance
    assert shared_patients(slides, [persons]).by_name == {"S1"}


def test_who_shares_a_picture_with_a_patient_left_out_is_left_out(tmp_path: Path) -> None:
    pictures = images(8, 0, 64)
    pictures[4] = pictures[0][::-1]
    one = folder(tmp_path / "one", pictures, ["a", "a", "b", "b", "c", "c", "d", "d"])
    target = folder(tmp_path / "target", images(2, 3, 64), ["a", "a"])
    joined = join(JoinSettings(out=str(tmp_path / "out"), folders=[str(one.folder)], without=[str(target.folder)]))
    assert set(joined.index["patient"][joined.index["split_corpus"] == "train"]) == {"b", "d"}
    assert joined.info["splits"]["corpus"]["recipe"]["left_out"] == {"by_name": 1, "by_picture": 1}


def test_a_finished_corpus_is_not_taken_for_one_without_other_patients(parts, tmp_path: Path) -> None:
    one, other, target = parts
    common = {"out": str(tmp_path / "corpus"), "folders": [str(one.folder), str(other.folder)]}
    join(JoinSettings(**common))
    assert join(JoinSettings(**common, without=[str(target.folder)])).splits == ["corpus"]  # it had none
    before = (tmp_path / "corpus" / "dataset.json").stat().st_mtime_ns
    target.add_split("main", ["train"] * len(target), {})  # the same patients as before
    left_out = {"p2", "q3"}
    for _ in range(2):
        dataset = join(JoinSettings(**common, without=[str(target.folder)]))
        assert set(dataset.index["patient"][dataset.index["split_corpus"] == ""]) == left_out
    assert (tmp_path / "corpus" / "dataset.json").stat().st_mtime_ns == before
    third = folder(tmp_path / "third", images(2, 9, 64), ["p5", "p6"])
    with pytest.raises(UserError, match="'corpus' leaves out other patients than `without` now does"):
        join(JoinSettings(**common, without=[str(target.folder), str(third.folder)]))
    with pytest.raises(UserError, match="unlabelled names a part of the `without` folders"):
        join(JoinSettings(**common, unlabelled={"main": "train"}))


def test_a_corpus_leaves_them_out(parts, tmp_path: Path) -> None:
    one, other, target = parts
    joined = join(
        JoinSettings(
            out=str(tmp_path / "corpus"),
            folders=[str(one.folder), str(other.folder)],
            patients="separate",
            without=[str(target.folder)],
        )
    )
    out = joined.index.groupby("split_corpus")["patient"].agg(set)
    assert out[""] == {"one/p2", "other/q3"}
    assert joined.info["splits"]["corpus"]["recipe"]["left_out"] == {"by_name": 1, "by_picture": 1}
    alone = join(JoinSettings(out=str(tmp_path / "alone"), folders=[str(one.folder)], without=[str(target.folder)]))
    assert set(alone.index["patient"][alone.index["split_corpus"] == ""]) == {"p2"}
    # Of the labelled dataset itself, the patients of an unlabelled part may be trained on.
    target.add_split("main", np.where(target.index["patient"] == "y", "unlabelled", "train").tolist(), {})
    both = join(
        JoinSettings(
            out=str(tmp_path / "both"),
            folders=[str(one.folder), str(target.folder)],
            patients="separate",
            without=[str(target.folder)],
            unlabelled={"main": "unlabelled"},
        )
    )
    own = both.index[both.index["patient"].str.startswith("target/")]
    assert set(own["patient"][own["split_corpus"] == "train"]) == {"target/y"}
    assert "one/p2" not in set(both.index["patient"][both.index["split_corpus"] == "train"])
    with pytest.raises(UserError, match="nothing is left"):
        join(JoinSettings(out=str(tmp_path / "none"), folders=[str(one.folder)], without=[str(one.folder)]))


def settings(data: PatchDataset, latents: Path, **values) -> TrainSettings:
    return TrainSettings(
        data=str(data.folder), latents=str(latents), out="", split="", max_steps=1, global_batch=64, **values
    )


def test_each_folder_has_its_share_of_the_images(parts, tmp_path: Path, autoencoder: Autoencoder) -> None:
    one, other, _ = parts
    joined = join(JoinSettings(out=str(tmp_path / "corpus"), folders=[str(one.folder), str(other.folder)]))
    latents = tmp_path / "latents"
    encode_dataset(joined.folder, autoencoder, latents)

    def shares(mixture: dict[str, float]) -> float:
        data = open_data(settings(joined, latents, mixture=mixture), None)
        rows = np.concatenate([data.at(step, 64, 0) for step in range(40)])
        return float((data.rows[rows] < 40).mean())

    assert shares({"one": 1, "other": 3}) == pytest.approx(0.25, abs=0.04)
    assert shares({"one": 2, "other": 2}) == pytest.approx(0.5, abs=0.04)
    assert shares({"one": 1}) == 1.0  # who is not named is left out
    assert shares({}) == pytest.approx(2 / 3, abs=0.02)
    for mixture, why in (
        ({"two": 1.0}, "(?s)no joined folder is called 'two'.*Joined are one, other;"),
        ({"one": 0.0}, "All shares"),
    ):
        with pytest.raises(UserError, match=why):
            open_data(settings(joined, latents, mixture=mixture), None)
    encode_dataset(one.folder, autoencoder, tmp_path / "alone")
    with pytest.raises(UserError, match="is not joined"):
        open_data(settings(one, tmp_path / "alone", mixture={"one": 1.0}), None)


def test_a_corpus_of_any_resolution_has_that_of_the_tissue_to_draw(parts, tmp_path: Path) -> None:
    """A model that draws the target without having been trained on it says so of its samples."""
    one, other, target = parts
    coarse = folder(tmp_path / "coarse", images(4, 7, 64), ["c", "c", "d", "d"], mpp=2.0)
    folders = [str(coarse.folder), str(one.folder)]
    with pytest.raises(UserError, match="one mpp"):
        join(JoinSettings(str(tmp_path / "refused"), folders, without=[str(target.folder)]))
    joined = join(JoinSettings(str(tmp_path / "corpus"), folders, without=[str(target.folder)], any_mpp=True))
    assert joined.info["mpp"] == target.info["mpp"] == 0.5
    joined = join(JoinSettings(str(tmp_path / "plain"), [*folders, str(other.folder)], any_mpp=True))
    assert joined.info["mpp"] == 2.0
