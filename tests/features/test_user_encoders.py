"""Encoders of the user's own: what a function may return, and what is said where it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from latent_medi.core.errors import UserError
from latent_medi.features.encoders import load_encoder

SOURCE = """
from torch import nn, zeros
from latent_medi.features.networks import Network, Preprocessing


class Means(nn.Module):
    dim = 3

    def forward(self, x):
        return x.mean(dim=(2, 3))


class Wrong(Means):
    dim = 4


class Listed(Means):
    def forward(self, x):
        return [1, 2, 3]


class Dimless(nn.Module):
    pass


def plain():
    return Means()


def prepared(weights=None):
    return Means(), Preprocessing(16, (0.5,) * 3, (0.5,) * 3, "bicubic")


def network():
    return Network("ignored", Means(), 3, Preprocessing(0, (0.0,) * 3, (2.0,) * 3), "MIT")


def weighted(weights):
    module = Means()
    module.scale = nn.Parameter(zeros(1) + float(open(weights).read()))
    return module


def wrong():
    return Wrong(), Preprocessing(16, (0.5,) * 3, (0.5,) * 3)


def late():
    return Wrong()


def listed():
    return Listed()


def dimless():
    return Dimless()


def text():
    return "features"


number = 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module in a folder that Python knows, of a name that no other test imports."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_module_a_pair_and_a_network(here: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    means = images.mean(axis=(1, 2)) / 255
    plain = load_encoder(f"{here}:plain")
    assert plain.name == f"{here}:plain"
    np.testing.assert_allclose(plain.features([images]), means, atol=1e-5)
    prepared = load_encoder(f"{here}:prepared")
    assert prepared.preprocessing.size == 16
    np.testing.assert_allclose(prepared.features([images]), 2 * means - 1, atol=0.05)
    network = load_encoder(f"{here}:network")
    assert network.license == "MIT"
    np.testing.assert_allclose(network.features([images]), means / 2, atol=1e-5)
    (tmp_path / "scale.txt").write_text("2")
    weighted = load_encoder(f"{here}:weighted", weights=tmp_path / "scale.txt")
    assert len({e.fingerprint for e in (plain, prepared, network, weighted)}) == 4


def test_an_edited_encoder_is_another(here: str, tmp_path: Path) -> None:
    before = load_encoder(f"{here}:plain").fingerprint
    assert load_encoder(f"{here}:plain").fingerprint == before
    (tmp_path / f"{here}.py").write_text(SOURCE.replace("x.mean(dim=(2, 3))", "x.amax(dim=(2, 3))"))
    assert load_encoder(f"{here}:plain").fingerprint != before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prepard", "closest: 'prepared'"),
        ("number", "not callable"),
        ("text", "no encoder"),
        ("dimless", "no integer `dim`"),
        ("wrong", r"returned \[2, 3\] for 2 patches, not \[2, 4\]"),
        ("", "not module:callable"),
    ],
)
def test_what_does_not_fit_is_named_when_it_is_loaded(here: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_encoder(f"{here}:{name}")


def test_what_cannot_be_known_before_is_named_at_the_first_batch(here: str) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for name, said in (("late", r"not \[2, 4\]"), ("listed", "a list")):
        with pytest.raises(UserError, match=said):
            load_encoder(f"{here}:{name}").features([images])


def test_an_absent_module_is_named_and_a_broken_one_keeps_its_traceback(here: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"module 'absent\.part'"):
        load_encoder("absent.part:encoder")
    (tmp_path / f"{here}_broken.py").write_text("import absent_from_everywhere")
    with pytest.raises(ModuleNotFoundError, match="absent_from_everywhere") as caught:
        load_encoder(f"{here}_broken:encoder")
    assert not isinstance(caught.value, UserError)


def test_a_module_in_the_working_folder_alone_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_there.py").write_text("raise SystemExit('was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", ".")])
    with pytest.raises(UserError, match=r"working folder(.|\n)*PYTHONPATH=\."):
        load_encoder("lying_there:encoder")
