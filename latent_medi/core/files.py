"""Writing files that are complete or absent (temporary name, fsync, rename), reading JSON, and content hashes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from latent_medi.core.errors import UserError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a full disk or an exhausted quota."""

JsonObject = dict[str, Any]
"""A JSON object as read; :mod:`latent_medi.core.json_types` and :mod:`latent_medi.core.records` check its content."""

SEAL = "seal"
"""Key of a JSON object that holds the checksum of all other entries."""


_OLD = ".tmp-old-"  # prefix of a folder that is being replaced
_UMASK = threading.Lock()
_TEMPORARY = re.compile(r"\.tmp-([0-9]+|move)-.")  # a name given by atomic_path, or to a shard that is renumbered

HTML = rb"(?i)\s*<(!doctype )?html"
"""Pattern of the start of an HTML page."""


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renamed files survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success rename it to ``path``, on error remove it.

    The body writes a file or a folder. A file replaces only a file, and a folder replaces a folder only if it has all
    of its files, so nothing is lost. A symbolic link is followed. The result has the permissions of the umask.

    Raises:
        UserError: The path cannot be written, or it is a folder and a file is written, or the reverse.
        OSError: The operating system refused; also raised for safetensors' own error of that kind.
    """
    path = check_output(path)
    if path.is_symlink():
        path = path.resolve()  # the rename would replace the link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    # The suffix stays last, since writers such as numpy and matplotlib choose the format by it.
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    remove(temporary)
    old: Path | None = None
    try:
        yield temporary
        _open_to_others(temporary)
        if temporary.is_dir():
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            _put_back(path)
            old = _make_room(path, temporary)
        else:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            if path.is_dir():
                raise UserError(f"{path} is a folder; a file is written there.", "Give another path.")
        os.replace(temporary, path)
        sync_folder(path.parent)
        if old is not None:
            remove(old)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    except OSError as error:
        if error.errno in NO_SPACE and not error.filename:  # a write to an open file does not name it
            error.filename = str(path)
        raise
    finally:
        if old is not None and not path.exists():
            old.rename(path)
        remove(temporary)


def _put_back(path: Path) -> None:
    """Give a folder its name back if an earlier process was killed between the two renames of a replacement."""
    own = re.compile(re.escape(_OLD) + "[0-9]+-" + re.escape(path.name))
    for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]:
        if path.exists():
            remove(left)
        else:
            left.rename(path)


def _make_room(path: Path, new: Path) -> Path | None:
    """Rename the folder that a new one replaces, if the new one has all of its files; returns its new path.

    Raises:
        UserError: ``path`` is a file, or a folder with a file that the new one lacks.
    """
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"{path} is a file; a folder is written there.", "Give another path.")
    lost = [file.relative_to(path) for file in sorted(path.rglob("*")) if not (new / file.relative_to(path)).exists()]
    if lost:
        raise UserError(
            f"{path} would be replaced, and {lost[0]} in it would be lost.", "Move that file, or give another path."
        )
    return path.rename(path.with_name(f"{_OLD}{os.getpid()}-{path.name}"))


def _open_to_others(path: Path) -> None:
    """Give a new file, or a folder and its content, the permissions of the umask: some writers make files that only
    their owner may read.
    """
    with _UMASK:  # reading the umask of the process means setting it
        mask = os.umask(0o077)
        os.umask(mask)
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if entry.is_symlink():
            continue
        mode = stat.S_IMODE(entry.stat().st_mode)
        # Permissions are only added: a folder's access list may give more.
        wanted = mode | ((0o777 if entry.is_dir() else 0o666) & ~mask)
        if wanted != mode:
            with suppress(OSError):  # a file system without permissions
                entry.chmod(wanted)


def cannot_write(path: Path, error: OSError) -> Exception:
    """The error to raise if ``path`` could not be written: a UserError, or ``error`` itself for a full disk."""
    if error.errno in NO_SPACE:
        return error
    return UserError(
        f"{path} cannot be written: {error.strerror or error}.", "Check the path and its permissions, or give another."
    )


def check_output(path: str | Path, folder: bool | None = None) -> Path:
    """Check before the work that a file or folder can be written at a path; returns the path.

    Args:
        path: The path; it may exist.
        folder: Whether a folder will be written; ``None`` if either may be.

    Raises:
        UserError: The path is empty, a broken link, no regular file, read-only, or a file where a folder will be
            written, or the reverse.
    """
    if not str(path):
        raise UserError("No path to write is given.", "out=/path/to/it")
    path = Path(path)
    try:
        _check_output(path, folder, "Give another path.")
    except OSError as error:  # no permission for a folder on the way
        raise cannot_write(path, error) from None
    return path


def _check_output(path: Path, folder: bool | None, another: str) -> None:
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise UserError(f"{part} is a link to {os.readlink(part)}, which does not exist.", "Correct the link.")
    if folder and path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; a folder is written there.", another)
    if folder is False and path.is_dir():
        raise UserError(f"{path} is a folder; a file is written there.", another)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is not a regular file.", another)
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if there != path and not there.is_dir():
        raise UserError(f"{path} cannot be written: {there} is a file.", another)
    # A rename needs write permission in the parent folder.
    around = [path.absolute().parent] if there == path and not folder else []
    for part in (there, *around):
        if not os.access(part, os.W_OK):
            raise UserError(
                f"{path} cannot be written: {part} is read-only.", "Change its permissions, or give another path."
            )


def check_file(path: str | Path, what: str, pattern: bytes) -> Path:
    """Check that a file can be written, and that a file it would replace is of the same kind; returns the path.

    Args:
        path: The file.
        what: Its kind, for messages.
        pattern: Regular expression that a file of that kind matches from its start.

    Raises:
        UserError: As :func:`check_output`; or the path is a file of another kind.
    """
    path = check_output(path, folder=False)
    if path.is_file():
        with open(path, "rb") as handle:
            start = handle.read(65536)
        if start and not re.match(pattern, start):
            raise UserError(f"{path} exists and is no {what}; it would be overwritten.", "Give another path.")
    return path


def refuse_foreign(folder: str | Path, signs: Mapping[str, str], written: Iterable[str]) -> None:
    """Refuse an output folder in which files of the user would be overwritten.

    Args:
        folder: The folder; it may be absent.
        signs: Files or folders that show that an earlier job of this program wrote the folder, each with a key that
            the JSON file has ("" for none).
        written: Names and patterns of the files that will be written.

    Raises:
        UserError: Such a file exists, and none of the signs.
    """
    folder = Path(folder)
    for name, key in signs.items():
        if (folder / name).exists():
            try:
                if not key or key in read_object(folder / name):
                    return
            except UserError:  # a damaged file of ours: a file of the user would be intact
                return
    if there := sorted(path for pattern in written for path in folder.glob(pattern)):
        raise UserError(
            f"{there[0]} exists and was not written by this command; it would be overwritten.",
            "Move it, or give another folder.",
        )


def temporaries(folder: Path) -> list[Path]:
    """Temporary files that a killed process left in a folder."""
    return sorted(path for path in folder.glob(".tmp-*") if _TEMPORARY.match(path.name))


def open_file(path: str | Path, remedy: str) -> int:
    """A file descriptor for reading a regular file; does not wait for a pipe or a device.

    Raises:
        UserError: The path cannot be opened, or is not a regular file.
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
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a file or folder to NAME.damaged, or another ending, so that it can be written again; returns its new
    path.
    """
    name = f"{path.name}.{why}"
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(name if n == 1 else f"{name}-{n}")).exists())
    return path.rename(aside)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically. NaN and infinity raise ``ValueError``: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is absent, cannot be read, or is not JSON.
    """
    path = Path(path)
    try:
        # Opening a pipe or a device would wait for ever.
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


