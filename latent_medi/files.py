"""Files that are either whole or absent: temporary name, fsync, rename; and content hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from latent_medi.errors import UserError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a full disk or an exhausted quota."""

SEAL = "seal"
"""Key of a JSON object under which the checksum of the rest stands."""


def sync_folder(folder: Path) -> None:
    """Make what was renamed into a folder last beyond a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it there, on error remove it.

    Works for a file or, if the body creates one, a folder. An existing folder at ``path`` is replaced.

    Raises:
        OSError: The system refused, safetensors' wrapping of such an error undone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, since writers such as numpy and matplotlib choose the format by it.
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            if path.exists():
                remove(path)
        else:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    finally:
        remove(temporary)


def open_file(path: str | Path, remedy: str) -> int:
    """A descriptor to read a regular file; a pipe, a device or a folder is refused instead of waited for.

    Raises:
        UserError: It cannot be opened, or is no file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}.", remedy) from None
    raise UserError(f"{path} is not a file.", remedy)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically; NaN and infinity are refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is absent, no file that can be read, or not JSON.
    """
    path = Path(path)
    try:
        # Opening a pipe or a device would wait for somebody to write, for ever.
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file.", "Remove it, and run the step that writes it.")
        return json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.", "Check the path, or run the step that writes it.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Check the path and its permissions.") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number of thousands of digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{path} is not valid JSON: {reason}.", "Restore it from its source, or run the step that writes it again."
        ) from None


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: As :func:`read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}, not an object.",
            "Restore it from its source, or run the step that writes it again.",
        )
    return value


def _seal(value: Mapping[str, Any]) -> str:
    """The checksum of an object's content, whatever its key order and whitespace."""
    content = {key: entry for key, entry in value.items() if key != SEAL}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"sha256:{sha256_bytes(text.encode())}"


def write_sealed(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the checksum of its content under :data:`SEAL`, atomically."""
    content = json.loads(json.dumps(value, allow_nan=False))  # as it will be read: keys are strings, tuples lists
    content.pop(SEAL, None)
    write_json(path, {**content, SEAL: _seal(content)})


def read_sealed(path: str | Path, remedy: str) -> tuple[dict[str, Any], bool]:
    """Read what :func:`write_sealed` wrote, and compare its checksum.

    Args:
        path: The file.
        remedy: What to do if it is damaged, in a sentence.

    Returns:
        The object without its checksum, and whether it had one: earlier versions wrote none.

    Raises:
        UserError: As :func:`read_object`, or the content is not what was written.
    """
    value = read_object(path)
    told = value.pop(SEAL, None)
    try:
        fits = told in (None, _seal(value))
    except (ValueError, RecursionError):  # what no writer of ours would write: an infinite number, half a character
        fits = False
    if not fits:
        raise UserError(f"{path} is damaged: its content is not what was written.", remedy)
    return value, told is not None


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
