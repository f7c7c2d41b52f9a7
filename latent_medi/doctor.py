"""``doctor``: what this machine has of all that latent-medi uses, and what to do about what it lacks."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil

from latent_medi import __version__
from latent_medi.core.errors import Incomplete
from latent_medi.core.hub import offline
from latent_medi.core.paths import PathText
from latent_medi.core.settings import Settings
from latent_medi.features.needed import encoder_weights
from latent_medi.features.registry import ENCODERS, access_hint

DISTRIBUTION = "latent-medi"
GB = 10**9
LEAST_FREE = 5 * GB
"""Free bytes below which a folder is called full."""
DRIVER = Path("/dev/nvidiactl")
"""There where NVIDIA's driver runs."""
_PUBLIC = "stabilityai/sd-vae-ft-mse"
"""A repository of the hub that needs no login: that of the autoencoder."""
_SECONDS = 5.0
"""Longest wait for an answer of the hub."""
_MARKS = {"good": "ok", "absent": "--", "bad": "!!"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Args:
        part: What it belongs to, such as "packages".
        name: What it is.
        text: What was found.
        state: "good"; "absent": what needs it cannot run here, the rest can; "bad": it must be mended.
        remedy: What to do; empty where nothing is to be done.
    """

    part: str
    name: str
    text: str
    state: Literal["good", "absent", "bad"] = "good"
    remedy: str = ""


@dataclass
class DoctorSettings(Settings):
    """What this machine has of all that latent-medi uses.

    Args:
        out: Folder that results are to be written to.
    """

    COMMON: ClassVar = "out"
    EXAMPLES: ClassVar = (
        "latent-medi doctor",
        "latent-medi doctor out=/scratch/runs",
    )

    out: PathText = "."


def doctor(settings: DoctorSettings) -> dict[str, Any]:
    """Print what was found, with what to do about the rest.

    Returns:
        ``findings``, and ``bad``: how many must be mended.

    Raises:
        Incomplete: Something must be mended.
    """
    found = examine(Path(settings.out))
    print(text_of(found))
    bad = [f"{finding.part}, {finding.name}" for finding in found if finding.state == "bad"]
    result: dict[str, Any] = {"findings": [asdict(finding) for finding in found], "bad": len(bad)}
    if bad:
        raise Incomplete(f"{len(bad)} to mend: {'; '.join(bad)}", result)
    return result


def examine(folder: Path, hub: bool = True) -> list[Finding]:
    """Everything that was found.

    Args:
        folder: That results are to be written to.
        hub: Whether to look at the hub and at weights too.
    """
    found = [*_packages(), *_slides(), *_device(), *_disk(folder), *_launcher()]
    return [*found, *_hub(), *_weights()] if hub else found


def text_of(findings: list[Finding]) -> str:
    """The findings as text, by part; packages that fit share their lines."""
    lines, part = [f"latent-medi {__version__}, Python {sys.version.split()[0]}, {sys.executable}"], ""
    fit = ", ".join(f"{f.name} {f.text}" for f in findings if f.part == "packages" and f.state == "good")
    listed = [finding for finding in findings if finding.part != "packages" or finding.state != "good"]
    width = max(len(finding.name) for finding in listed)
    lines += ["", "packages", *textwrap.wrap(fit, 110, initial_indent="  ok  ", subsequent_indent=" " * 6)]
    for finding in listed:
        if finding.part != part and finding.part != "packages":
            lines += ["", finding.part]
        part = finding.part
        line = f"  {_MARKS[finding.state]}  {finding.name:<{width}}  {finding.text}"
        remedy = finding.remedy if finding.state != "good" else ""
        if remedy and len(line) + len(remedy) < 110:
            line, remedy = f"{line}: {remedy}", ""
        lines += [line, *([f"      {'':<{width}}  {remedy}"] if remedy else [])]
    return "\n".join([*lines, "", "ok: here; --: not here, which stops what needs it and nothing else; !!: to mend"])


def _packages() -> Iterator[Finding]:
    """The packages that an installation declares, the optional ones by extra."""
    from packaging.requirements import Requirement

    part, optional = "packages", dict[str, list[str]]()
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        declared = []
        yield Finding(part, DISTRIBUTION, "not installed, run from its folder: what it needs is not known")
    for text in declared:
        needed = Requirement(text)
        extra = str(needed.marker).rpartition("extra == ")[2].strip("\"'") if needed.marker else ""
        if extra == "dev":
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            version = ""
        if extra:
            if not version:
                optional.setdefault(extra, []).append(needed.name)
            continue
        fits = version and needed.specifier.contains(version, prereleases=True)
        state: Literal["good", "bad"] = "good" if fits else "bad"
        yield Finding(part, needed.name, version or "not installed", state, f"pip install '{needed}'")
    for extra, names in optional.items():
        remedy = f"pip install 'latent-medi[{extra}]'"
        yield Finding(part, f"extra {extra}", f"without {', '.join(names)}", "absent", remedy)
    for name in ("torch", "torchvision"):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a library that does not fit raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            remedy = "install torch and torchvision of one release: pip install --upgrade torch torchvision"
            yield Finding(part, f"import {name}", reason, "bad", remedy)


def _slides() -> Iterator[Finding]:
    remedy = "pip install openslide-python openslide-bin"
    try:
        openslide = importlib.import_module("openslide")
    except Exception as error:  # its library may be absent
        yield Finding("slides", "OpenSlide", str(error).splitlines()[0], "absent", remedy)
    else:
        yield Finding("slides", "OpenSlide", f"{openslide.__library_version__}")


def _device() -> Iterator[Finding]:
    """Processor cores, memory and GPUs, as the processes of this command may use them."""
    from joblib import cpu_count  # those that a job or a container may use

    memory = psutil.virtual_memory()
    yield Finding("device", "processor", f"{cpu_count()} cores")
    yield Finding("device", "memory", f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB free")
    try:
        import torch
    except Exception:  # said above
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        name = torch.cuda.get_device_name(number)
        try:
            free, total = torch.cuda.mem_get_info(number)
        except RuntimeError as error:  # its memory is full, another process has it for itself, or it is broken
            reason, remedy = (
                str(error).splitlines()[0],
                "nvidia-smi lists what runs there; CUDA_VISIBLE_DEVICES hides it",
            )
            yield Finding("device", f"GPU {number}", f"{name} cannot be used: {reason}", "bad", remedy)
            continue
        bf16 = "" if torch.cuda.get_device_capability(number) >= (8, 0) else ", no bf16: precision=fp16"
        yield Finding("device", f"GPU {number}", f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free{bf16}")
    if count:
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("device", "GPU", "hidden by CUDA_VISIBLE_DEVICES", "absent", "unset it")
    elif DRIVER.exists():
        built = torch.version.cuda
        why = f"this torch is built for CUDA {built}, which the driver may be too old for" if built else "this torch "
        why += "" if built else "is built for processors alone"
        remedy = "install a torch that fits the driver: https://pytorch.org/get-started/locally"
        yield Finding("device", "GPU", f"torch sees none; {why}", "bad", remedy)
    else:
        remedy = "trainings at full size need one, the demo and patches of 64 px do not"
        yield Finding("device", "GPU", "none", "absent", remedy)


def _disk(folder: Path) -> Iterator[Finding]:
    """Free space where results, downloaded weights and temporary files are written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"results": folder, "downloads": Path(HF_HUB_CACHE), "temporary": Path(tempfile.gettempdir())}
    settings = {"results": "out=…", "downloads": "HF_HOME", "temporary": "TMPDIR"}
    for name, place in places.items():
        # os.path: a folder that must not be entered is absent
        there = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.exists(p))
        free, another = shutil.disk_usage(there).free, f"name another folder: {settings[name]}"
        if not os.access(there, os.W_OK):
            yield Finding("disk", name, f"no permission to write in {there}", "bad", another)
        else:
            state: Literal["good", "bad"] = "bad" if free < LEAST_FREE else "good"
            yield Finding("disk", name, f"{free / GB:.1f} GB free in {place}", state, f"free some space, or {another}")


