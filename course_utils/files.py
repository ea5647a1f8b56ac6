"""Put a finished file or folder into its place, on Windows too."""

from __future__ import annotations

import os
import time
from pathlib import Path

PATIENCE_S = 10.0  # a virus scanner or an indexer lets go of a new file within that


def replace(source: str | Path, target: str | Path) -> None:
    """`os.replace`, which takes the other's place at once, tried again while refused.

    Windows refuses as long as any process has one of the two open; elsewhere the first
    attempt settles it.

    Args:
        source: a file or folder.
        target: where it goes, on the same disk.

    Raises:
        OSError: what `os.replace` raised, at last.
    """
    limit, pause = time.monotonic() + PATIENCE_S, 0.01
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > limit:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
