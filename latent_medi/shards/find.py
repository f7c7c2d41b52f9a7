"""Files below a folder, links followed: what cannot be used is named, and only hidden files are left alone."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from latent_medi.errors import UserError
from latent_medi.progress import get_logger

logger = get_logger(__name__)

_KINDS = (
    (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
_FILE_ENDING = re.compile(r"\.[A-Za-z]\w{1,4}")
_MOST_NAMED = 10


@dataclass
class Found:
    """What a search gave.

    Args:
        files: Regular files with one of the endings, sorted by path; a link keeps the path by which it was found.
        left_out: Path and reason of what has one of the endings, or is a folder, and cannot be used: dangling links,
            pipes, sockets, devices, folders that may not be searched, names that are not UTF-8 (made printable).
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def find_files(folder: Path, endings: tuple[str, ...]) -> Found:
    """Every file below ``folder`` with one of the endings.

    Links are followed; a folder that a link leads back into is not searched again. Hidden files and folders, such as
    the ``._`` files that macOS writes beside every file, are left alone; how many is logged.

    Args:
        folder: Where to search.
        endings: In lower case, with their dot; the case of a file's ending does not matter.

    Raises:
        UserError: There is no such folder, or it may not be searched.
    """
    folder = Path(folder)
    try:
        status = folder.stat()
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be searched: {error.strerror}.", "Check the path.") from None
    search = _Search(endings)
    waiting = [(folder, frozenset({(status.st_dev, status.st_ino)}))]
    while waiting:  # no recursion: a folder may be deeper than Python's stack
        waiting.extend(search.one(*waiting.pop()))
    search.tell(folder)
    return Found(sorted(search.found.files), sorted(search.found.left_out))


class _Search:
    def __init__(self, endings: tuple[str, ...]) -> None:
        self.endings = endings
        self.found = Found()
        self.hidden_files, self.hidden_folders, self.loops = 0, list[Path](), list[Path]()

    def one(self, folder: Path, above: frozenset[tuple[int, int]]) -> list[tuple[Path, frozenset[tuple[int, int]]]]:
        """Search one folder, not those in it, which are returned, each with the identities of all folders above it."""
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            self.found.left_out.append((folder, f"the folder cannot be searched: {error.strerror}"))
            return []
        deeper = []
        for name in names:
            path = folder / name
            wanted = path.suffix.lower() in self.endings
            try:
                status = path.stat()
            except OSError as error:
                # Without the ending of another kind of file it may have been a folder.
                if not name.startswith(".") and (wanted or not _FILE_ENDING.fullmatch(path.suffix)):
                    self._leave_out(path, _why_not(path, error))
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if name.startswith("."):
                if is_folder:
                    self.hidden_folders.append(path)
                else:
                    self.hidden_files += wanted
            elif not (is_folder or wanted):
                continue
            elif not _is_text(name):
                self._leave_out(path, "its name is not UTF-8: rename it")
            elif is_folder:
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    self.loops.append(path)
                else:
                    deeper.append((path, above | {identity}))
            elif kind := next((word for check, word in _KINDS if check(status.st_mode)), ""):
                self._leave_out(path, f"{kind}, not a file")
            else:
                self.found.files.append(path)
        return deeper

    def _leave_out(self, path: Path, why: str) -> None:
        self.found.left_out.append((Path(_printable(path)), why))

    def tell(self, folder: Path) -> None:
        if self.hidden_files:
            logger.info("hidden files in %s, such as ._ files of macOS, are left alone: %d", folder, self.hidden_files)
        for paths, what in ((self.hidden_folders, "hidden"), (self.loops, "a link to a folder that it lies in")):
            for path in paths[:_MOST_NAMED]:
                logger.info("%s is %s: not searched", _printable(path), what)
            if len(paths) > _MOST_NAMED:
                logger.info("… and %d more such folders", len(paths) - _MOST_NAMED)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _why_not(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return f"a link to {_printable(Path(os.readlink(path)))}, which is not there or out of reach"
    return f"cannot be looked at: {error.strerror}"
