"""Files below a folder, through links; what cannot be used is named, and hidden files are skipped."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger

logger = get_logger(__name__)

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_FILE_ENDING = re.compile(r"\.[A-Za-z]\w{1,4}")
_MOST_NAMED = 10


@dataclass
class Found:
    """The result of a search.

    Args:
        files: Regular files with one of the endings, sorted by path; a link keeps its own path.
        left_out: Path and reason of folders, and of what has one of the endings, that cannot be used: dangling links,
            pipes, sockets, devices, folders without permission, names that are not UTF-8 (made printable).
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def find_files(folder: Path, endings: tuple[str, ...]) -> Found:
    """Every file below ``folder`` with one of the endings.

    Links are followed. A folder is searched once, by its path without a link if it has one below ``folder``; other
    paths to it are logged. Hidden files and folders, such as the ``._`` files of macOS, are skipped; their number is
    logged.

    Args:
        folder: Where to search.
        endings: In lower case, with their dot; the case of a file's ending does not matter.

    Raises:
        UserError: There is no such folder, or it cannot be searched.
    """
    folder = Path(folder)
    try:
        status = folder.stat()
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be searched: {error.strerror}.", "Check the path.") from None
    search = _Search(endings, {(status.st_dev, status.st_ino): folder})
    search.below(folder)
    search.log(folder)
    return Found(sorted(search.found.files), sorted(search.found.left_out))


def without_copies(files: list[Path], folder: Path) -> list[Path]:
    """Files below a folder without further paths to the same file, sorted; the path without a link below it stays."""
    root, real = folder.resolve(), {path: path.resolve() for path in files}
    kept: dict[Path, Path] = {}
    again = []
    for path in sorted(files, key=lambda path: (real[path] != root / path.relative_to(folder), path)):
        first = kept.setdefault(real[path], path)
        again += [] if first is path else [(path, first)]
    if again:
        logger.warning("%s is the same file as %s: it is used once (%d such files)", *again[0], len(again))
    return sorted(kept.values())


class _Search:
    def __init__(self, endings: tuple[str, ...], searched: dict[tuple[int, int], Path]) -> None:
        self.endings = endings
        self.searched = searched
        self.found = Found()
        self.hidden, self.again = list[Path](), list[tuple[Path, Path]]()

    def below(self, folder: Path) -> None:
        """Search a folder and those in it; then those behind links, in the order of their paths."""
        linked = [folder]
        while linked:
            following: list[Path] = []
            for start in sorted(linked):
                waiting = [start] if start == folder or self._is_new(start) else []
                while waiting:  # no recursion: a folder may be deeper than Python's stack
                    for path in self._one(waiting.pop()):
                        if path.is_symlink():
                            following.append(path)
                        elif self._is_new(path):
                            waiting.append(path)
            linked = following

    def _is_new(self, folder: Path) -> bool:
        try:
            status = folder.stat()
        except OSError:  # gone meanwhile; reported when it is searched
            return True
        first = self.searched.setdefault((status.st_dev, status.st_ino), folder)
        if first is not folder:
            self.again.append((folder, first))
        return first is folder

    def _one(self, folder: Path) -> list[Path]:
        """Search one folder; returns the folders in it."""
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
                # Unless it has the ending of another kind of file, it may have been a folder.
                if not name.startswith(".") and (wanted or not _FILE_ENDING.fullmatch(path.suffix)):
                    self._leave_out(path, _why_not(path, error))
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if not (is_folder or wanted):
                continue
            if name.startswith("."):
                self.hidden.append(path)
            elif _printable(path) != str(path):
                self._leave_out(path, "its name is not UTF-8: rename it")
            elif is_folder:
                deeper.append(path)
            elif kind := _KINDS.get(stat.S_IFMT(status.st_mode)):
                self._leave_out(path, f"{kind}, not a file")
            else:
                self.found.files.append(path)
        return deeper

    def _leave_out(self, path: Path, why: str) -> None:
        self.found.left_out.append((Path(_printable(path)), why))

    def log(self, folder: Path) -> None:
        if self.hidden:
            names = ", ".join(_printable(path.relative_to(folder)) for path in self.hidden[:_MOST_NAMED])
            logger.info("%d hidden files and folders in %s are skipped: %s", len(self.hidden), folder, names)
        for path, first in self.again[:_MOST_NAMED]:
            logger.warning("%s is the folder %s again: searched once", _printable(path), _printable(first))
        if (more := len(self.again) - _MOST_NAMED) > 0:
            logger.info("… and %d more such folders", more)


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _why_not(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return f"a link to {_printable(Path(os.readlink(path)))}, which is not there or out of reach"
    return f"cannot be looked at: {error.strerror}"
