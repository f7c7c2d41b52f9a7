"""The file that a table's path names, and why it cannot be read: other systems' paths, other spellings, pipes."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from functools import lru_cache
from pathlib import Path

from latent_medi.shards.importing.rejected import Rejected

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def image_path(root: Path, name: str) -> Path:
    """The path of an image; backslashes separate folders where no file has them in its name."""
    path = root / name
    return root / name.replace("\\", "/") if "\\" in name and not path.exists() else path


def read_image(root: Path, name: str) -> bytes:
    """An image file's content.

    Raises:
        OSError: It cannot be read, or is no file: reading a pipe or a device may wait for ever.
    """
    path = image_path(root, name)
    check_file(path)
    return path.read_bytes()


def check_file(path: Path) -> None:
    """Refuse what is no regular file.

    Raises:
        OSError: It is none, or does not exist.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a folder" if stat.S_ISDIR(mode) else "is a pipe or device, not a file")


def unreadable(root: Path, name: str, error: OSError) -> Rejected:
    """The rejection of an image that cannot be read, with its reason and remedy.

    Args:
        root: Folder that paths are relative to.
        name: The path as the table has it.
        error: What reading it raised.
    """
    reason = error.strerror or str(error)
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return Rejected(name, reason)
    relative = "Give paths relative to a folder, and that folder with root=…"
    if _WINDOWS.match(name):
        return Rejected(name, "is a path of a Windows drive, not to be found here", f"{relative} (now {root}).")
    path = image_path(root, name)
    if other := _spellings(path.parent).get(_plain(path.name)):
        return Rejected(
            name, f"is spelled otherwise: the file is {other!r}", "Write names as the files have them, also their case."
        )
    if os.path.isabs(name):
        return Rejected(name, "is not there any more", f"{relative}.")
    return Rejected(name, reason, f"Paths are relative to root=…, now {root}.")


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(maxsize=8)
def _spellings(folder: Path) -> dict[str, str]:
    try:
        return {_plain(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}
