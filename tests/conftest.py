"""Fixtures shared by all tests."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before diffusers, whose import prints a line otherwise.
import latent_medi  # noqa: F401 # isort: skip
import pytest
from accelerate.state import AcceleratorState, GradientState
from parts import make_autoencoder, make_cohort

from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from latent_medi.latents.encode import encode_dataset

REPOSITORY = Path(__file__).resolve().parents[1]

with suppress(ImportError):  # a compute node runs the tests that need a GPU, and none of those that need it
    from hypothesis import settings

    # The same examples on every machine, however busy; --hypothesis-profile=default draws new ones.
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let continuous integration run the slow tests in turns."""
    parser.addoption("--slow-quarter", type=int, default=None, help="0 to 3: only this quarter of the slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one quarter of the slow tests if asked to, dealt out in the order of their names."""
    quarter = config.getoption("--slow-quarter")
    if quarter is None:
        return
    slow = sorted(item.nodeid for item in items if item.get_closest_marker("slow"))
    dropped = {name for i, name in enumerate(slow) if i % 4 != quarter}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in dropped])
    items[:] = [item for item in items if item.nodeid not in dropped]


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Accelerate keeps one precision per process: what a test chooses does not reach the next one."""
    yield
    if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(autouse=True)
def memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """The C library keeps what a large network leaves behind, in pieces: gigabytes for each worker after some slow
    tests. It is asked to give them back."""
    yield
    if request.node.get_closest_marker("slow"):
        gc.collect()
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True)
def log_for_caplog() -> None:
    """A command that an earlier test ran in this process keeps the log from pytest; ``caplog`` sees it all the same."""
    logging.getLogger("latent_medi").propagate = True


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    """A random autoencoder, 4× down, 4 channels, loaded from a folder."""
    folder = tmp_path_factory.mktemp("autoencoder") / "tiny"
    save_autoencoder(make_autoencoder(), folder)
    return load_autoencoder(str(folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, autoencoder: Autoencoder) -> Path:
    """Folder with ``data`` and ``latents``; "NA" is one of the sites."""
    folder = tmp_path_factory.mktemp("tiny")
    make_cohort(folder / "data", ("aster", "NA", "birch"))
    encode_dataset(folder / "data", autoencoder, folder / "latents")
    return folder


@pytest.fixture(scope="session")
def tiny_more(tmp_path_factory: pytest.TempPathFactory, autoencoder: Autoencoder) -> Path:
    """As ``tiny`` with another hospital."""
    folder = tmp_path_factory.mktemp("tiny_more")
    make_cohort(folder / "data", ("aster", "cedar"), seed=1)
    encode_dataset(folder / "data", autoencoder, folder / "latents")
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real patches, slides and weights that are not part of the repository."""
    folder = Path(os.environ.get("LATENT_MEDI_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the folder of real inputs at {folder} (set LATENT_MEDI_SHARED)")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
