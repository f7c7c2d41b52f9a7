"""Files that are either whole or absent: temporary name, fsync, rename; and content hashes."""

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

SEAL = "seal"
"""Key of a JSON object under which the checksum of the rest stands."""


_OLD = ".tmp-old-"  # of a folder until its successor has its name
_UMASK = threading.Lock()
_TEMPORARY = re.compile(r"\.tmp-([0-9]+|move)-.")  # as atomic_path names it; or a shard that changes its number

HTML = rb"(?i)\s*<(!doctype )?html"
"""Pattern of a page's start."""


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

    Works for a file or, if the body creates one, a folder. What is replaced is of the same kind, and nothing is lost: a
    folder that holds more than the new one is refused. A link is followed. Permissions are those of the umask, whatever
    the writer gave.

    Raises:
        UserError: The path cannot be written, or something of another kind is there.
        OSError: The system refused, safetensors' wrapping of such an error undone.
    """
    path = check_output(path)
    if path.is_symlink():
        path = path.resolve()  # or the link would be replaced
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
    finally:
        if old is not None and not path.exists():
            old.rename(path)
        remove(temporary)


def _put_back(path: Path) -> None:
    """Give a folder its name back that a process killed between two renames has taken from it."""
    own = re.compile(re.escape(_OLD) + "[0-9]+-" + re.escape(path.name))  # not another folder's, whose name ends alike
    for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]:
        if path.exists():
            remove(left)
        else:
            left.rename(path)


def _make_room(path: Path, new: Path) -> Path | None:
    """Rename an older folder that a new one replaces, if all that it holds has a successor; returns its new path.

    Raises:
        UserError: A file is there, or a folder with something that the new one lacks: who put it there wants it.
    """
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"{path} is a file; a folder is written there.", "Give another path.")
    lost = [file.relative_to(path) for file in sorted(path.rglob("*")) if not (new / file.relative_to(path)).exists()]
    if lost:
        raise UserError(
            f"{path} holds {lost[0]}, which would be lost: what is written there replaces the folder.",
            "Move it away, or give another path.",
        )
    return path.rename(path.with_name(f"{_OLD}{os.getpid()}-{path.name}"))


def _open_to_others(path: Path) -> None:
    """Give a new file, or a folder and all in it, the permissions that the umask allows: some writers give them to the
    owner alone.
    """
    with _UMASK:  # the process has one, which can only be read by setting it
        mask = os.umask(0o077)
        os.umask(mask)
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if entry.is_symlink():
            continue
        mode = stat.S_IMODE(entry.stat().st_mode)
        # Only added to, since a folder's access list may give more.
        wanted = mode | ((0o777 if entry.is_dir() else 0o666) & ~mask)
        if wanted != mode:
            with suppress(OSError):  # a file system without permissions
                entry.chmod(wanted)


def cannot_write(path: Path, error: OSError) -> Exception:
    """What to raise where ``path`` could not be written: one clear message; a full disk stays the error that it is."""
    if error.errno in NO_SPACE:
        return error
    return UserError(
        f"{path} cannot be written: {error.strerror or error}.", "Check the path and its permissions, or give another."
    )


def check_output(path: str | Path, folder: bool | None = None) -> Path:
    """Look, before hours of work, whether something can be written at a path; returns it.

    Args:
        path: Of a file or folder that may be there or not.
        folder: Whether it is to be a folder; ``None`` leaves it open.

    Raises:
        UserError: It is empty, a dangling link, of the other kind, no plain file, or not to be written.
    """
    if not str(path):
        raise UserError("No path to write is given.", "out=/path/to/it")
    path = Path(path)
    try:
        _check_output(path, folder, "Give another path.")
    except OSError as error:  # a folder on the way that may not be looked into
        raise cannot_write(path, error) from None
    return path


def _check_output(path: Path, folder: bool | None, another: str) -> None:
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise UserError(f"{part} is a link to {os.readlink(part)}, which is not there.", "Mend the link.")
    if folder and path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; a folder is written there.", another)
    if folder is False and path.is_dir():
        raise UserError(f"{path} is a folder; a file is written there.", another)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is no plain file.", another)
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if there != path and not there.is_dir():
        raise UserError(f"{path} cannot be written: {there} is a file.", another)
    # A file, or a folder as a whole, is replaced in the folder around it.
    around = [path.absolute().parent] if there == path and not folder else []
    for part in (there, *around):
        if not os.access(part, os.W_OK):
            raise UserError(f"{path} cannot be written: {part} is read-only.", "Change that, or give another path.")


def check_file(path: str | Path, what: str, pattern: bytes) -> Path:
    """Look whether a file that the user names can be written; an older one is replaced only by its like.

    Args:
        path: The file.
        what: Its kind, in words.
        pattern: Regular expression that such a file matches from its start.

    Raises:
        UserError: As :func:`check_output`, or a file of another kind is there.
    """
    path = check_output(path, folder=False)
    if path.is_file():
        with open(path, "rb") as handle:
            start = handle.read(65536)
        if start and not re.match(pattern, start):
            raise UserError(f"{path} is there and is no {what}; it would be lost.", "Give another path.")
    return path


def refuse_foreign(folder: str | Path, signs: Mapping[str, str], written: Iterable[str]) -> None:
    """Refuse an output folder with files of the user's that would be replaced.

    Args:
        folder: The folder; it may be absent.
        signs: What tells that an earlier job wrote the folder: names of files or folders in it, and the key that such
            a JSON file has ("" for none).
        written: Names and patterns of what is written there.

    Raises:
        UserError: There is something by a name that is written, and no sign.
    """
    folder = Path(folder)
    for name, key in signs.items():
        if (folder / name).exists():
            try:
                if not key or key in read_object(folder / name):
                    return
            except UserError:  # a damaged one of ours: somebody else's would be whole
                return
    if there := sorted(path for pattern in written for path in folder.glob(pattern)):
        raise UserError(
            f"{there[0]} is there, and it was not written by such a job; it would be lost.",
            "Move it away, or give another folder.",
        )


def temporaries(folder: Path) -> list[Path]:
    """What a killed process left half-written in a folder."""
    return sorted(path for path in folder.glob(".tmp-*") if _TEMPORARY.match(path.name))


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


def set_aside(path: Path) -> Path:
    """Rename what is damaged, so that it can be made again and nothing is lost; returns its new path."""
    name = f"{path.name}.damaged"
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(name if n == 1 else f"{name}-{n}")).exists())
    return path.rename(aside)


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


def _seal_is_misspelt(value: Mapping[str, Any]) -> bool:
    """Whether an object's checksum stands under another key, which damage to the key alone leads to."""
    maybe = [key for key, entry in value.items() if isinstance(entry, str) and entry.startswith("sha256:")]
    return any(value[key] == _seal({k: entry for k, entry in value.items() if k != key}) for key in maybe)


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
        fits = told == _seal(value) if told is not None else not _seal_is_misspelt(value)
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
