"""The page stands alone, escapes everything, renders what is there and computes nothing."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_world import World
from flips import flips
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.core.files import write_sealed
from latent_medi.core.records import encode
from latent_medi.evaluation.downstream.protocol_tables import protocol_text
from latent_medi.evaluation.downstream.registry import REAL
from latent_medi.evaluation.results import metrics_of, read_metrics
from latent_medi.image_classifier.comparison import (
    METRICS,
    ClassifierComparison,
    ClassifierDifferences,
    ComparedClassifiers,
    conclusion,
)
from latent_medi.report import figures
from latent_medi.report.answer import answer
from latent_medi.report.colour import colour_table, sentence
from latent_medi.report.figures import image_uri, short
from latent_medi.report.heat import training_table
from latent_medi.report.page import bounds, distance, flat, kid, number, percent, share
from latent_medi.report.patches import montage
from latent_medi.report.render import render, render_report
from latent_medi.report.settings import SECTIONS, ReportSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.intervals import Estimate
from latent_medi.statistics.seeds import MeanOverSeeds

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


@pytest.fixture(scope="session")
def page_text(small_world: World, evaluated: dict[str, Any]) -> str:
    out = small_world.root / "full"
    return render_report(out / "metrics.json", out / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(page_text: str) -> None:
    page = _Page(page_text)
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", page_text)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            # Besides pictures inside the file there are links to its own sections.
            assert value is None or value.startswith(("data:image/png;base64,", "#"))
    assert "url(" not in page_text
    assert "@import" not in page_text
    assert not page.all("script")
    assert any("default-src 'none'" in str(a.get("content")) for a in page.all("meta"))


def test_images_are_images_and_described(page_text: str) -> None:
    images = _Page(page_text).all("img")
    assert len(images) > 20
    for attributes in images:
        assert attributes["alt"]
        data = base64.b64decode(str(attributes["src"]).partition(",")[2])
        assert min(Image.open(io.BytesIO(data)).size) > 20


def test_the_verdict_comes_first_and_numbers_are_those_of_the_file(page_text: str, evaluated: dict[str, Any]) -> None:
    text = " ".join(_Page(page_text).text.split())
    assert text.index(evaluated["headline"]["verdict"]["sentence"]) < text.index("Table 1.")
    for arm in ("medi", "stain_transfer", "oracle"):
        assert f"{evaluated['headline']['accuracy_shift'][arm]:.3f}" in text
    assert evaluated["run"]["command"] in text
    assert evaluated["encoders"]["filters"]["fingerprint"][:16] in text
    assert "not estimable" in text
    for section in ("What the data lack", "Are the samples right?", "Does it help?", "How these numbers were made"):
        assert section in text


def test_held_out_and_unseen_combinations_are_marked(page_text: str) -> None:
    page = _Page(page_text)
    assert sum("held" in str(a.get("class")).split() for a in page.all("td")) == 1
    # stripes × south, and south × frozen for each class
    # and the two combinations at the top.
    assert sum(a.get("class") == "tag" for a in page.all("span")) == 4 + 2
    assert "Also held out: south × frozen." in " ".join(page.text.split())
    assert "compared on test patients, and training has none of them." in " ".join(page.text.split())


def test_what_training_has_of_a_combination_is_not_hidden(evaluated: dict[str, Any], tmp_path: Path) -> None:
    """With unseen=false a combination that is judged may have training patches; and warnings stand with the verdict."""
    changed = copy.deepcopy(evaluated)
    info = changed["dataset"]
    row, column = info["classes"].index("stripes"), info["sites"].index("south")
    info["counts"]["patches"]["train"][row][column] = 1234
    changed["headline"]["warnings"] = ["Look out: <b>."]
    changed["headline"]["distance_per_class"]["left_out"] = {"rings": "medi: 12 samples match, fewer than 20"}
    text = render_report(metrics_of(changed), tmp_path / "report.html").read_text()
    page = " ".join(_Page(text).text.split())
    assert "1234" in page
    assert "training has none" not in page
    assert page.index("Look out: <b>.") < page.index("Table 1.")
    assert "Per class, not compared: rings (medi: 12 samples match, fewer than 20)." in page


ANSWERS = [("useful", "Yes:"), ("may be useful", "Perhaps:"), ("not shown", "Not shown:"), ("not useful", "No:")]


@pytest.mark.parametrize(("found", "begins"), [*ANSWERS, ("no verdict", "Not known:")])
def test_the_page_begins_with_question_answer_and_numbers(
    evaluated: dict[str, Any], tmp_path: Path, found: str, begins: str
) -> None:
    changed = copy.deepcopy(evaluated)
    changed["headline"]["verdict"]["answer"] = found
    metrics = metrics_of(changed)
    said = answer(metrics)
    assert said.question.endswith("?")
    assert said.sentence.startswith(begins)
    gain = metrics.downstream["filters"].differences["medi"]["stain_transfer"].accuracy_shift
    ratio = metrics.fidelity["filters"].unseen.ratio
    shown = metrics.adherence["filters"].fields["class"].synthetic["medi"]
    points = number(gain.times(100), 1, sign=True)
    assert [each.value for each in said.numbers] == [f"{points} points", number(ratio, 2), percent(shown)]
    assert said.numbers[1].interval == f"95 % interval {bounds(ratio, 2)}"
    assert "not estimable" in said.numbers[0].interval


def test_a_probe_that_fails_on_real_patches_judges_no_samples(evaluated: dict[str, Any]) -> None:
    changed = copy.deepcopy(evaluated)
    found = changed["adherence"]["filters"]["fields"]["class"]
    found["real"]["value"] = found["chance"] + 0.05
    said = answer(metrics_of(changed)).numbers[2]
    assert said.value == "not known"
    assert percent(found["real"]["value"]) in said.meaning
    assert percent(found["chance"]) in said.meaning


def test_an_evaluation_without_a_classifier_begins_with_how_near_samples_are(evaluated: dict[str, Any]) -> None:
    changed = copy.deepcopy(evaluated) | {"downstream": {}}
    changed["headline"]["findings"] = ["As found."]
    ratio = changed["fidelity"]["filters"]["unseen"]["ratio"]
    for interval, begins in (([0.1, 0.3], "Nearer"), ([1.1, 1.3], "Farther"), ([0.9, 1.1], "It is not shown")):
        ratio |= {"value": 0.2, "interval": interval}
        said = answer(metrics_of(changed))
        assert said.sentence.startswith(begins)
        assert said.exact == ["As found."]
    ratio |= {"interval": None}
    assert answer(metrics_of(changed)).sentence == "As found."
    said = answer(metrics_of(changed), "A classifier says so.")
    assert said.sentence == "A classifier says so."
    assert "image classifier" in said.question


def test_words_are_explained_with_the_glossarys_text(page_text: str) -> None:
    page = _Page(page_text)
    asked = {str(a["popovertarget"]) for a in page.all("button")}
    given = [str(a["id"]) for _, a in page.tags if "popover" in a]
    assert asked == set(given)
    assert len(given) == len(asked) > 15
    rows = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
    meaning = re.search(r"^\| KID \| (.+) \|$", rows, re.MULTILINE)
    assert meaning
    assert page.text.count(meaning[1]) == 2  # where it is pointed at, and in the list at the end
    assert page.text.count("The same model conditioned on the class alone.") == 3  # and CLS after the answer


def test_every_section_is_in_the_contents(page_text: str) -> None:
    page = _Page(page_text)
    sections = [str(a["id"]) for a in page.all("section")]
    links = [str(a["href"]) for a in page.all("a") if a["href"] != "#top"]
    assert links == 2 * [f"#{name}" for name in sections]  # beside the text, and folded on a telephone
    assert len(sections) > 8


def test_pictures_have_a_scale_and_counts(page_text: str) -> None:
    text = " ".join(_Page(page_text).text.split())
    assert "MeDi 0.5 µm per pixel 5 µm" in text
    # Bars are as long as in the pictures: 5 of 16 µm, and each of four patches is 32 px of 4 · 32 + 3 · 2.
    width = 100 * 5 / 16 * 32 / 134
    bars = [a for a in _Page(page_text).all("span") if a.get("class") == "bar"]
    assert {a["style"] for a in bars} == {f"width: {width:.3f}%"}
    assert "30 patches, 10 patients" in text  # stripes × south among test patches
    assert "any site" in text  # of a model that knows the class alone


def test_training_counts_of_many_sites_are_a_list_with_marks(evaluated: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(evaluated)
    info = changed["dataset"]
    info["sites"] = [f"hospital {i}" for i in range(138)] + ["south"]
    rng = np.random.default_rng(0)
    for unit, most in (("patches", 400), ("patients", 30)):
        info["counts"][unit] = {k: rng.integers(0, most, (3, 139)).tolist() for k in info["counts"][unit]}
    info["counts"]["patches"]["train"][0][5] = info["counts"]["patients"]["train"][0][5] = 0
    info["counts"]["patches"]["train"][1][5], info["counts"]["patients"]["train"][1][5] = 50, 9
    shown = training_table(metrics_of(changed))
    assert shown is not None
    assert (shown.long, shown.columns, len(shown.rows)) == (True, info["classes"], 139)
    assert shown.rows[0][0] == "south"  # the site of a held-out combination
    assert [cell.mark for cell in shown.rows[0][1]][2] == "held"
    cells = dict(shown.rows)["hospital 5"]
    assert [cell.mark for cell in cells][:2] == ["none", "thin"]
    text = " ".join(_Page(render_report(metrics_of(changed), tmp_path / "r.html").read_text()).text.split())
    assert "All 139 sites are in the list" in text
    assert "hospital 137" in text


def test_it_fits_a_telephone_and_paper(page_text: str) -> None:
    page = _Page(page_text)
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    assert "@media print" in page_text
    # Every table says how it fits: as a list, with few columns, as tiles, or as a small matrix or grid.
    kinds = {"stack", "fit", "tiles", "matrix", "grid"}
    assert all(len(kinds & set(str(a.get("class")).split())) == 1 for a in page.all("table"))


def test_colour_and_colour_free_stand_side_by_side(evaluated: dict[str, Any]) -> None:
    metrics = metrics_of(evaluated)
    shown = colour_table(metrics)
    assert shown is not None
    for row in shown.rows:
        assert row.colour or row.without
    ratios = [metrics.fidelity[name].unseen.ratio for name in ("filters", "filters:haematoxylin")]
    # Without colour this baseline may be as near as real patients are: there is no ratio to show.
    assert [shown.rows[0].colour, shown.rows[0].without] == [ratio if ratio.value else None for ratio in ratios]
    assert ratios[0].value
    alone = copy.deepcopy(evaluated)
    del alone["encoders"]["filters:haematoxylin"]
    assert colour_table(metrics_of(alone)) is None


@pytest.mark.parametrize(
    ("colour", "without", "said"),
    [
        (0.2, 0.6, "between CLS and real patches in colour and 40 % without: 50 % of the gain survives"),
        (0.2, 0.1, "in colour and 90 % without: all of the gain survives"),
        (0.5, 1.1, "in colour and −10 % without: none of the gain survives"),
        (1.2, 1.1, "no gain in colour that could be lost"),
        (1.2, 0.9, "a gain only without colour"),
    ],
)
def test_what_survives_without_colour_in_words(
    evaluated: dict[str, Any], colour: float, without: float, said: str
) -> None:
    metrics = copy.deepcopy(evaluated)
    for name, value in (("filters", colour), ("filters:haematoxylin", without)):
        metrics["fidelity"][name]["unseen"]["ratio"]["value"] = value
    assert said in sentence(metrics_of(metrics), "filters", REAL)


@pytest.mark.parametrize("answer", ["useful", "may be useful", "not shown", "not useful", "no verdict"])
def test_no_gain_is_claimed_where_the_verdict_says_of_none(
    evaluated: dict[str, Any], tmp_path: Path, answer: str
) -> None:
    changed = copy.deepcopy(evaluated)
    changed["headline"]["verdict"]["answer"] = answer
    claims = [changed["fidelity"][name]["unseen"]["ratio"] for name in ("filters", "filters:haematoxylin")]
    for ratio in claims:
        ratio["value"] = 0.2
    text = _Page(render_report(metrics_of(changed), tmp_path / "report.html").read_text()).text.lower()
    gained = answer in ("useful", "may be useful")
    assert ("survives" in text) == gained
    assert bool(re.search(r"\bgain", text)) == gained


def test_memorised_pairs_are_the_patches_that_the_metrics_name(
    full: dict[str, Any], small_world: World, tmp_path: Path
) -> None:
    page = render_report(metrics_of(full), tmp_path / "r.html").read_text()
    text = " ".join(_Page(page).text.split())
    assert "23.3 %" in text  # the copy rate
    assert "14.0 % to 35.0 %" in text
    assert "By the same rule 0.8 % of the patches of real patients" in text
    assert "2 further pairs are not shown" in text
    real, medi = PatchDataset.open(small_world.real), PatchDataset.open(small_world.medi)
    listed = full["memorisation"]["filters"]["synthetic"]["medi"]["listed"]
    for item in listed[:12]:
        row = np.flatnonzero(medi.index["key"] == item["synthetic_key"])
        assert image_uri(medi.read(row)[0]) in page
        assert image_uri(real.read([item["train_row"]])[0]) in page
    assert image_uri(medi.read(np.flatnonzero(medi.index["key"] == listed[12]["synthetic_key"]))[0]) not in page
    gone = copy.deepcopy(full)
    gone["dataset"]["folder"] = "gone"
    assert "14 listed pairs cannot be shown" in " ".join(
        _Page(render_report(metrics_of(gone), tmp_path / "g.html").read_text()).text.split()
    )


def test_requested_and_found_values_are_shown_with_those_of_real_patches(
    evaluated: dict[str, Any], page_text: str, tmp_path: Path
) -> None:
    text = " ".join(_Page(page_text).text.split())
    assert text.count("real test patches, all combinations") == 2 * 3  # encoders × fields
    for arm in ("MeDi", "CLS"):
        assert f"{arm}, all samples" in text
    # As many sites as TCGA has: numbers in a list, worst first.
    large = copy.deepcopy(evaluated)
    field = large["adherence"]["filters"]["fields"]["site"]
    field["values"] = [f"hospital {i}" for i in range(139)]
    shares = np.eye(139)
    shares[77, 77], shares[77, 5] = 0.25, 0.75
    field["confusion"] = {k: shares.tolist() for k in field["confusion"]}
    text = " ".join(_Page(render_report(metrics_of(large), tmp_path / "large.html").read_text()).text.split())
    assert "hospital 77 25 % hospital 5 75 %" in text
    assert text.index("hospital 77 25 %") < text.index("hospital 1 100 %")
    assert "hospital 138 100 %" in text


def test_numbers_of_each_site_and_without_bias(full: dict[str, Any], tmp_path: Path) -> None:
    text = " ".join(_Page(render_report(metrics_of(full), tmp_path / "r.html").read_text()).text.split())
    assert "Each site over all classes." in text
    assert "All classes and sites" in text
    medi = full["fidelity"]["filters"]["overall"]["medi"]
    assert "FD∞" in text
    assert f"{distance(medi['fd_infinity'])} ± {distance(medi['fd_infinity_error'])}" in text
    assert "Per patient, sites with an unseen combination" in text
    group = full["downstream"]["filters"]["training_sets"]["real"]["scores"]["patient"]["shift"]["worst_group"]["group"]
    assert group is None or short(group, 28) in text


def test_a_moved_run_finds_its_datasets(evaluated: dict[str, Any], small_world: World, tmp_path: Path) -> None:
    metrics = copy.deepcopy(evaluated)
    metrics["settings"]["out"] = "runs/x"
    metrics["dataset"]["folder"] = "runs/x/data"
    metrics["synthetic"] = {}
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "data").symlink_to(small_world.real)
    (tmp_path / "moved" / "metrics.json").write_text(json.dumps(metrics))
    page = render(ReportSettings(metrics=str(tmp_path / "moved")))
    assert page == tmp_path / "moved" / "report.html"
    assert "Real and synthetic patches" in page.read_text()


def test_settings_and_provenance_are_listed(evaluated: dict[str, Any], page_text: str) -> None:
    text = "".join(
        _Page(page_text).text.split()
    )  # a term and its value are neighbouring elements, with no space between
    for name, value in (("settings of the evaluation", ""), ("regularisation", "1.0"), ("held_out", "stripes × south")):
        assert f"{name}{value}".replace(" ", "").lower() in text.lower()
    assert "modelperfect" in text


def test_everything_from_the_data_is_escaped(evaluated: dict[str, Any], tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script>\"><img src=x onerror=y>$\\frac$"
    text = json.dumps(evaluated).replace("stripes", json.dumps(nasty)[1:-1])
    metrics = json.loads(text)
    metrics["dataset"]["name"] = nasty
    metrics["notes"] = [nasty]
    metrics["headline"]["verdict"] |= {"sentence": nasty, "reasons": [nasty]}
    metrics["run"]["command"] = nasty
    metrics["synthetic"]["medi"]["provenance"] = {nasty: nasty}
    page = _Page(render_report(metrics_of(metrics), tmp_path / "r.html").read_text())
    assert not page.all("script")
    assert all(str(a["src"]).startswith("data:") for a in page.all("img"))
    assert not any("onerror" in a for _, a in page.tags)
    assert "<script>alert" in page.text


def test_missing_parts_are_left_out(evaluated: dict[str, Any], tmp_path: Path) -> None:
    for absent in ("fidelity", "adherence", "downstream", "projection", "notes", "synthetic", "memorisation"):
        metrics = copy.deepcopy(evaluated)
        metrics[absent] = [] if absent == "notes" else {}
        _Page(render_report(metrics_of(metrics), tmp_path / "r.html").read_text())
    metrics = copy.deepcopy(evaluated)
    metrics["dataset"]["folder"] = str(tmp_path / "gone")
    for arm in metrics["synthetic"].values():
        arm["folder"] = str(tmp_path / "gone")
    text = _Page(render_report(metrics_of(metrics), tmp_path / "r.html").read_text()).text
    assert "Real and synthetic patches" not in text
    assert "Does it help?" in text
    for section in SECTIONS:
        page = render_report(metrics_of(evaluated), tmp_path / "r.html", sections=[section])
        _Page(page.read_text())


def test_leakage_and_stain_are_shown_and_a_reason_alone_is_not(
    evaluated: dict[str, Any], page_text: str, tmp_path: Path
) -> None:
    assert "Does the site change the class?" in page_text
    assert "Stain, without a network" in page_text
    metrics = copy.deepcopy(evaluated)
    metrics["stain"] = {"combinations": [], "reason": "fewer than two sites in training"}
    for found in metrics["adherence"].values():
        found["leakage"] = {"training_association": None, "sources": {}, "reason": "no probe of site"}
    text = render_report(metrics_of(metrics), tmp_path / "reasons.html").read_text()
    assert "Does the site change the class?" not in text
    assert "Stain, without a network" not in text


def test_folders_can_be_given(evaluated: dict[str, Any], small_world: World, tmp_path: Path) -> None:
    metrics = copy.deepcopy(evaluated)
    metrics["dataset"]["folder"] = "gone"
    metrics["synthetic"] = {}
    page = render_report(
        metrics_of(metrics), tmp_path / "r.html", real=small_world.real, synthetic={"medi": small_world.medi}
    )
    text = _Page(page.read_text()).text
    assert "Real and synthetic patches" in text


def test_the_same_metrics_give_the_same_page(evaluated: dict[str, Any], tmp_path: Path) -> None:
    a = render_report(metrics_of(evaluated), tmp_path / "a.html").read_bytes()
    assert a == render_report(metrics_of(evaluated), tmp_path / "b.html").read_bytes()


def test_settings_name_the_page(small_world: World, evaluated: dict[str, Any]) -> None:
    folder = small_world.root / "full"
    settings = ReportSettings(metrics=str(folder / "metrics.json"), title="Planted", sections=["headline"])
    assert render(settings) == folder / "report.html"
    assert "<h1>Planted</h1>" in (folder / "report.html").read_text()


def test_bad_input_is_refused(evaluated: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        render_report(tmp_path / "absent.json", tmp_path / "r.html")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"other\.json"):
        render_report(tmp_path / "other.json", tmp_path / "r.html")
    with pytest.raises(UserError, match="headlines"):
        render_report(metrics_of(evaluated), tmp_path / "r.html", sections=["headlines"])
    with pytest.raises(UserError, match="metrics"):
        render(ReportSettings())


def test_montage_keeps_patches_apart_and_thins_large_ones() -> None:
    patches = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (10, 20, 30)])
    block = montage(patches, 2)
    assert block.shape == (18, 18, 3)
    assert (block[8:10] == 255).all()
    assert block[0, 0, 0] == 10
    assert block[0, 17, 0] == 20
    assert block[17, 0, 0] == 30
    assert (block[10:, 10:] == 255).all()
    assert montage(np.zeros((1, 256, 256, 3), np.uint8)).shape == (128, 128, 3)
    # What a row lacks is white, so that the scale is that of a full one.
    assert montage(patches[:1], 4).shape == montage(np.concatenate([patches, patches[:1]]), 4).shape == (8, 38, 3)


def test_numbers_in_words() -> None:
    assert number(None) == "–"
    assert number({"value": -0.12345}, 2) == "−0.12"
    assert bounds({"interval": [0.1, 0.25]}, 2) == "0.10 to 0.25"
    assert bounds({"interval": "not estimable"}) == "not estimable"
    assert bounds({"interval": None}) == bounds(None) == ""
    # Kernel distances are in thousandths.
    assert bounds({"interval": [-0.0001234, 12.3456]}, None) == "−0.123 to 12,346"
    assert bounds({"interval": [-0.01, 0.25]}, 2, sign=True) == "−0.01 to +0.25"
    assert [kid(v) for v in (None, 0.0, 0.126, -0.002, 1.61e6, 4e-8)] == ["–", "0", "126", "−2", "1.61e9", "0"]
    assert (percent(0.0126, 1), share({"interval": [0.01, 0.5]}, 0)) == ("1.3 %", "1 % to 50 %")
    assert number(0.5, 2, sign=True) == "+0.50"


def test_names_are_shortened_and_settings_flattened() -> None:
    assert short("adenocarcinoma") == "adenocarcinoma"
    assert len(short("x" * 200)) == 24
    assert short("abcdefghij", 7) == "abcd…ij"
    nested = {"a": {"b": [1, 2]}, "c": [{"d": "e", "f": "g"}], "h": None, "i": list(range(9))}
    assert flat(nested) == {"a.b": "1, 2", "c": "e × g", "h": "–", "i": "9 entries"}
    assert flat(nested, mappings=False)["c"] == "1 entries"


def test_a_flipped_bit_of_metrics_is_refused_by_name(small_world: World, evaluated: dict[str, Any]) -> None:
    file = small_world.root / "full" / "metrics.json"
    flips(file, lambda: read_metrics(file), 100, names="metrics.json").check()


def test_the_protocol_of_medi_has_plots_and_every_number(full: dict[str, Any], tmp_path: Path) -> None:
    metrics = copy.deepcopy(full)
    score = {"mean": 0.6, "sem": 0.05, "by_seed": [0.55, 0.65]}
    base = {"max_real": 0, "n_real": [9, 9], "task": "nsclc", "balanced_accuracy": score, "mcc": score}
    base["site_averaged_balanced_accuracy"] = score | {"mean": 0.5871}
    rows: list[dict[str, Any]] = []
    for sites in (5, 44):
        rows.append(base | {"training_set": "real", "ratio": 0.0, "sites": sites, "n_synthetic": [0, 0]})
        for ratio in (0.5, 1.0):
            for name, pool in (("medi", "union"), ("medi", "separate"), ("cls", "union")):
                drawn = {"training_set": name, "pool": pool, "ratio": ratio, "sites": sites, "n_synthetic": [4, 4]}
                rows.append(base | drawn)
    test = {"n_patches": 150, "n_patients": 31, "sites": ["a"]}
    task = {"classes": ["LUAD", "LUSC"], "sites": 44, "n_train": 90, "test": test, "draws": {}, "left_out": [60]}
    record = {"fingerprint": "f", "test": test, "not_converged": 0, "rows": rows, "tasks": {"nsclc": task}}
    metrics["protocols"]["medi"] = {"filters": record}
    without = render_report(metrics_of(full), tmp_path / "without.html").read_text(encoding="utf-8")
    text = render_report(metrics_of(metrics), tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert "nsclc: LUAD, LUSC" in page.text
    assert "150 test patches of 31 patients" in page.text
    assert page.text.count("0.587") == len(rows)
    assert "not: 60" in page.text
    # Against the ratio and against the sites.
    assert len(page.all("img")) - len(_Page(without).all("img")) == 2
    assert "44 sites, all their real patches; mean ± standard error of 2 seeds" in page.text
    assert "1 synthetic patches per real one, all their real patches" in page.text
    assert "The protocol of MeDi" not in without
    # Written before there were tasks: all classes are one.
    record["rows"] = [{k: v for k, v in row.items() if k not in ("task", "pool")} for row in rows]
    del record["tasks"]
    text = render_report(metrics_of(metrics), tmp_path / "earlier.html").read_text(encoding="utf-8")
    assert _Page(text).text.count("0.587") == len(rows)
    shown = protocol_text(metrics_of(metrics).protocols)
    assert "3 classes, filters: balanced accuracy" in shown
    assert "150 test patches of 31 patients" in shown


@pytest.mark.parametrize(("largest", "tick"), [(0.5, "200"), (1e-3, "0.4"), (7e-6, "0.002"), (2.5e4, "5e6")])
def test_an_axis_of_distances_is_in_thousandths(largest: float, tick: str) -> None:
    canvas = FigureCanvasAgg(Figure())
    axes = canvas.figure.subplots()
    axes.plot([0, largest], [0, 1])
    figures._thousandths(axes)
    canvas.draw()
    assert axes.xaxis.get_offset_text().get_text() == ""
    assert tick in [text.get_text() for text in axes.get_xticklabels()]


def compared(gains: list[tuple[float, tuple[float, float] | None]], name: str = "medi") -> ClassifierComparison:
    """A comparison with an accuracy of 0.6 on real patches alone, and these gains: selected, then random, at 50 %."""

    def row(training_set: str, choice: Any, gain: float, interval: Any) -> ComparedClassifiers:
        scores = dict.fromkeys(METRICS, MeanOverSeeds(0.6 + gain, 0.01, []))
        change = ClassifierDifferences(**dict.fromkeys(METRICS, Estimate(gain, 100, 20, interval)))
        added = (50.0, 90, 45) if choice != "none" else (0.0, 90, 0)
        return ComparedClassifiers(training_set, choice, *added, **scores, minus_real=change if added[2] else None)

    rows = [row("real", "none", 0.0, None)]
    rows += [row(name, choice, *gain) for choice, gain in zip(("selected", "random"), gains, strict=False)]
    return ClassifierComparison("test_resnet", "class", ["a", "b"], 6400, 3, 100, 20, "patient", rows)


@pytest.mark.parametrize(
    ("gains", "begins"),
    [
        ([(0.05, (0.01, 0.09)), (0.02, (-0.01, 0.05))], "Synthetic patches helped: accuracy was higher than the 0.600"),
        ([(0.05, (0.01, 0.09)), (-0.03, (-0.05, -0.01))], "Some synthetic patches helped and some harmed"),
        ([(-0.01, (-0.05, 0.03)), (-0.03, (-0.05, -0.01))], "Synthetic patches harmed"),
        ([(0.05, (-0.01, 0.11)), (0.02, (-0.01, 0.05))], "It was not shown that synthetic patches help"),
        ([(0.05, None), (0.02, None)], "Not known, since each classifier was trained once"),
    ],
)
def test_whether_synthetic_patches_help_an_image_classifier_is_said_first(
    gains: list[tuple[float, tuple[float, float] | None]], begins: str
) -> None:
    words = conclusion(compared(gains))
    assert words.startswith(begins)
    assert words.endswith(f"these more than none, in {int(gains[0][0] > gains[1][0] > 0)} of 1.")
    assert conclusion(compared([])) == ""


def test_an_experiments_image_classifiers_are_on_the_page(evaluated: dict[str, Any], tmp_path: Path) -> None:
    found = compared([(0.05, (0.01, 0.09)), (0.02, None)])
    for folder in ("image_classifiers", "elsewhere"):
        (tmp_path / folder).mkdir()
        write_sealed(tmp_path / folder / "classifiers.json", encode(found))
    text = _Page(render_report(metrics_of(evaluated), tmp_path / "r.html").read_text()).text
    assert conclusion(found) in text
    assert "0.650 ± 0.010 +0.050 (0.010 to 0.090)" in " ".join(text.split())
    metrics = copy.deepcopy(evaluated)
    metrics["headline"]["findings"] = ["The samples are at a mean KID of 0.1."]
    text = _Page(render_report(metrics_of(metrics), tmp_path / "r.html").read_text()).text
    assert text.index(conclusion(found)) < text.index("The samples are at a mean KID of 0.1.")
    (tmp_path / "image_classifiers").rename(tmp_path / "gone")
    assert "image classifier?" not in render_report(metrics_of(evaluated), tmp_path / "r.html").read_text()
    given = render_report(metrics_of(evaluated), tmp_path / "r.html", classifiers=tmp_path / "elsewhere")
    assert "image classifier?" in given.read_text()
    with pytest.raises(UserError):
        render_report(metrics_of(evaluated), tmp_path / "r.html", classifiers=tmp_path / "nowhere")
