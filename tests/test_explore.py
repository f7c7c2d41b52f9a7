"""``latent-medi explore``: what its page shows, driven by a browser; what it opens and refuses."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser, needs_chromium
from parts import make_cohort, random_images
from tiny_model import make_model

from latent_medi.cli import main
from latent_medi.core.config import save_settings
from latent_medi.core.errors import UserError
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.explore.page import PER_PAGE, Collection, open_folders
from latent_medi.explore.settings import ExploreSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset

PATIENCE = 120.0  # seconds that a page may take to change


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``data`` (52 patches) and of ``made``, a synthetic set of 30 patches that has no age."""
    root = tmp_path_factory.mktemp("explore")
    schema = make_cohort(root / "data", ("aster", "NA", "birch")).schema.subset(["class", "site"])
    patches = [
        Patch(f"s{i:02d}", image, f"synthetic:{i}", f"synthetic:{i}", 0, 0, 0.5, fields, origin="synthetic")
        for i, image in enumerate(random_images(30))
        for fields in [{"class": ("benign", "tumour")[i % 2], "site": ("aster", "birch")[i // 2 % 2]}]
    ]
    write_dataset(root / "made", patches, "made", schema, 32, 0.5)
    return root


@pytest.fixture
def collection(root: Path) -> Collection:
    return open_folders(ExploreSettings(data=str(root / "data"), synthetic={"made": str(root / "made")}))[0]


def test_rows_are_those_of_the_choice_and_every_page_has_its_own(collection: Collection) -> None:
    index, chosen = collection.data.index, (("class", "tumour"), ("site", "NA"))
    fits = np.flatnonzero((index["class"] == "tumour") & (index["site"] == "NA"))
    assert sorted(collection.rows("", chosen, "")) == list(fits)
    tested = sorted(collection.rows("", (), "main: test"))
    assert list(index["split_main"].iloc[tested].unique()) == ["test"]
    assert collection.pages("made", (), "") == -(-52 // PER_PAGE)
    shown = [re.findall("patch (p[0-9]+)", collection.cards("", (), "", page)) for page in range(3)]
    assert sorted(key for page in shown for key in page) == sorted(index["key"])
    assert collection.rows("made", (("site", "NA"),), "").size == 0, "a value that its vocabulary lacks"


def test_synthetic_patches_are_marked_and_each_has_the_verdict_of_the_real_ones(collection: Collection) -> None:
    real, made = (collection.cards(name, (("site", "birch"),), "", 0) for name in ("", "made"))
    assert "synthetic" not in real
    assert made.count('class="mark">synthetic') == made.count("<img ")
    assert b"origin\0synthetic" in base64.b64decode(re.findall('base64,([^"]+)', made)[0])
    verdict = collection.verdict({"class": "tumour", "site": "birch"})
    assert verdict is not None
    assert verdict["verdict"] == "thin", "fewer than ten patients"
    assert f'data-is="thin" title="{verdict["reason"]}"' in made
    assert verdict["reason"] in collection.verdict_text({"class": "tumour", "site": "birch"})


def test_a_damaged_patch_is_named_and_names_are_no_markup(tmp_path: Path) -> None:
    dataset = make_cohort(tmp_path / "data", ("<script>alert(1)</script>",), patches=8)
    shard = dataset.folder / "data" / "part-000000.tar"
    content, offset = bytearray(shard.read_bytes()), int(dataset.index["offset"].iloc[3])
    content[offset + 60] ^= 255
    shard.write_bytes(content)
    cards = open_folders(ExploreSettings(data=str(dataset.folder)))[0].cards("", (), "", 0)
    assert cards.count("<img ") == 7
    assert "is damaged" in cards
    assert "<script>" not in cards


def test_an_experiment_names_its_dataset_samples_and_models(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in ("stages", "medi/model", "cls/model", "synthetic"):
        (run / folder).mkdir(parents=True)
    (run / "data").symlink_to(root / "data")
    (run / "synthetic" / "medi").symlink_to(root / "made")
    (run / "medi" / "model" / "model_index.json").write_text("{}")
    save_settings(ExperimentSettings(out="it/was/made/elsewhere"), run / "settings.yaml")
    opened, models = open_folders(ExploreSettings(data=str(run)))
    assert len(opened.data) == 52
    assert {name: len(dataset) for name, dataset in opened.synthetic.items()} == {"medi": 30}
    assert models == {"medi": str(run / "medi" / "model")}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "No folder is given"),
        ({"data": "absent"}, "is no dataset folder"),
        ({"model": "absent"}, "absent is no model folder"),
        ({"split": "other"}, "There is no split 'other'"),
        ({"split_value": "tset"}, "has no value 'tset'"),
        ({"fields": ["sight"]}, "There is no field 'sight'"),
    ],
)
def test_what_cannot_be_shown_is_refused(root: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_folders(ExploreSettings(**({"data": str(root / "data")} if settings else {}) | settings))


def test_without_gradio_the_extra_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["explore", str(root / "data")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].strip() == "pip install 'latent-medi[web]'"


def test_help_imports_neither_torch_nor_gradio() -> None:
    words = (
        "import sys; from latent_medi.cli import main\ntry: main(['explore', '--help'])\nfinally: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert not {"torch", "gradio"} & set(done.stdout.split())


# ---- in a browser


class Proxy:
    """Counts whoever wants to reach another machine through it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.1)
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def asked(self) -> bool:
        try:
            self.listener.accept()
        except TimeoutError:
            return False
        return True


@pytest.fixture
def served(root: Path, tmp_path: Path) -> Iterator[tuple[str, Proxy]]:
    """Address of the page of a server that runs, and its way to other machines."""
    pytest.importorskip("gradio", reason="needs the extra web")
    model, proxy = make_model(tmp_path, PatchDataset.open(root / "data").schema), Proxy()
    words = [f"synthetic.made={root / 'made'}", f"model={model}", "port=0"]
    with subprocess.Popen(
        [sys.executable, "-m", "latent_medi.cli", "explore", str(root / "data"), *words],
        env=os.environ | dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy.address),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        try:
            yield said.split()[0], proxy
        finally:
            process.send_signal(signal.SIGINT)
            ended = process.wait(PATIENCE)
    assert ended == 0
    proxy.listener.close()


class Page:
    """The page in a tab, used as a person does: with the mouse and the keyboard."""

    def __init__(self, tab: Browser, address: str, width: int) -> None:
        self.tab = tab
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        tab.call("Page.navigate", url=address)
        self.until("document.querySelectorAll('#real img').length")

    def until(self, expression: str, unlike: Any = None) -> Any:
        """The value of an expression once it is true and other than before."""
        end = time.monotonic() + PATIENCE
        while not (found := self.tab.value(expression)) or found == unlike:
            assert time.monotonic() < end, f"{expression} remains {found}"
            time.sleep(0.1)
        return found

    def click(self, element: str) -> None:
        x, y = self.until(
            "(e => { if (!e) return null; e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            f"return [b.x + b.width / 2, b.y + b.height / 2]; }})({element})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, label: str, value: str) -> None:
        self.click(f"document.querySelector('input[aria-label=\"{label}\"]')")
        self.click(f"[...document.querySelectorAll('[role=option]')].find(o => o.innerText.trim().endsWith('{value}'))")

    def type(self, label: str, text: str) -> None:
        self.click(f"document.querySelector('input[type=number][aria-label$=\"{label}\"]')")
        self.tab.value("document.activeElement.select()")
        self.tab.call("Input.insertText", text=text)
        self.tab.press("Tab", 9)

    def press(self, button: str) -> None:
        self.click(f"[...document.querySelectorAll('button')].find(b => b.innerText == '{button}')")

    def pictures(self, where: str, unlike: Any = None) -> list[str]:
        return self.until(f"[...document.querySelectorAll('#{where} img')].map(i => i.src)", unlike)

    def text(self, where: str) -> str:
        return self.tab.value(f"document.querySelector('#{where}').innerText")


@pytest.mark.slow
@needs_chromium
def test_a_person_filters_and_draws_samples(served: tuple[str, Proxy], tmp_path: Path) -> None:
    address, proxy = served
    with browser(tmp_path / "profile") as tab:
        page = Page(tab, address, 1280)
        before, made = page.pictures("real"), page.pictures("synthetic")
        assert (len(before), len(made)) == (PER_PAGE, PER_PAGE)
        page.choose("class", "tumour")
        tumours = page.pictures("real", unlike=before)
        assert page.pictures("synthetic", unlike=made)
        captions = tab.value("[...document.querySelectorAll('#real figcaption')].map(c => c.innerText)")
        assert all(caption.startswith("tumour × ") for caption in captions)
        page.choose("site", "birch")
        page.pictures("real", unlike=tumours)
        assert "tumour × birch thin" in " ".join(page.text("verdict").split())

        page.press("Generate")
        first = page.pictures("generated")
        page.type("Seed", "7")
        page.press("Generate")
        other = page.pictures("generated", unlike=first)
        assert not set(first) & set(other)
        page.type("Seed", "0")
        page.press("Generate")
        assert page.pictures("generated", unlike=other) == first
        assert tab.value("document.querySelectorAll('#generated .mark').length") == len(first) == 4
        link = "document.querySelector('#generated a[download]')"
        assert tab.value(f"{link}.download") == "synthetic-tumour-birch-seed0.png"
        assert b"origin\0synthetic" in base64.b64decode(tab.value(f"{link}.href").partition("base64,")[2])

        # On a slow line, what is chosen before the page has answered counts too.
        line = {"offline": False, "latency": 1500, "downloadThroughput": -1, "uploadThroughput": -1}
        tab.call("Network.emulateNetworkConditions", **line)
        page.choose("class", "any")
        page.choose("site", "aster")
        page.until("document.querySelector('#verdict').innerText.startsWith('aster')")
        tab.call("Network.emulateNetworkConditions", **line | {"latency": 0})

        Page(tab, address, 390)
        assert tab.value("document.documentElement.scrollWidth") <= 390
        assert [url for url in tab.requests if not url.startswith(address)] == []
        assert tab.problems == []
    assert not proxy.asked()
