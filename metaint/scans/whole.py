"""Files and folders that are whole or not there: written aside, then put in place in one step.

In: a path. Out: a place to write in, which takes the path's place once it is whole. A kill at any moment leaves what
was there before or what is new. What a writer has in hand it keeps locked, so that a lock which can be taken tells
that the writer is dead: its leftovers are then cleaned by the next one who writes, or put back where nothing else is.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metaint.errors import StoreError
from metaint.scans.outgoing import writable

try:
    import fcntl
except ImportError:  # no locks there, so that nothing is known of other writers, and their leftovers stay
    fcntl = None

# Of Linux: paths are relative to the working folder, and the two change places.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What tells that the system or its file system cannot exchange.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@contextmanager
def whole_folder(path: Path, what: str, replace: bool = True) -> Iterator[Path]:
    """A folder to write in, which takes the place of `path` once it is whole; StoreError, which names `what`.

    Without `replace` it is an error that something is at `path` by then.
    """
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        restore(path)
        _clean(path)
        aside = _beside(path)
        try:
            aside.mkdir()
            with _locked(aside):
                yield aside
                flush(aside)
                _put(aside, path, replace)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # after an exchange, what was there before
    except OSError as error:
        raise StoreError(f"{what} could not be written to {path} ({error.strerror or error}).") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it, so that an earlier one stays until the new one is whole; or StoreError."""
    aside = _beside(path)
    try:
        _clean(path)
        try:
            with aside.open("w", encoding="utf-8") as file, _locked(aside):
                file.write(writable(text))
                file.flush()
                os.fsync(file.fileno())
                aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path} could not be written ({error.strerror or error}).") from error


def restore(path: Path) -> None:
    """Put back what a kill between two renames left under another name, where nothing is at `path`."""
    with suppress(OSError):
        for old in _leftovers(path, "old"):
            with _locked(old, wait=True):  # its writer may be alive, and between the two
                if old.exists() and not path.exists():
                    old.rename(path)


def flush(folder: Path) -> None:
    """See to it that what was written in a folder is on the disk; OSError where it does not get there."""
    sync = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if os.name == "posix" else None
    if sync is not None:  # one wait for all files: a flush of each takes seconds
        with _opened(folder) as descriptor:
            if sync(descriptor) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return
    for file in folder.rglob("*"):
        with _opened(file) as descriptor:
            os.fsync(descriptor)


def _put(aside: Path, path: Path, replace: bool) -> None:
    """Give a whole folder its name, with what was there before under the name it had."""
    if not replace or not os.path.lexists(path):
        aside.rename(path)
    elif not _exchanged(aside, path):
        _rename_twice(aside, path)
    with suppress(OSError), _opened(path.parent) as descriptor:  # some file systems flush no folder
        os.fsync(descriptor)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two paths have changed places in one step; some systems and file systems have no such step."""
    if os.name != "posix":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in _NO_EXCHANGE:
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _rename_twice(aside: Path, path: Path) -> None:
    """The same in two steps; after a kill between them `restore` finds the old one."""
    old = aside.with_suffix(".old")
    with _locked(path):
        try:
            path.rename(old)
            aside.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


# ---- what a kill leaves -----------------------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")


def _leftovers(path: Path, kind: str) -> list[Path]:
    """What stands beside `path` under the names that are given here, the youngest first."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]+\.{kind}")
    beside = [path.with_name(other) for other in os.listdir(path.parent) if name.fullmatch(other)]
    return sorted(beside, key=lambda leftover: leftover.lstat().st_mtime, reverse=True)


def _clean(path: Path) -> None:
    """Delete what dead writers left beside `path`; what was there before them only where it is needed no more."""
    with suppress(OSError):
        for leftover in _leftovers(path, "new") + (_leftovers(path, "old") if path.exists() else []):
            with suppress(OSError), _locked(leftover) as is_locked:
                if is_locked and leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                elif is_locked:
                    leftover.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Keep a file or folder locked; whether that could be done. The lock ends with the process, however it ends."""
    with _opened(path) as descriptor:
        is_locked = False
        if fcntl is not None:
            with suppress(OSError):  # held by another process, or a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
        yield is_locked


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
