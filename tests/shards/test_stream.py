from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import decode_image
from latent_medi.shards.reading.remote import open_dataset
from latent_medi.shards.reading.stream import PatchStream, epochs, webdataset_of
from latent_medi.shards.writing.writer import Patch, write_dataset


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., list[Patch]], schema: Schema
) -> PatchDataset:
    return write_dataset(
        tmp_path_factory.mktemp("d") / "set", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 50),
    share=st.integers(1, 5),
    processes=st.integers(1, 6),
    seed=st.integers(0, 99),
    epochs_run=st.integers(1, 3),
    seen_steps=st.integers(0, 3),
)
def test_every_row_once_per_epoch_over_all_processes(
    n: int, share: int, processes: int, seed: int, epochs_run: int, seen_steps: int
) -> None:
    rows = np.arange(100, 100 + n)
    order, batch = epochs(rows, seed), share * processes
    total = epochs_run * n
    whole = order(0, total)
    for epoch in range(epochs_run):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == rows.tolist()
    steps = range(seen_steps, total // batch)
    by_rank = [[order(s * batch, batch)[r::processes] for s in steps] for r in range(processes)]
    for i, step in enumerate(steps):
        together = np.stack([by_rank[r][i] for r in range(processes)], 1).reshape(-1)
        assert together.tolist() == whole[step * batch : (step + 1) * batch].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_and_processes_do_not_change_what_is_seen(dataset: PatchDataset, workers: int) -> None:
    order = epochs(np.arange(len(dataset)), seed=3)
    expected = order(0, 72)
    for processes in (1, 2, 4):
        seen = []
        for rank in range(processes):
            stream = PatchStream(dataset, order, images=72, global_batch=12, rank=rank, processes=processes)
            batches = list(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))
            assert len(batches) == len(stream) == 6
            assert [b.images_seen for b in batches] == [12, 24, 36, 48, 60, 72]
            assert all(np.array_equal(b.images, dataset.read(b.rows)) for b in batches)
            seen.append(np.stack([b.rows for b in batches]))
        together = np.stack(seen, 2).reshape(-1)
        assert together.tolist() == expected.tolist()
    # Going on after 24 images, with another number of processes, sees the rest.
    stream = PatchStream(dataset, order, images=72, global_batch=12, rank=0, processes=1, seen=24)
    assert np.concatenate([b.rows for b in stream]).tolist() == expected[24:].tolist()


def test_numbers_that_do_not_divide_are_refused(dataset: PatchDataset) -> None:
    order = epochs(np.arange(4), 0)
    for options, words in (
        ({"global_batch": 10, "processes": 4}, "cannot share"),
        ({"global_batch": 4, "rank": 2, "processes": 2}, "is not one of 2"),
        ({"global_batch": 4, "seen": 6}, "no whole number"),
    ):
        with pytest.raises(UserError, match=words):
            PatchStream(dataset, order, images=100, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no patch to stream"):
        epochs(np.zeros(0, np.int64), 0)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers byte ranges, as object stores do."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if not path.is_file() or wanted is None:
            super().do_GET()
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        data = path.read_bytes()
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(scope="module")
def server(dataset: PatchDataset) -> Iterator[str]:
    def handler(*arguments: object) -> Ranges:
        return Ranges(*arguments, directory=str(dataset.folder.parent))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_dataset_behind_a_url_gives_the_same_patches(dataset: PatchDataset, server: str) -> None:
    remote = open_dataset(f"{server}/set")
    rows = np.array([17, 0, 5, 5, 23])
    assert np.array_equal(remote.read(rows), dataset.read(rows))
    assert remote.index.equals(dataset.index)
    stream = PatchStream(remote, epochs(np.arange(len(remote)), 0), images=24, global_batch=8)
    batches = list(DataLoader(stream, batch_size=None, num_workers=2, collate_fn=lambda batch: batch))
    assert all(np.array_equal(b.images, dataset.read(b.rows)) for b in batches)
    for forbidden in (lambda: remote.add_split("a", [], {}), remote.verify):
        with pytest.raises(UserError):
            forbidden()


@pytest.fixture(scope="module")
def bucket(dataset: PatchDataset) -> Iterator[tuple[str, dict[str, object]]]:
    """The dataset in a bucket of an S3 server on loopback, and what it takes to reach it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    storage: dict[str, object] = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    s3 = fsspec.filesystem("s3", **storage)
    s3.mkdir("slides")
    s3.put(str(dataset.folder), "slides/set", recursive=True)
    yield "s3://slides/set", storage
    server.stop()


def test_an_object_store_gives_the_same_patches(dataset: PatchDataset, bucket: tuple[str, dict[str, object]]) -> None:
    url, storage = bucket
    remote = open_dataset(url, storage)
    assert remote.index.equals(dataset.index)
    assert np.array_equal(remote.read(np.arange(24)), dataset.read(np.arange(24)))
    stream = PatchStream(remote, epochs(np.arange(len(remote)), 0), images=24, global_batch=8)
    for workers in (0, 2):
        batches = list(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))
        assert len(batches) == 3
        assert all(np.array_equal(b.images, dataset.read(b.rows)) for b in batches)
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        open_dataset("s3://slides/nothing", storage)
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(url, storage | {"endpoint_url": "http://127.0.0.1:9"})


def test_webdataset_reads_local_folders_and_urls(
    dataset: PatchDataset, server: str, bucket: tuple[str, dict[str, object]]
) -> None:
    for source in (dataset, open_dataset(f"{server}/set"), open_dataset(*bucket)):
        samples = list(webdataset_of(source))
        assert [s["__key__"] for s in samples] == dataset.index["key"].tolist()
        assert [json.loads(s["json"])["site"] for s in samples] == dataset.index["site"].tolist()
        assert np.array_equal(np.stack([decode_image(s["png"]) for s in samples]), dataset.read(np.arange(24)))
    loader = DataLoader(webdataset_of(open_dataset(*bucket)), batch_size=None, num_workers=2)
    assert sorted(s["__key__"] for s in loader) == sorted(dataset.index["key"])


def test_any_file_system_of_fsspec(dataset: PatchDataset) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset.folder), "/bucket/set", recursive=True)
    remote = open_dataset("memory://bucket/set")
    assert np.array_equal(remote.read([3, 1]), dataset.read([3, 1]))
    memory.rm("/bucket/set/data/part-000000.tar")
    with pytest.raises(UserError, match="Patch 'p0/001' of memory://bucket/set cannot be read"):
        remote.read([1])


def test_what_cannot_be_reached_is_said(server: str) -> None:
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        open_dataset(f"{server}/nothing")
    with pytest.raises(UserError, match="cannot be opened"):
        open_dataset("nosuch://bucket/set")