def read_object(path: str | Path) -> JsonObject:
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
    """The checksum of an object's content; it does not depend on the order of keys or on whitespace."""
    content = {key: entry for key, entry in value.items() if key != SEAL}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"sha256:{sha256_bytes(text.encode())}"


def _seal_is_misspelt(value: Mapping[str, Any]) -> bool:
    """Whether an object's checksum is under another key, because the key itself was damaged."""
    maybe = [key for key, entry in value.items() if isinstance(entry, str) and entry.startswith("sha256:")]
    return any(value[key] == _seal({k: entry for k, entry in value.items() if k != key}) for key in maybe)


def write_sealed(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the checksum of its content under :data:`SEAL`, atomically."""
    content = json.loads(json.dumps(value, allow_nan=False))  # as it will be read: string keys, lists for tuples
    content.pop(SEAL, None)
    write_json(path, {**content, SEAL: _seal(content)})


def read_sealed(path: str | Path, remedy: str) -> tuple[JsonObject, bool]:
    """Read a JSON object written by :func:`write_sealed`, and check its checksum.

    Args:
        path: The file.
        remedy: What to do if the file is damaged, as a sentence.

    Returns:
        The object without its checksum, and whether it had one: earlier versions wrote none.

    Raises:
        UserError: As :func:`read_object`; or the checksum is wrong.
    """
    value = read_object(path)
    seal = value.pop(SEAL, None)
    try:
        intact = seal == _seal(value) if seal is not None else not _seal_is_misspelt(value)
    except (ValueError, RecursionError):  # an infinite number or half a character, which write_sealed never writes
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its content is not what was written.", remedy)
    return value, seal is not None


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
