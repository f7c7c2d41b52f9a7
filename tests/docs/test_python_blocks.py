"""Every block of Python that README.md and docs/ show runs, page by page, in a folder with a tiny model and dataset."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import REPOSITORY
from hub_server import hub_server
from PIL import Image
from tiny_model import make_model

from latent_medi.metadata.schema import Schema
from latent_medi.shards.writing.writer import Patch, write_dataset

PAGES = {
    str(page.relative_to(REPOSITORY)): blocks
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
    if (blocks := re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
}
PLACES = {"s3://bucket/prostate": "data"}
"""Text of the pages by what stands for it here."""


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"class": ["solid", "glandular"], "site": ["cedar", "aster"]})
    schema = Schema.from_table(table, "class", ["site"])
    make_model(tmp_path / "runs" / "demo" / "medi", schema)
    image = np.zeros((16, 16, 3), np.uint8)
    rows = table.to_dict("records")
    patches = [Patch(f"k{i}", image + i, f"p{i}", f"s{i}", -1, -1, 0.5, rows[i % 2]) for i in range(4)]
    parts = {f"p{i}": "train" for i in range(4)}
    write_dataset(tmp_path / "data", patches, "data", schema, 16, 0.5, splits={"main": (parts, {})})
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with hub_server(monkeypatch) as hub:
        for block in PAGES[page]:
            for shown, here in PLACES.items():
                block = block.replace(shown, here)
            exec(compile(block, page, "exec"), names)
    if page.endswith("python.md"):
        with Image.open("solid-cedar.png") as saved:
            assert saved.info["origin"] == "synthetic"
        assert "README.md" in hub.files["owner/name"]
