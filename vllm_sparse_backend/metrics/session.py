"""The directory in which the processes of one server keep their counters.

The process that configures the server makes it and says so in its environment, which the
engine, the workers and further API servers inherit. It also removes it, after a last line
about what ran; directories of processes that were killed are removed by the next to come.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from multiprocessing.util import Finalize
from pathlib import Path

from vllm_sparse_backend.config import announce_session, session_directory
from vllm_sparse_backend.metrics.counters import read_totals

logger = logging.getLogger("vllm.sparse_prefill")

PREFIX = "vllm-sparse-prefill-"
GRACE_SECONDS = 60  # in which a directory's maker must have locked it
# Below 0: after the children have been joined, in a child of multiprocessing too, where
# atexit would not run.
LAST = -100


class Session:
    """A directory made and owned by this process; nobody else may enter it."""

    def __init__(self) -> None:
        _remove_stale(Path(tempfile.gettempdir()))
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
        # Held as long as this process lives: what tells a live directory from a stale one. Of the
        # directory itself, which systemd-tmpfiles then leaves alone; files in it may be aged away.
        self._lock = _open(self.directory)
        with contextlib.suppress(OSError):  # NFS locks no directories, and so removes none
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        Finalize(None, self._end, exitpriority=LAST)

    def _end(self) -> None:
        totals = read_totals(self.directory)
        if totals.infos:  # else no worker came so far
            logger.info("sparse_prefill: %s", totals.summary())
        shutil.rmtree(self.directory, ignore_errors=True)


_own: Session | None = None


def open_session() -> Path:
    """The directory of the server that this process belongs to, made if there is none yet."""
    global _own  # noqa: PLW0603
    announced = session_directory()
    mine = _own is not None and announced == _own.directory
    # A server started by hand from within another one inherits its environment as well, but
    # is no child of multiprocessing.
    inherited = multiprocessing.parent_process() is not None
    if announced is not None and (mine or inherited) and announced.is_dir():
        return announced
    _own = Session()
    announce_session(_own.directory)
    return _own.directory


def _remove_stale(parent: Path) -> None:
    for directory in parent.glob(PREFIX + "*"):
        try:
            status = directory.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < GRACE_SECONDS:
                continue
            lock = _open(directory)
        except OSError:  # gone, or no directory
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # locked
            pass
        finally:
            os.close(lock)


def _open(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