def _launcher() -> Iterator[Finding]:
    """How processes are launched here."""
    if job := os.environ.get("SLURM_JOB_ID"):
        nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
        yield Finding("launcher", "Slurm", f"job {job} on {nodes} nodes; configs/cluster/slurm.sh launches them")
    elif shutil.which("sbatch"):
        yield Finding("launcher", "Slurm", "sbatch configs/cluster/slurm.sh … submits a job")
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        yield Finding("launcher", "processes", f"this is process {os.environ.get('RANK', '?')} of {count}")
    try:
        from accelerate.commands.config.config_args import default_config_file
    except Exception:  # of torch: said above
        return
    if Path(default_config_file).is_file():
        yield Finding("launcher", "accelerate", f"as {default_config_file} says")
    else:
        text = "no configuration of yours: one process, unless --num_processes or --config_file says otherwise"
        yield Finding("launcher", "accelerate", text)


def _hub() -> Iterator[Finding]:
    """The connection to the Hugging Face hub, the login, and access to encoders whose licence must be accepted."""
    from huggingface_hub import HfApi, constants, get_token

    part = "hub"
    if offline():
        remedy = "unset it to download weights, or name local folders: weights.NAME=PATH, autoencoder=PATH"
        yield Finding(part, "connection", "not tried: HF_HUB_OFFLINE is set", "absent", remedy)
        return
    api = HfApi()
    try:
        api.model_info(_PUBLIC, timeout=_SECONDS)
    except Exception as error:  # of the connection, whatever library makes it
        remedy = "behind a proxy set HTTPS_PROXY; or name local folders: weights.NAME=PATH, autoencoder=PATH"
        yield Finding(part, "connection", f"none to {constants.ENDPOINT}: {type(error).__name__}", "absent", remedy)
        return
    yield Finding(part, "connection", constants.ENDPOINT)
    if not (token := get_token()):
        yield Finding(part, "login", "none", "absent", "`hf auth login`, for encoders whose licence must be accepted")
        return
    try:
        yield Finding(part, "login", str(api.whoami(token).get("name", "")))
    except Exception as error:
        yield Finding(part, "login", f"the token is refused: {type(error).__name__}", "bad", "`hf auth login`")
        return
    for name, entry in ENCODERS.items():
        if entry.gated and not encoder_weights(name).found:
            try:
                api.auth_check(entry.source, token=token)
                yield Finding(part, name, f"access to {entry.source}")
            except Exception:
                yield Finding(part, name, f"no access to {entry.source}", "absent", access_hint(entry))


def _weights() -> Iterator[Finding]:
    """Weights that are on this machine, and how the others get there."""
    try:
        from latent_medi.latents.autoencoder import HUB_NAMES
        from latent_medi.latents.size import autoencoder_weights
    except Exception:  # of torch: said above
        return
    needed = [*map(autoencoder_weights, HUB_NAMES), *map(encoder_weights, ENCODERS)]
    for weights in needed:
        if weights.found:
            yield Finding("weights", weights.name, "here")
            continue
        remedy = f"fetched from {weights.hub_id} when it is needed"
        if not weights.hub_id:
            remedy = f"weights.{weights.name}=PATH"
        elif weights.name in ENCODERS and ENCODERS[weights.name].gated:
            remedy = f"accept the licence at https://huggingface.co/{weights.hub_id}, then `hf auth login`"
        yield Finding("weights", weights.name, "not here", "absent", remedy)
