"""``latent-medi doctor``: what it finds, what it says of what is not there, and how it ends."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from joblib import cpu_count

from latent_medi import doctor as module
from latent_medi.cli import main
from latent_medi.doctor import DoctorSettings, Finding, doctor, examine


def of(found: list[Finding], part: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in found if finding.part == part}


def test_a_machine_that_has_all_ends_with_0_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert main(["doctor", f"out={tmp_path}", "--json", str(file)]) == 0
    found = {(f["part"], f["name"]): f for f in json.loads(file.read_text())["findings"]}
    assert found["packages", "torch"]["text"] == metadata.version("torch")
    assert found["slides", "OpenSlide"]["state"] == "good"
    assert found["device", "processor"]["text"] == f"{cpu_count()} cores"
    assert found["hub", "connection"]["state"] == "absent", "tests set HF_HUB_OFFLINE"
    assert found["weights", "uni"]["remedy"].startswith("accept the licence at https://huggingface.co/MahmoodLab/UNI,")
    shown = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) < 140


def test_each_package_that_is_declared_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["numpy>=1", "pandas>=999", "no-such-package>=2", "peft>=0.1; extra == 'lora'", "nowhere; extra == 'x'"]
    monkeypatch.setattr(metadata, "requires", lambda _: declared)
    found = of(examine(Path(), hub=False), "packages")
    assert {name: finding.state for name, finding in found.items()} == {
        "numpy": "good",
        "pandas": "bad",
        "no-such-package": "bad",
        "extra x": "absent",
    }
    assert found["no-such-package"].remedy == "pip install 'no-such-package>=2'"
    assert found["extra x"].remedy == "pip install 'latent-medi[x]'"


def test_a_folder_without_room_or_permission_is_bad_and_ends_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=module.LEAST_FREE - 1))
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert main(["doctor", f"out={tmp_path / 'new' / 'run'}"]) == 3
    assert "disk, results" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = of(examine(tmp_path / "new", hub=False), "disk")["results"]
    assert (found.state, str(tmp_path) in found.text) == ("bad", True)
    # A path that cannot even be asked for, as in a folder that may not be entered.
    assert of(examine(tmp_path / ("n" * 300) / "run", hub=False), "disk")["results"].text.endswith(str(tmp_path))


def test_gpus_are_listed_and_one_that_torch_does_not_see_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (12_000_000_000, 16_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = of(examine(Path(), hub=False), "device")["GPU 0"]
    assert found == Finding("device", "GPU 0", "NVIDIA T4, 12.0 of 16.0 GB free, no bf16: precision=fp16")

    def full(number: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    found = of(examine(Path(), hub=False), "device")["GPU 0"]
    assert (found.state, found.text) == ("bad", "NVIDIA T4 cannot be used: CUDA error: out of memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "DRIVER", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert of(examine(Path(), hub=False), "device")["GPU"].state == "absent"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert of(examine(Path(), hub=False), "device")["GPU"].state == "bad"


def test_without_torch_it_still_says_so(tmp_path: Path) -> None:
    """A torchvision of another release fails when it is imported, and so does all that needs it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules.update(torch=None, torchvision=None)\n")
    surroundings = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "latent_medi.cli", "doctor", f"out={tmp_path}"]
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "packages, import torch; packages, import torchvision" in done.stderr
    assert "Traceback" not in done.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that knows a model, one token, and gives access to UNI alone."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer hf_good"
        if self.path.startswith("/api/whoami-v2"):
            self.answer(200 if known else 401, {"name": "somebody", "type": "user"})
        elif self.path.endswith("/auth-check"):
            self.answer(200 if known and "/MahmoodLab/UNI/" in self.path else 403, {})
        else:
            self.answer(200, {"id": "stabilityai/sd-vae-ft-mse", "modelId": "x", "siblings": [], "tags": []})

    def answer(self, code: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code == 403:
            self.send_header("X-Error-Code", "GatedRepo")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("token", "states"),
    [
        ("hf_good", {"connection": "good", "login": "good", "uni": "good", "uni2-h": "absent"}),
        ("hf_old", {"connection": "good", "login": "bad"}),
        ("", {"connection": "good", "login": "absent"}),
    ],
)
def test_the_hub_is_asked_for_access(hub: str, tmp_path: Path, token: str, states: dict[str, str]) -> None:
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    surroundings |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    surroundings |= {"HF_TOKEN": token} if token else {}
    words = [sys.executable, "-m", "latent_medi.cli", "doctor", f"out={tmp_path}", "--json", str(tmp_path / "a")]
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == (3 if "bad" in states.values() else 0), done.stderr
    found = {f["name"]: f for f in json.loads((tmp_path / "a").read_text())["findings"] if f["part"] == "hub"}
    assert {name: found[name]["state"] for name in states} == states, found
    assert "login" in states


def test_a_hub_that_does_not_answer_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    surroundings |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    words = [sys.executable, "-m", "latent_medi.cli", "doctor", f"out={tmp_path}"]
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "none to http://127.0.0.1:9" in done.stdout


def test_settings_are_checked(tmp_path: Path) -> None:
    assert doctor(DoctorSettings(out=str(tmp_path)))["bad"] == 0
    assert main(["doctor", "outt=x"]) == 2
