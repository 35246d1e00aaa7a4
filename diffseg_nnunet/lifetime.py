"""Worker processes end with the process they work for, even if that is killed: orphans would go on publishing files."""

from __future__ import annotations

import os
import threading
from multiprocessing import connection, parent_process


def end_with_parent() -> None:
    """Called in a worker: end it as soon as its parent is gone, whatever it is doing. Nothing in the main process."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
