"""Translation: real patches become synthetic ones of another hospital, whoever does the work; and what is beside."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from parts import make_cohort, random_images
from PIL import Image

from latent_medi.cli import main
from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import GuidanceSettings
from latent_medi.features.stain import haematoxylin
from latent_medi.metadata.schema import Schema
from latent_medi.sampling import synthetic_dataset as module
from latent_medi.sampling.settings import TranslateSettings
from latent_medi.sampling.translate import round_trip, translate, translate_images
from latent_medi.sampling.translation_baselines import compare, measures_text, stain_mappings, structure_kept
from latent_medi.sampling.translation_request import make_request
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset

SITES = ("aster", "birch", "NA")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """52 patches of 13 patients, the last of them for testing; a patient's patches are of two sites."""
    return make_cohort(tmp_path_factory.mktemp("cohort") / "data", SITES)


@pytest.fixture
def settings(cohort: PatchDataset, model: Path, tmp_path: Path) -> TranslateSettings:
    """16 patches of aster in 4 shards, batches of 4 and 1."""
    return TranslateSettings(
        data=str(cohort.folder),
        model=str(model),
        out=str(tmp_path / "out"),
        to={"site": "birch"},
        where={"site": "aster"},
        steps=4,
        strength=0.5,
        device_batch=4,
        patches_per_shard=5,
        measured=0,
    )


