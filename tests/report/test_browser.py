"""Report, comparison and reading sheet as a browser shows them, on a desk and on a telephone."""

from __future__ import annotations

import copy
import csv
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from browser import Browser, needs_chromium
from evaluation_world import World

from latent_medi.evaluation.results import metrics_of
from latent_medi.metadata.schema import Field, Schema
from latent_medi.report.compare import render_comparison
from latent_medi.report.reading_score import score_sheet
from latent_medi.report.reading_sheet import make_sheet
from latent_medi.report.render import render_report
from latent_medi.report.settings import ReadingSheetSettings
from latent_medi.shards.writing.writer import Patch, write_dataset

pytestmark = needs_chromium

SCRIPT = "<script>alert(1)</script>"
LONG = "x" * 200
WIDTHS = (1280, 390)


def renamed(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same metrics of classes with hostile names."""
    text = json.dumps(metrics).replace("stripes", SCRIPT).replace("rings", LONG)
    return json.loads(text)


def hostile(folder: Path) -> tuple[Path, Path]:
    """A real and a synthetic dataset with the same hostile class names."""
    schema = Schema((Field("class", "class", (SCRIPT, LONG)), Field("site", "categorical", ("east", LONG))))
    rng = np.random.default_rng(0)
    written = []
    for origin in ("real", "synthetic"):
        patches = []
        for tumour in (SCRIPT, LONG):
            for site in ("east", LONG):
                for i in range(4):
                    patient = f"{origin}-{(SCRIPT, LONG).index(tumour)}-{site[:4]}-{i}"
                    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    fields = {"class": tumour, "site": site}
                    patches.append(Patch(f"{patient}/0", image, patient, patient, 0, 0, 0.5, fields, origin=origin))
        splits = {"main": ({p.patient: "test" for p in patches}, {"kind": "all"})} if origin == "real" else {}
        write_dataset(folder / origin, patches, origin, schema, 32, 0.5, splits=splits)
        written.append(folder / origin)
    return written[0], written[1]


def check(tab: Browser, page: Path, figures: int) -> None:
    """Nothing logged, nothing asked of the network, every picture drawn, nothing beside the page at any width."""
    for width in WIDTHS:
        tab.open(page, width)
        assert tab.problems == []
        assert tab.requests == []
        assert tab.value("[...document.images].filter(i => !i.naturalWidth || !i.alt).length") == 0
        assert tab.value("document.querySelectorAll('img.plot').length") >= figures
        if width < 600:
            assert tab.sideways() == []
            tab.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert tab.sideways() == []
    assert tab.pdf()[:5] == b"%PDF-"


def test_the_report(full: dict[str, Any], tab: Browser, tmp_path: Path) -> None:
    page = render_report(metrics_of(full), tmp_path / "report.html")
    # Per encoder: distances of unseen, classes and sites, forest, differences, two projections.
    check(tab, page, 2 * 7)
    assert tab.value("document.querySelectorAll('.pairs figure').length") == 2 * 12


def test_the_report_is_short_and_its_answer_on_the_first_screen(
    full: dict[str, Any], tab: Browser, tmp_path: Path
) -> None:
    page = render_report(metrics_of(full), tmp_path / "report.html")
    tab.open(page, 1280, 800)
    assert tab.value("document.documentElement.scrollHeight") <= 8000
    bottom = "Math.max(...[...document.querySelectorAll('%s')].map(e => e.getBoundingClientRect().bottom))"
    assert tab.value(bottom % ".answer, .cards, .strip img") <= 800
    assert len(re.findall(rb"/Type\s*/Page\b", tab.pdf())) <= 12
    # The contents stay in view, and lead to each section.
    tab.value("document.querySelector('.side a[href=\"#copies\"]').click()")
    assert tab.value("scrollY") > 1000
    assert tab.value("document.querySelector('.side').getBoundingClientRect().top") == 0
    tab.open(page, 390)
    assert tab.value("getComputedStyle(document.querySelector('.side')).display") == "none"
    assert tab.value("document.querySelector('.menu').open") is False


def test_a_word_is_explained_by_mouse_keyboard_and_touch(full: dict[str, Any], tab: Browser, tmp_path: Path) -> None:
    page = render_report(metrics_of(full), tmp_path / "report.html")
    shown = "[...document.querySelectorAll('.word')].filter(e => e.checkVisibility()).map(e => e.id)"
    place = (
        "(r => [r.left + r.width / 2, r.top + r.height / 2])(document.querySelector('.term').getBoundingClientRect())"
    )
    for width in WIDTHS:
        tab.open(page, width)
        assert tab.value(shown) == []
        word = tab.value("document.querySelector('.term').getAttribute('popovertarget')")
        tab.value("document.querySelector('.term').scrollIntoView({block: 'center'})")
        x, y = tab.value(place)
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert tab.value(shown) == [word]
        assert tab.sideways() == []
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        assert tab.value(shown) == []
        for kind in ("mousePressed", "mouseReleased"):  # as a tap is
            tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        assert tab.value(shown) == [word]
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        tab.press("Escape", 27)
        assert tab.value(shown) == []
        tab.press(" ", 32)  # the word still has the focus
        assert tab.value(shown) == [word]


def test_hostile_names_in_the_report(full: dict[str, Any], tab: Browser, tmp_path: Path) -> None:
    page = render_report(metrics_of(renamed(full)), tmp_path / "report.html")
    check(tab, page, 2 * 7)
    assert tab.value("document.scripts.length") == 0
    assert SCRIPT in tab.value("document.body.innerText")


def test_the_comparison(full: dict[str, Any], tab: Browser, tmp_path: Path) -> None:
    other = renamed(copy.deepcopy(full))
    other["encoders"]["filters"]["fingerprint"] = SCRIPT
    other["settings"]["cache"] = SCRIPT + LONG
    for name, metrics in (("a", full), ("b" + "b" * 199, other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    page = render_comparison([tmp_path / "a", tmp_path / ("b" * 200)], tmp_path / "c.html")
    check(tab, page, 2)
    assert tab.value("document.scripts.length") == 0
    assert "another encoder" in tab.value("document.body.innerText")


def test_a_reader_answers_with_the_keyboard(tab: Browser, tmp_path: Path) -> None:
    real, synthetic = hostile(tmp_path)
    settings = ReadingSheetSettings(data=str(real), synthetic=str(synthetic), out=str(tmp_path / "sheet.html"), n=8)
    made = make_sheet(settings)
    page = Path(made["sheet"])
    check(tab, page, 0)
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.open(page, 1280)
    shown = "[...document.querySelectorAll('#pictures li')].findIndex(p => !p.hidden)"
    assert tab.value(shown) == 0
    key = csv.DictReader(Path(made["key"]).read_text(encoding="utf-8").splitlines())
    truth = {row["image"]: row["origin"] for row in key}
    order = tab.value("[...document.querySelectorAll('#pictures li')].map(p => p.dataset.image)")
    for number, name in enumerate(order[:-1]):
        tab.press("r" if truth[name] == "real" else "s")
        assert tab.value(shown) == number
        tab.press("3")
        assert tab.value(shown) == number + 1
    assert "7 answered" in tab.value("document.getElementById('where').innerText")
    tab.value("document.getElementById('reader').value = 'A \"B\", C'")
    tab.value("document.getElementById('reader').dispatchEvent(new Event('input'))")
    tab.value("new Promise(done => setTimeout(done, 1000))")  # a page that is left at once may lose its last write
    for _ in range(20):  # what was answered is kept, as soon as the browser has it on disk
        tab.open(page, 390)
        if "7 answered" in tab.value("document.getElementById('where').innerText"):
            break
        time.sleep(0.5)
    assert "7 answered" in tab.value("document.getElementById('where').innerText")
    tab.press("ArrowLeft")
    assert tab.value(shown) == 6
    tab.value("document.getElementById('download').click()")
    file = wait_for(tmp_path, "answers-*.csv")
    result = score_sheet(ReadingSheetSettings(score=[str(file)], key=made["key"]))
    assert result["readers"][0]["reader"] == 'A "B", C'
    assert (result["readers"][0]["correct"], result["readers"][0]["missing"]) == (7, 1)
    assert result["confidence"] == [{"confidence": "sure", "value": 1.0, "n": 7} | _interval(result)]
    assert tab.problems == []
    assert tab.requests == []


def _interval(result: dict[str, Any]) -> dict[str, Any]:
    return {"interval": result["readers"][0]["accuracy"]["interval"]}


def wait_for(folder: Path, pattern: str) -> Path:
    """The file that a download makes."""
    import time

    for _ in range(200):
        found = [f for f in folder.glob(pattern) if f.stat().st_size]
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def test_the_worlds_sheet_fits(small_world: World, tab: Browser, tmp_path: Path) -> None:
    out = tmp_path / "sheet.html"
    make_sheet(ReadingSheetSettings(data=str(small_world.real), synthetic=str(small_world.medi), out=str(out), n=12))
    check(tab, out, 0)
    assert tab.value("document.images.length") == 12
