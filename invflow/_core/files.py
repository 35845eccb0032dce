"""Files written whole or not at all, with the user's permissions; folders that one run has to itself."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock: nothing is locked there, and no orphan removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone_in", "check_writable", "remove_orphans", "write_atomically"]

#: ends the name of a file that is being written
_SUFFIX = ".partial"
#: less free space than this is a full disk, and nothing is begun
_LEAST_SPACE = 2**20
_UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES}
#: folders whose orphans this process has removed
_CLEANED: set[str] = set()


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary_path)`` beside ``path``, then rename: readers see the old file or the new, never half.

    A new file gets the permissions that the user's umask leaves, and one that is replaced keeps its own. What a killed
    process left half-written in the folder is removed.

    Raises:
        OSError: if the file cannot be written, naming it and the reason.
    """
    path = Path(path)
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_once(path.parent)
        handle, name = _temporary(path)
        try:
            mode = path.stat().st_mode & 0o7777 if path.exists() else os.fstat(handle).st_mode & 0o7777
            write(name)
            os.chmod(name, mode)
            os.replace(name, path)
        finally:
            os.close(handle)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        reason = _reason(error)
        if reason is None:
            raise
        raise OSError(*reason, str(path)) from error


def check_writable(folder: Path) -> None:
    """Make a folder if it is not there, and find out that files can be written into it, before work is spent on them.

    Raises:
        OSError: if they cannot, naming the folder and the reason; also where less than a megabyte is free.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
        if shutil.disk_usage(folder).free < _LEAST_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        reason = f"nothing can be written into this folder, pass another: {error.strerror}"
        raise OSError(error.errno, reason, str(folder)) from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep a folder for this run until the block ends, or the process does, however it does.

    The folder itself is locked (flock), so that nothing is left behind. What killed runs left half-written in it and
    below is removed. On file systems that lock nothing, the block runs unlocked.

    Raises:
        ValueError: if another run has it.
        OSError: if nothing can be written there; see :func:`check_writable`.
    """
    check_writable(folder)
    handle = _lock_folder(folder)
    try:
        for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            remove_orphans(below)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def remove_orphans(folder: Path) -> None:
    """Remove the half-written files in a folder whose writers are gone; those being written are locked, and stay."""
    if fcntl is None:
        return
    for path in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # taken by its writer, or gone already
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def _clean_once(folder: Path) -> None:
    key = os.path.realpath(folder)
    if key not in _CLEANED:
        _CLEANED.add(key)
        remove_orphans(folder)


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside a path, made with the user's umask and locked while it is open."""
    while True:
        name = str(path.parent / f".{path.name}.{os.urandom(6).hex()}{_SUFFIX}")
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is None or not _try_lock(handle):
            return handle, name
        if os.path.exists(name):  # between its making and its locking nobody took it for an orphan
            return handle, name
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock an open file; whether its file system can."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _lock_folder(folder: Path) -> int | None:
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in _UNSUPPORTED:
            return None
        raise ValueError(f"another run is at work in {folder}: wait until it has ended, or pass another folder") \
            from error
    return handle


def _reason(error: BaseException) -> tuple[int, str] | None:
    """Number and text of an error of the operating system, also where safetensors wrapped it; None of any other."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or os.strerror(error.errno)
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "(os error " in text:
        number = int(text.rpartition("(os error ")[2].split(")")[0])
        return number, os.strerror(number)
    return None