def files(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def test_dataset_says_what_it_is(settings: TranslateSettings, cohort: PatchDataset, model: Path) -> None:
    made = translate(settings).dataset
    rows = cohort.rows({"site": "aster", "split_main": "train"})
    real, index = cohort.index.iloc[rows], made.index
    assert len(made) == len(rows) > 10
    assert not made.verify(images=True)
    made_by = MediPipeline.from_pretrained(model).model_hash
    assert set(index["origin"]) == {"synthetic"}
    assert index["patient"].tolist() == [f"synthetic:{made_by[:12]}:{p}" for p in real["patient"]]
    assert index["translated_from"].tolist() == real["key"].tolist()
    assert index["from_patient"].tolist() == real["patient"].tolist()
    assert set(index["from_site"]) == {"aster"}
    assert set(index["site"]) == {"birch"}
    assert index["class"].tolist() == real["class"].tolist()
    pd.testing.assert_series_equal(index["age"], real["age"], check_index=False)
    assert index["age"].isna().any()
    assert not set(index["key"]) & set(cohort.index["key"])
    assert (made.patch_size, made.info["mpp"]) == (32, 0.5)
    provenance = made.info["provenance"]
    assert (provenance["kind"], provenance["model"], provenance["strength"]) == ("synthetic", made_by, 0.5)
    assert provenance["seen"] == MediPipeline.from_pretrained(model).provenance["seen"]
    assert provenance["source"]["selection"] == {"where": {"site": "aster"}, "split_main": "train"}
    images = made.read(np.arange(len(made)))
    assert not np.array_equal(images, cohort.read(rows))


def test_killed_and_resumed_gives_the_same_files(
    settings: TranslateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = translate(settings).dataset
    torn = replace(settings, out=str(tmp_path / "torn" / "out"))
    decode, calls = MediPipeline.decode, [0]

    def dying(self: MediPipeline, latents: Any) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 4:  # within the second shard
            raise KeyboardInterrupt
        return decode(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(MediPipeline, "decode", dying)
        with pytest.raises(KeyboardInterrupt):
            translate(torn)
    assert not (Path(torn.out) / "dataset.json").exists()
    written: list[int] = []
    write = module.write_shard

    def noting(folder: Path, number: int, *rest: Any) -> Any:
        written.append(number)
        return write(folder, number, *rest)

    monkeypatch.setattr(module, "write_shard", noting)
    translate(torn)
    assert written == [1, 2, 3]  # the first was there and verified
    assert files(Path(torn.out)) == files(whole.folder)
    translate(torn)
    assert written == [1, 2, 3]  # finished: nothing is made again
    with pytest.raises(UserError, match="another dataset"):
        translate(replace(torn, strength=0.75))


def test_two_processes_give_the_same_files(settings: TranslateSettings, model: Path, tmp_path: Path) -> None:
    whole = translate(settings).dataset
    barrier = threading.Barrier(2, timeout=120)

    class OneOfTwo:
        num_processes, device = 2, "cpu"

        def __init__(self, rank: int) -> None:
            self.process_index, self.is_main_process = rank, rank == 0

        def wait_for_everyone(self) -> None:
            barrier.wait()

    both = replace(settings, model="", out=str(tmp_path / "two" / "out"), measured=4)
    loaded = [MediPipeline.from_pretrained(model) for _ in range(2)]  # loading is not safe in two threads at once
    failed: list[BaseException] = []
    told: dict[int, Any] = {}

    def work(rank: int) -> None:
        try:
            told[rank] = translate(both, loaded[rank], OneOfTwo(rank)).measures  # type: ignore[arg-type]
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert files(Path(both.out)) == files(whole.folder)
    assert told[0]
    assert not told[1]  # the main process measures


def test_a_patch_does_not_depend_on_the_others(settings: TranslateSettings, tmp_path: Path) -> None:
    whole = translate(settings).dataset
    few = translate(replace(settings, out=str(tmp_path / "few"), limit=3)).dataset
    assert len(few) == 3
    assert few.index["from_patient"].nunique() == 3
    same = [whole.index["key"].tolist().index(key) for key in few.index["key"]]
    assert np.array_equal(few.read(np.arange(3)), whole.read(same))


def test_to_what_it_is_gives_the_autoencoder_s_round_trip(settings: TranslateSettings, cohort: PatchDataset) -> None:
    pipeline = MediPipeline.from_pretrained(settings.model)
    asked = make_request(settings, pipeline)
    images, source = cohort.read(asked.rows[:5]), pipeline.conditions(asked.source[:5])
    plain = round_trip(images, pipeline, 4).astype(int)
    off = []
    for refinements in (0, 10):
        how = replace(settings, strength=0.5, steps=20, refinements=refinements)
        off.append(np.abs(translate_images(images, source, source, pipeline, how).astype(int) - plain))
    assert off[1].mean() < 0.1 * off[0].mean()
    assert off[1].mean() < 0.5  # grey levels
    target = pipeline.conditions(asked.target[:5])
    moved = np.abs(translate_images(images, source, target, pipeline, how).astype(int) - plain)
    assert moved.sum() > off[1].sum()


def test_patches_that_already_are_what_is_asked_for_are_left_out(settings: TranslateSettings) -> None:
    pipeline = MediPipeline.from_pretrained(settings.model)
    asked = make_request(replace(settings, where={}), pipeline)
    sites = asked.data.index["site"].to_numpy(str)
    assert set(sites[asked.rows]) == {"aster", "NA"}
    assert asked.unchanged == (sites[asked.data.rows({"split_main": "train"})] == "birch").sum() > 0
    assert {row["site"] for row in asked.target} == {"birch"}


def test_several_fields_and_ages_can_be_changed(settings: TranslateSettings) -> None:
    wanted = replace(settings, to={"age": 70, "class": "tumour"}, limit=4, measured=4, figure_rows=2)
    wanted.figure = str(Path(settings.out).parent / "sheet.png")
    done = translate(wanted)
    assert set(done.dataset.index["class"]) == {"tumour"}
    assert set(done.dataset.index["age"]) == {70.0}
    assert {"from_class", "from_age"} <= set(done.dataset.index.columns)
    assert set(done.measures["ways"]) == {"round_trip", "no_op", "translated"}  # no stain mapping between ages
    assert Path(wanted.figure).is_file()


def test_fields_that_only_the_dataset_has_are_carried_over(settings: TranslateSettings, class_model: Path) -> None:
    made = translate(replace(settings, model=str(class_model), to={"class": "tumour"}, limit=3)).dataset
    assert made.schema.names == ("class", "site", "age")
    assert set(made.index["site"]) == {"aster"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": {"site": "birsh"}}, "closest: 'birch'"),
        ({"to": {"sites": "birch"}}, "closest: 'site'"),
        ({"to": {"age": "old"}}, "age"),
        ({"to": {}}, "Translation needs to"),
        ({"out": "", "data": ""}, "Translation needs data and out"),
        ({"where": {"site": "birch"}}, "already are site birch"),
        ({"where": {"site": "astr"}}, "closest: 'aster'"),
        ({"where": {"patient": "nobody"}}, "no patch with split_main=train, patient=nobody"),
        ({"split": "other"}, "no split 'other'"),
        ({"strength": 0.0}, r"strength .* not 0\.0"),
        ({"strength": 1.5}, r"strength .* not 1\.5"),
        ({"steps": 1}, "at least 2 steps"),
        ({"steps": 30}, "25 or 40"),
        ({"device_batch": 0}, "device_batch is 0"),
        ({"refinements": -1}, "refinements is -1"),
        ({"guidance": GuidanceSettings("chain", scales={"sit": 2.0})}, "closest: 'site'"),
        ({"adapter_scales": [1.0]}, "0 adapters and 1 adapter_scales"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(
    settings: TranslateSettings, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        translate(replace(settings, **change))
    assert not Path(settings.out).exists()


def test_models_and_patches_that_do_not_fit_are_refused(
    settings: TranslateSettings, model: Path, class_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="does not know the field 'site'"):
        translate(replace(settings, model=str(class_model)))
    pipeline = MediPipeline.from_pretrained(model)
    pipeline.provenance["mpp"] = 1.0
    with pytest.raises(UserError, match=r"trained at 1\.0"):
        translate(settings, pipeline)
    pipeline.__dict__["conditioning"] = None  # as of a model that knows no field
    with pytest.raises(UserError, match="unconditional"):
        translate(settings, pipeline)

    def dataset(name: str, size: int, site: str) -> str:
        row = {"class": "benign", "site": site, "age": "50"}
        schema = Schema.from_table(pd.DataFrame([row]), "class", ["site"], ["age"], {"age": "years"})
        image = random_images(1, size)[0]
        patches = [Patch("p0", image, "patient", "slide", 0, 0, 0.5, row)]
        return str(write_dataset(tmp_path / name, patches, name, schema, size, 0.5).folder)

    with pytest.raises(UserError, match="patches of 16 px"):
        translate(replace(settings, data=dataset("small", 16, "aster"), split=""))
    with pytest.raises(UserError, match=r"'asterr'.*closest: 'aster'"):
        translate(replace(settings, data=dataset("foreign", 32, "asterr"), split="", where={}))


def test_synthetic_patches_are_translated_only_if_asked_for(settings: TranslateSettings, tmp_path: Path) -> None:
    first = translate(replace(settings, limit=4)).dataset
    again = replace(
        settings, data=str(first.folder), out=str(tmp_path / "again"), split="", where={}, to={"site": "NA"}
    )
    with pytest.raises(UserError, match="4 of the 4 selected patches"):
        translate(again)
    second = translate(replace(again, synthetic=True, measured=2)).dataset
    assert set(second.index["from_site"]) == {"birch"}


def test_measures_and_sheet(settings: TranslateSettings, cohort: PatchDataset, tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "sheet.png"
    wanted = replace(settings, measured=8, figure=str(sheet), figure_rows=3, refinements=4)
    measures = translate(wanted).measures
    assert (measures["patches"], measures["patients"]) == (8, 8)
    assert list(measures["ways"]) == ["round_trip", "no_op", "reinhard", "macenko", "translated"]
    similar = {way: found["ssim_haematoxylin"] for way, found in measures["ways"].items()}
    assert similar["no_op"] == pytest.approx(similar["round_trip"], abs=1e-2)
    assert "translated" in measures_text(measures)
    with Image.open(sheet) as image:
        assert image.width > image.height > 300
    before = sheet.read_bytes()
    sheet.unlink()
    assert translate(wanted).measures == measures  # of the finished dataset
    assert sheet.read_bytes() == before


def test_stain_mapping_goes_to_the_target_s_colour() -> None:
    """Two flat sites in two classes: each is mapped onto the other's mean, by statistics of the pool alone."""

    class World:
        schema = Schema.from_table(pd.DataFrame({"class": ["a", "b"], "site": ["x", "y"]}), "class", ["site"])
        index = pd.DataFrame({"class": ["a", "b"] * 20, "site": ["x"] * 20 + ["y"] * 20})

        def __len__(self) -> int:
            return 40

        def read(self, rows: np.ndarray) -> np.ndarray:
            draw = np.random.default_rng(0).normal(0, 8, (40, 16, 16, 3))
            level = np.where(self.index["site"] == "x", 120, 180)[:, None, None, None]
            return np.clip(level + draw, 0, 255).astype(np.uint8)[rows]

    world: Any = World()
    rows, pool = np.array([1, 2, 38]), np.r_[4:20, 20:36]
    images = world.read(rows)
    mapped = stain_mappings(world, rows, images, {"site": "y"}, pool)
    assert list(mapped) == ["reinhard", "macenko"]
    assert images[:2].mean() == pytest.approx(119.5, abs=1)
    assert mapped["reinhard"][:2].mean() == pytest.approx(179.5, abs=2)
    assert mapped["reinhard"][2].mean() == pytest.approx(images[2].mean(), abs=1)  # it was there already
    assert stain_mappings(world, rows, images, {"site": "z"}, pool) == {}
    assert stain_mappings(world, rows, images, {"site": "y"}, pool[:4]) == {}


def test_structure_is_measured_on_haematoxylin() -> None:
    light = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.1
    density = light * torch.tensor([0.65, 0.70, 0.29]).view(1, 3, 1, 1) / 0.998

    def seen(by: float) -> np.ndarray:
        rgb = torch.pow(10.0, -by * density) * 255
        return rgb.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    images = seen(1.0)
    similar, together = structure_kept(images, images)
    np.testing.assert_allclose(similar, 1, atol=1e-5)
    np.testing.assert_allclose(together, 1, atol=1e-9)
    similar, together = structure_kept(images, seen(1.8))  # the same tissue, stained more strongly
    assert (together > 0.98).all()
    assert (similar < 0.97).all()
    similar, together = structure_kept(images, images[:, ::-1])
    assert (np.abs(together) < 0.3).all()
    glass = np.full_like(images, 255)
    assert np.isnan(structure_kept(glass, glass)[1]).all()
    told = compare(np.concatenate([images, glass]), {"same": np.concatenate([images, glass])}, np.array(list("aabb")))
    assert told["ways"]["same"]["correlation_haematoxylin"] == pytest.approx(1)
    assert compare(glass, {"same": glass}, np.array(["a", "b"]))["ways"]["same"]["correlation_haematoxylin"] is None


def test_structural_similarity_is_that_of_the_windows_inside_the_patch() -> None:
    rng = np.random.default_rng(0)
    images, others = rng.integers(0, 256, (2, 3, 16, 20, 3), dtype=np.uint8)
    a, b = (
        haematoxylin(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255)[:, 0].double().numpy()
        for x in (images, others)
    )
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    expected = np.zeros((3, 6, 10))
    for n, i, j in np.ndindex(expected.shape):  # equation 13 of Wang et al. 2004, window by window
        x, y = a[n, i : i + 11, j : j + 11], b[n, i : i + 11, j : j + 11]
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy, both = ((weights * p * q).sum() - m for p, q, m in ((x, x, mx**2), (y, y, my**2), (x, y, mx * my)))
        c1, c2 = 0.01**2, 0.03**2
        expected[n, i, j] = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    np.testing.assert_allclose(structure_kept(images, others)[0], expected.mean((1, 2)), atol=1e-5)


@pytest.mark.parametrize(
    "words", [["--to", "site=birch"], ["to.site=birch"], ["--to=site=birch"], ["--to.site", "birch"], ["to=site=birch"]]
)
def test_a_mapping_is_given_in_either_way(words: list[str]) -> None:
    read = config.parse(TranslateSettings, ["--where", "class=gleason3", "where.site=[aster, birch]", *words])
    assert read.to == {"site": "birch"}
    assert read.where == {"class": "gleason3", "site": ["aster", "birch"]}
    assert config.parse(TranslateSettings, ["--to", "site=NA", "--to", "age=60"]).to == {"site": "NA", "age": 60}
    nested = config.parse(TranslateSettings, ["--guidance.scales", "site=2", "guidance.form=chain"])
    assert nested.guidance.scales == {"site": 2.0}
    whole = config.parse(TranslateSettings, ["--to", '{"site": "a=b"}'])
    assert whole.to == {"site": "a=b"}
    with pytest.raises(UserError, match="closest: 'to'"):
        config.parse(TranslateSettings, ["--too", "site=birch"])


def test_the_verb(settings: TranslateSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["translate", f"data={settings.data}", f"model={settings.model}", f"out={tmp_path / 'cli'}", "steps=4"]
    words += ["--where", "site=aster", "limit=4", "device_batch=4", "measured=4"]
    assert main([*words, "--to", "site=birsh"]) == 2
    assert "closest: 'birch'" in capsys.readouterr().err
    assert main([*words, "--to", "site=birch", "--json", str(tmp_path / "told.json")]) == 0
    assert "SSIM of haematoxylin" in capsys.readouterr().out
    assert len(PatchDataset.open(tmp_path / "cli")) == 4
    assert '"ssim_haematoxylin"' in (tmp_path / "told.json").read_text()
