"""Generation: the same plan gives the same pixels, whoever does the work and however often it is cut off."""

from __future__ import annotations

import hashlib
import signal
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import Preempted, UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import (
    AutoguidanceSettings,
    ClassifierGuidanceSettings,
    GuidanceSettings,
    SamplerSettings,
)
from latent_medi.latent_classifier.network import LatentClassifier, LatentEncoder
from latent_medi.latent_classifier.network_settings import EncoderSettings
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.training_record import was_trained_on
from latent_medi.planning.plan import write_plan
from latent_medi.sampling import synthetic_dataset as module
from latent_medi.sampling.generate import generate, generate_plan
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.shards.dataset import PatchDataset

SETTINGS = GenerateSettings(sampler=SamplerSettings(steps=2), device_batch=4, patches_per_shard=5)


@pytest.fixture
def plan() -> pd.DataFrame:
    """13 images in 3 shards, the last one short; batches of 4 and 1."""
    return pd.DataFrame(
        [
            {"class": "tumour", "site": "birch", "age": "real", "count": 7, "seed": 5},
            {"class": "benign", "site": "NA", "age": "unknown", "count": 6, "seed": 6},
        ]
    )


def files(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.fixture
def whole(plan: pd.DataFrame, model: Path, tmp_path: Path) -> PatchDataset:
    return generate_plan(plan, model, tmp_path / "whole" / "synthetic", SETTINGS)


def test_dataset_says_what_it_is(whole: PatchDataset, model: Path, schema: Schema) -> None:
    index = whole.index
    assert len(whole) == 13
    assert not whole.verify(images=True)
    assert (index["origin"] == "synthetic").all()
    made_by = MediPipeline.from_pretrained(model).model_hash
    assert set(index["patient"]) == {f"synthetic:{made_by[:12]}:{row}" for row in (0, 1)}
    assert index["plan_row"].tolist() == [0] * 7 + [1] * 6
    assert index["sample_seed"].nunique() == index["key"].nunique() == 13
    assert index["class"].tolist() == ["tumour"] * 7 + ["benign"] * 6
    assert index["age"].iloc[7:].isna().all()
    assert index["age"].iloc[:7].notna().any()
    assert whole.schema == schema
    assert (whole.patch_size, whole.info["mpp"]) == (32, 0.5)
    provenance = whole.info["provenance"]
    assert provenance["model"] == made_by
    assert provenance["sampler"]["steps"] == 2
    assert len(provenance["plan"]["rows"]) == 2
    images = whole.read(np.arange(13))
    assert len({image.tobytes() for image in images}) == 13


def test_killed_and_resumed_gives_the_same_files(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn" / "synthetic"
    decode, calls = MediPipeline.decode, [0]

    def dying(self: MediPipeline, latents: Any) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 4:  # within the second shard
            raise KeyboardInterrupt
        return decode(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(MediPipeline, "decode", dying)
        with pytest.raises(KeyboardInterrupt):
            generate_plan(plan, model, torn, SETTINGS)
    assert not (torn / "dataset.json").exists()
    written: list[int] = []
    write = module.write_shard

    def noting(folder: Path, number: int, *rest: Any) -> Any:
        written.append(number)
        return write(folder, number, *rest)

    monkeypatch.setattr(module, "write_shard", noting)
    generate_plan(plan, model, torn, SETTINGS)
    assert written == [1, 2]  # the first was there and verified
    assert files(torn) == files(whole.folder)


def test_a_writer_that_fails_ends_the_job_and_a_rerun_loses_nothing(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn" / "synthetic"
    write = module.write_shard

    def full(folder: Path, number: int, patches: Any, *rest: Any) -> Any:
        if number == 1:
            next(patches)
            raise UserError("The disk is full.")
        return write(folder, number, patches, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", full)
        with pytest.raises(UserError, match="The disk is full"):
            generate_plan(plan, model, torn, SETTINGS)
    assert not (torn / "dataset.json").exists()
    assert [p.name for p in (torn / "data").iterdir()] == ["part-000000.tar"]
    generate_plan(plan, model, torn, SETTINGS)
    assert files(torn) == files(whole.folder)


def test_damaged_shard_is_made_again(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn" / "synthetic"
    with monkeypatch.context() as patch:
        patch.setattr(module, "finish_dataset", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate_plan(plan, model, torn, SETTINGS)
    shard = torn / "data" / "part-000001.tar"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 255
    shard.write_bytes(data)
    generate_plan(plan, model, torn, SETTINGS)
    assert files(torn) == files(whole.folder)


def test_two_processes_give_the_same_files(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path
) -> None:
    barrier = threading.Barrier(2, timeout=60)

    class OneOfTwo:
        num_processes, device = 2, "cpu"

        def __init__(self, rank: int) -> None:
            self.process_index, self.is_main_process = rank, rank == 0

        def wait_for_everyone(self) -> None:
            barrier.wait()

    folder = tmp_path / "two" / "synthetic"
    loaded = [MediPipeline.from_pretrained(model) for _ in range(2)]  # loading is not safe in two threads at once
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            generate_plan(plan, loaded[rank], folder, SETTINGS, OneOfTwo(rank))  # type: ignore[arg-type]
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert files(folder) == files(whole.folder)


def test_an_image_does_not_depend_on_the_rest_of_the_plan(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path
) -> None:
    """Row 1 alone, in other batches: each image is a function of its seed and condition."""
    alone = generate_plan(plan.iloc[1:], model, tmp_path / "alone", SETTINGS)
    assert alone.index["sample_seed"].tolist() == whole.index["sample_seed"].iloc[7:].tolist()
    assert np.array_equal(alone.read(np.arange(6)), whole.read(np.arange(7, 13)))


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "ddpm"])
def test_samplers_that_draw_noise_do_so_per_sample(name: str, plan: pd.DataFrame, model: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, sampler=SamplerSettings(name, steps=3))  # type: ignore[arg-type]
    both = generate_plan(plan, model, tmp_path / "both", settings)
    alone = generate_plan(plan.iloc[1:], model, tmp_path / "alone", settings)
    assert np.array_equal(alone.read(np.arange(6)), both.read(np.arange(7, 13)))


def test_finished_dataset_returns_at_once_and_another_is_refused(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MediPipeline, "decode", None)
    before = files(whole.folder)
    assert len(generate_plan(plan, model, whole.folder, SETTINGS)) == 13
    with pytest.raises(UserError, match="another dataset"):
        generate_plan(plan.assign(seed=[8, 9]), model, whole.folder, SETTINGS)
    assert files(whole.folder) == before


def test_rows_added_at_the_end_of_a_plan_continue_a_finished_folder(
    plan: pd.DataFrame, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = pd.concat([plan, plan.iloc[:1].assign(seed=77, count=5)], ignore_index=True)
    anew = generate_plan(longer, model, tmp_path / "anew" / "synthetic", SETTINGS)
    folder = tmp_path / "grown" / "synthetic"
    generate_plan(plan, model, folder, SETTINGS)
    written: list[int] = []
    write = module.write_shard

    def noting(folder: Path, number: int, *rest: Any) -> Any:
        written.append(number)
        return write(folder, number, *rest)

    monkeypatch.setattr(module, "write_shard", noting)
    generate_plan(longer, model, folder, SETTINGS)
    assert written == [2, 3]  # the two whole shards stayed
    assert files(folder) == files(anew.folder)
    with pytest.raises(UserError, match="another dataset"):  # a plan does not become shorter
        generate_plan(plan, model, folder, SETTINGS)


def test_unfinished_dataset_of_another_plan_is_not_mixed_in(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "other" / "synthetic"
    with monkeypatch.context() as patch:
        patch.setattr(module, "finish_dataset", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate_plan(plan.assign(seed=[8, 9]), model, folder, SETTINGS)
    generate_plan(plan, model, folder, SETTINGS)
    assert files(folder) == files(whole.folder)


def test_plan_file_is_read(plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "plan.csv")
    paths = {"plan": str(tmp_path / "plan.csv"), "model": str(model), "out": str(tmp_path / "again" / "synthetic")}
    again = generate(replace(SETTINGS, **paths))
    assert files(again.folder) == files(whole.folder)
    with pytest.raises(UserError, match="model"):
        generate(replace(SETTINGS, plan="plan.csv", out="out"))


def test_a_picture_of_another_kind_is_refused_first(plan: pd.DataFrame, model: Path, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "plan.csv")
    paths = {"plan": str(tmp_path / "plan.csv"), "model": str(model), "out": str(tmp_path / "made")}
    with pytest.raises(UserError, match=r"x\.jpg must end in \.png"):
        generate(replace(SETTINGS, **paths, grid=str(tmp_path / "x.jpg")))
    assert not (tmp_path / "made").exists()


def test_jpeg_on_request(plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path) -> None:
    made = generate_plan(plan, model, tmp_path / "jpeg", replace(SETTINGS, codec="jpg"))
    assert made.info["codec"] == made.info["provenance"]["codec"] == "jpg"
    rows = np.arange(len(made))
    apart = np.abs(made.read(rows).astype(int) - whole.read(rows).astype(int))
    assert 0 < apart.mean() < 6
    shard = next((tmp_path / "jpeg").rglob("*.tar"))
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".jpg"))
        data = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert data.startswith(b"\xff\xd8")
    assert b"origin=synthetic" in data


def test_class_model_leaves_the_site_out_knowingly(plan: pd.DataFrame, class_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'site'"):
        generate_plan(plan, class_model, tmp_path / "a", SETTINGS)
    dataset = generate_plan(plan, class_model, tmp_path / "b", replace(SETTINGS, ignore=["site", "age"]))
    assert dataset.schema.names == ("class",)
    assert dataset.index["class"].tolist() == ["tumour"] * 7 + ["benign"] * 6


def test_guidance_is_used_and_checked_first(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = replace(SETTINGS, guidance=GuidanceSettings("chain", scale=3.0))
    guided = generate_plan(plan, model, tmp_path / "guided", chain)
    assert not np.array_equal(guided.read(np.arange(13)), whole.read(np.arange(13)))
    monkeypatch.setattr(MediPipeline, "generate_latents", None)
    bad = (
        (plan, replace(SETTINGS, guidance=GuidanceSettings("chain", scales={"sit": 2.0})), "sit"),
        (plan, replace(SETTINGS, sampler=SamplerSettings("ddim", steps=7)), "ddim"),
        (plan.assign(count=0), SETTINGS, "every count is 0"),
        (plan.assign(site="astor"), SETTINGS, "astor"),
    )
    for asked, settings, words in bad:
        with pytest.raises(UserError, match=words):
            generate_plan(asked, model, tmp_path / "bad", settings)
    with pytest.raises(UserError, match="device_batch is 0"):
        replace(SETTINGS, device_batch=0)
    assert not (tmp_path / "bad").exists()


def test_a_full_memory_halves_the_batch_and_goes_on(
    plan: pd.DataFrame,
    model: Path,
    whole: PatchDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real, sizes = MediPipeline.generate_latents, []

    def small(self: MediPipeline, conditions: Any, noise: torch.Tensor, *rest: Any, batch: int, **named: Any) -> Any:
        sizes.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, conditions, noise, *rest, batch=batch, **named)

    monkeypatch.setattr(MediPipeline, "generate_latents", small)
    limit = 2
    made = generate_plan(plan, model, tmp_path / "small" / "synthetic", SETTINGS)
    assert sizes[:2] == [4, 2]
    assert set(sizes[1:]) == {2}  # once is enough, for all shards
    assert "going on with batches of 2" in caplog.text
    assert made.index["key"].tolist() == whole.index["key"].tolist()
    assert np.abs(made.read(np.arange(13)).astype(int) - whole.read(np.arange(13))).max() <= 1
    limit = 0
    with pytest.raises(UserError, match="too small for one image"):
        generate_plan(plan, model, tmp_path / "none", SETTINGS)


def test_a_notice_keeps_what_is_finished(
    plan: pd.DataFrame, model: Path, whole: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = MediPipeline.decode, [0]

    def noticed(self: MediPipeline, latents: Any) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 4:  # within the second shard
            signal.raise_signal(signal.SIGTERM)
        return decode(self, latents)

    folder = tmp_path / "told" / "synthetic"
    with monkeypatch.context() as patch:
        patch.setattr(MediPipeline, "decode", noticed)
        with pytest.raises(Preempted, match="SIGTERM"):
            generate_plan(plan, model, folder, SETTINGS)
    assert sorted(p.name for p in (folder / "data").iterdir()) == ["part-000000.tar"]
    generate_plan(plan, model, folder, SETTINGS)
    assert files(folder) == files(whole.folder)


def test_one_combination_without_a_plan(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: PatchDataset
) -> None:
    """As a person tries a model: fields by their own names, a picture, no dataset."""
    words = ["sample", f"model={model}", "--class", "tumour", "--site=birch", "--age", "61", "--n", "3"]
    words += ["sampler.steps=2", "device_batch=4", "--grid", str(tmp_path / "out.png")]
    assert main(words) == 0
    with Image.open(tmp_path / "out.png") as picture:
        first = np.asarray(picture)
    assert first.shape[0] >= 32
    assert first.shape[1] >= 3 * 32
    assert list(tmp_path.iterdir()) == [tmp_path / "out.png"] or not (tmp_path / "data").exists()
    assert main([*words, f"out={tmp_path / 'kept'}"]) == 0
    kept = PatchDataset.open(tmp_path / "kept")
    assert (kept.index["site"] == "birch").all()
    assert kept.index["age"].tolist() == [61.0] * 3
    with Image.open(tmp_path / "out.png") as picture:
        assert np.array_equal(np.asarray(picture), first)
    patch = kept.read([0])[0]
    found = [
        (y, x)
        for y in range(first.shape[0] - 31)
        for x in range(first.shape[1] - 31)
        if np.array_equal(first[y : y + 32, x : x + 32], patch)
    ]
    assert len(found) == 1  # the picture holds the patch itself
    for wrong, why in (
        (["--site", "birhc"], "closest: 'birch'"),
        (["--sit", "birch"], "closest: 'site'"),
        (["plan=x.csv"], "plan and n"),
        (["--grid", ""], "out"),
        (["--grid", "a.jpg"], "must end in .png"),
        (["--n", "385"], "holds 384 patches, not 385"),
    ):
        assert main([*words, *wrong]) == 2
        assert why in capsys.readouterr().err


UNSEEN = ["tumour", "birch", 1]  # a combination that the model was not shown, and a number of patches


def test_a_weaker_model_guides(plan: pd.DataFrame, model: Path, class_model: Path, tmp_path: Path) -> None:
    pipeline = MediPipeline.from_pretrained(model)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(0.9)
    pipeline.provenance["seen"] = {"complete": True, "parts": [{"fields": ["class", "site"], "rows": [UNSEEN]}]}
    pipeline.save_pretrained(tmp_path / "weak")
    guided = replace(SETTINGS, autoguidance=AutoguidanceSettings(str(tmp_path / "weak"), 2.0))
    made = generate_plan(plan, model, tmp_path / "guided", guided)
    plain = generate_plan(plan, model, tmp_path / "plain", SETTINGS)
    assert not np.array_equal(made.read(np.arange(13)), plain.read(np.arange(13)))
    told = made.info["provenance"]["autoguidance"]
    assert told == {"model": pipeline.model_hash, "scale": 2.0, "interval": [0.0, 1.0]}
    assert "autoguidance" not in plain.info["provenance"]
    # What guides has been shown something too.
    asked = dict(zip(("class", "site"), UNSEEN[:2], strict=True))
    assert was_trained_on(made.info["provenance"]["seen"], asked) is True
    assert was_trained_on(plain.info["provenance"]["seen"], asked) is False
    assert was_trained_on(plain.info["provenance"]["seen"], {"class": "tumour", "site": "aster"}) is True
    with pytest.raises(UserError, match="another fields"):
        generate_plan(
            plan, model, tmp_path / "no", replace(guided, autoguidance=AutoguidanceSettings(str(class_model)))
        )


def make_classifier(folder: Path, model: Path, scale: float = 1.0) -> Path:
    """A random classifier of the class, for the model's latents."""
    pipeline = MediPipeline.from_pretrained(model)
    torch.manual_seed(5)
    settings = EncoderSettings(
        block_out_channels=[16, 32], attention=[False, False], attention_head_dim=16, norm_num_groups=8
    )
    classifier = LatentClassifier(
        LatentEncoder(settings, 4, 8, 2),
        settings,
        pipeline.latent_shape,
        "class",
        ("benign", "tumour"),
        pipeline.objective,
        pipeline.shift,
        scale * pipeline.scale,
        pipeline.autoencoder.hash,
    )
    classifier.save_pretrained(folder)
    return folder


def test_a_classifier_guides_a_model_that_knows_no_field(
    plan: pd.DataFrame, unconditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan[["class", "count", "seed"]]
    with pytest.raises(UserError, match="'class'"):
        generate_plan(plan, unconditional, tmp_path / "no", SETTINGS)
    folder = make_classifier(tmp_path / "classifier", unconditional)
    guided = replace(SETTINGS, classifier=ClassifierGuidanceSettings(str(folder), 8.0))
    made = generate_plan(plan, unconditional, tmp_path / "guided", guided)
    assert made.index["class"].tolist() == ["tumour"] * 7 + ["benign"] * 6
    assert made.schema.class_field is not None
    told = made.info["provenance"]["classifier"]
    assert (told["field"], told["scale"], told["interval"]) == ("class", 8.0, [0.005, 1.0])
    assert told["model"] == LatentClassifier.from_pretrained(folder).hash
    assert (
        was_trained_on(made.info["provenance"]["seen"], {"class": "tumour", "site": "birch"}) is None
    )  # it does not say
    # Each image is guided to its own class: the other one gives another image, and no guidance a third.
    other = generate_plan(plan.assign(**{"class": ["benign", "tumour"]}), unconditional, tmp_path / "other", guided)
    still = replace(guided, classifier=ClassifierGuidanceSettings(str(folder), 0.0))
    none = generate_plan(plan, unconditional, tmp_path / "none", still)
    images = [d.read(np.arange(13)) for d in (made, other, none)]
    assert not any((a == b).all((1, 2, 3)).any() for a, b in ((images[0], images[1]), (images[0], images[2])))
    # An image does not depend on what else is in its batch.
    alone = generate_plan(plan.iloc[1:], unconditional, tmp_path / "alone", guided)
    assert np.array_equal(alone.read(np.arange(6)), images[0][7:])
    for rows, why in (
        (plan.assign(**{"class": ["tumor", "benign"]}), "closest: 'tumour'"),
        (plan.assign(**{"class": ["", "benign"]}), "row 1: class is ''"),
        (plan.drop(columns="class"), "row 1: class is ''"),
    ):
        with pytest.raises(UserError, match=why):
            generate_plan(rows, unconditional, tmp_path / "bad", guided)
    wrong = make_classifier(tmp_path / "wrong", unconditional, scale=2.0)
    with pytest.raises(UserError, match="cannot guide this model: the scale"):
        generate_plan(
            plan, unconditional, tmp_path / "bad", replace(guided, classifier=ClassifierGuidanceSettings(str(wrong)))
        )
    assert not (tmp_path / "bad").exists()


def test_a_picture_alone_is_made_by_one_process(model: Path, tmp_path: Path) -> None:
    class OneOfTwo:
        num_processes, process_index, is_main_process, device = 2, 1, False, "cpu"

    asked = replace(SETTINGS, model=str(model), n=2, fields={"class": "tumour"}, grid=str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="one process"):
        generate(asked, OneOfTwo())  # type: ignore[arg-type]
    assert not (tmp_path / "a.png").exists()
