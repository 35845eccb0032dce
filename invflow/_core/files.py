"""Atomic writing of files with the user's permissions, and folders locked for a single run."""

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
except ImportError:  # pragma: no cover - Windows has no flock: nothing is locked and no orphan is removed there
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone_in", "check_writable", "remove_orphans", "write_atomically", "write_text"]

#: ending of the name of a file that is being written
_SUFFIX = ".partial"
#: with less free space than this the disk counts as full, and no work is started
_LEAST_SPACE = 2**20
_UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES}
#: folders whose orphans this process has removed
_CLEANED: set[str] = set()


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary_path)`` in the folder of ``path``, then rename the file.

    Readers see the complete old file or the complete new one. A new file gets the permissions that the user's umask
    allows, and a replaced file keeps its permissions. Half-written files that a killed process left in the folder are
    removed.

    Raises:
        OSError: If the file cannot be written, with its name and the reason.
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


def write_text(path: Path, text: str) -> None:
    """Write text as a whole, in UTF-8; see :func:`write_atomically`."""
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def check_writable(folder: Path) -> None:
    """Create a folder if needed, and check before the work begins that files can be written into it.

    Raises:
        OSError: If they cannot, with the folder and the reason; also if less than a megabyte is free.
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
        reason = f"cannot write into this folder, pass another: {error.strerror}"
        raise OSError(error.errno, reason, str(folder)) from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Reserve a folder for this run until the block or the process ends, whichever way it ends.

    The folder itself is locked (flock), so no lock file is left behind. Half-written files that killed runs left in it
    and its subfolders are removed. On file systems without locks, the block runs unlocked.

    Raises:
        ValueError: If another run has locked the folder.
        OSError: If the folder is not writable; see :func:`check_writable`.
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
    """Remove half-written files whose writers have ended. Files that are still being written are locked, and stay."""
    if fcntl is None:
        return
    for path in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # renamed by its writer, or removed already
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
    """Create a file in the folder of ``path``, with the user's umask, locked while it is open."""
    while True:
        name = str(path.parent / f".{path.name}.{os.urandom(6).hex()}{_SUFFIX}")
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is None or not _try_lock(handle):
            return handle, name
        if os.path.exists(name):  # no other process removed it as an orphan before it was locked
            return handle, name
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock an open file. Returns whether its file system supports locks."""
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
        raise ValueError(f"another run is using {folder}: wait until it has ended, or pass another folder") \
            from error
    return handle


def _reason(error: BaseException) -> tuple[int, str] | None:
    """Number and text of an operating-system error, also if safetensors wrapped it; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or os.strerror(error.errno)
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "(os error " in text:
        number = int(text.rpartition("(os error ")[2].split(")")[0])
        return number, os.strerror(number)
    return None
