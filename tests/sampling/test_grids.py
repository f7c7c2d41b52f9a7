"""Pictures of what a model makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import GuidanceSettings, SamplerSettings
from latent_medi.sampling.grids import blended, contact_sheet, grid, samples_sheet
from latent_medi.sampling.settings import GridSettings


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> GridSettings:
    return GridSettings(str(model), str(tmp_path / "grid.png"), sampler=SamplerSettings(steps=2), fields={"age": "60"})


def tiles(path: Path | str, size: int = 32) -> np.ndarray:
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    return np.lib.stride_tricks.sliding_window_view(pixels, (size, size, 3))[:, :, 0]


def shows(path: Path | str, image: np.ndarray) -> bool:
    return bool((tiles(path, len(image)) == image).all((2, 3, 4)).any())


def test_a_sheet_shows_every_sample_and_begins_a_line_for_each_row_of_a_plan() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    sheet = samples_sheet(images, np.array([0, 0, 0, 0, 0, 1, 1]), {0: "one", 1: "two"}, width=3)
    wanted = contact_sheet([list(images[:3]), list(images[3:5]), list(images[5:])], ["one", "", "two"])
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(wanted))


def test_labels_are_drawn_letter_by_letter() -> None:
    patch = np.full((24, 24, 3), 255, dtype=np.uint8)
    drawn = [np.asarray(contact_sheet([[patch]], [label])) for label in ("×", "é", "ü", "Ł", "ᾱ", "…", "\U0010ffff")]
    # A font without a letter draws the same box for each.
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)


def test_a_sheet_has_its_patches_where_they_belong() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([list(images[:2]), [images[2]]], ["one", "two"], ["a", "b"]))
    found = {}
    for i, image in enumerate(images):
        windows = np.lib.stride_tricks.sliding_window_view(sheet, (16, 16, 3))[:, :, 0]
        ((y, x),) = np.argwhere((windows == image).all((2, 3, 4)))
        found[i] = (y, x)
    assert found[0][0] == found[1][0] < found[2][0]
    assert found[0][1] == found[2][1] < found[1][1]


def test_cells_hold_what_the_model_makes_of_each_pair(settings: GridSettings, model: Path) -> None:
    path = grid(settings)
    pipe = MediPipeline.from_pretrained(model)
    for tumour, site in (("benign", "aster"), ("tumour", "NA")):
        made = np.asarray(pipe(class_=tumour, site=site, age=60, steps=2, batch=16).images[0])
        near = tiles(path).astype(int) - made  # a batch of another size may round differently
        assert (np.abs(near).max((2, 3, 4)) <= 1).any()


def test_a_blend_begins_and_ends_at_its_values(settings: GridSettings, model: Path) -> None:
    pipeline = MediPipeline.from_pretrained(model)
    known = pipeline.schema.field("site")
    assert pipeline.conditioning is not None
    copied, names = blended(pipeline.conditioning, known, "aster", "NA", [0.0, 0.25, 1.0])
    rows = [{"class": "tumour", "site": name, "age": "unknown"} for name in (*names, "aster", "NA")]
    with torch.no_grad():
        vectors = copied(Conditions.from_schema(copied.schema, rows))
        before = pipeline.conditioning(Conditions.from_schema(pipeline.schema, rows[3:]))
    assert torch.equal(vectors[0], vectors[3])
    assert torch.equal(vectors[2], vectors[4])
    torch.testing.assert_close(vectors[1], 0.75 * vectors[3] + 0.25 * vectors[4])
    assert torch.equal(vectors[3:], before)  # the old values are what they were, and the model's own is untouched
    assert pipeline.schema.field("site") == known

    wanted = {"class": "tumour", **settings.fields}
    guidance = GuidanceSettings("chain", scale=2.0)
    path = grid(replace(settings, kind="blend", start="aster", stop="NA", steps=4, fields=wanted, guidance=guidance))
    ends = [
        np.asarray(pipeline(class_="tumour", site=site, age=60, steps=2, guidance=guidance).images[0])
        for site in ("aster", "NA")
    ]
    for end in ends:
        assert (np.abs(tiles(path).astype(int) - end).max((2, 3, 4)) <= 1).any()
    years = replace(
        settings, kind="blend", field="age", start="40", stop="80", fields={"class": "tumour", "site": "NA"}
    )
    assert grid(years).is_file()


def test_a_model_of_other_fields_is_asked_for_its_own(settings: GridSettings, class_model: Path) -> None:
    """rows, columns and field are there for other kinds of picture."""
    told = replace(settings, model=str(class_model), kind="trajectory", fields={"class": "tumour"}, n=1, steps=2)
    assert grid(replace(told, sampler=SamplerSettings(steps=2))).is_file()
    with pytest.raises(UserError, match="no field 'site'"):
        grid(replace(settings, model=str(class_model), fields={}))


def test_a_trajectory_ends_with_the_image(settings: GridSettings, model: Path) -> None:
    wanted = {"class": "tumour", "site": "NA", "age": "60"}
    path = grid(
        replace(settings, kind="trajectory", fields=wanted, n=2, seed=5, steps=3, sampler=SamplerSettings(steps=6))
    )
    pipe = MediPipeline.from_pretrained(model)
    last = []

    def watch(_: float, noisy: torch.Tensor, clean: torch.Tensor) -> None:
        last[:] = [noisy, clean]

    from latent_medi.diffusion.samplers import draw_noise

    noise, generators = draw_noise([5, 6], pipe.latent_shape)
    conditions = pipe.conditions([wanted] * 2)
    pipe.generate_latents(conditions, noise, SamplerSettings(steps=6), None, generators, callback=watch)
    for latents in last:
        for image in pipe.decode(latents):
            assert shows(path, image)


def test_the_verb_and_what_it_refuses(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["grid", f"model={model}", f"out={tmp_path / 'g.png'}", "sampler.steps=2", "--age", "unknown"]
    assert main(words) == 0
    assert (tmp_path / "g.png").is_file()
    for wrong, why in (
        (["rows=clas"], "closest: 'class'"),
        (["rows=site"], "rows and columns are both"),
        (["kind=blend"], "start and stop"),
        (["n=0"], "n is 0"),
        (["steps=1"], "steps is 1"),
        (["--site", "NA"], "which the picture varies"),
        (["out=a.jpg"], "must end in .png"),
        (["kind=blend", "--class", "tumour", "start=aster", "stop=birsh"], "closest: 'birch'"),
    ):
        assert main([*words, *wrong]) == 2
        assert why in capsys.readouterr().err


def test_settings_list_every_problem(settings: GridSettings) -> None:
    with pytest.raises(UserError, match=r"both 'site'.*fields gives site"):
        grid(replace(settings, rows="site", fields={"site": "NA"}))
