"""What data workers need of the system: room in /dev/shm for images on their way, and files that may be open."""

import os
import shutil
from pathlib import Path

from loce.config import DataConfig
from loce.utils.errors import UserError

SHARED = Path("/dev/shm")  # where Linux keeps what a worker hands over
PREFETCH = 3  # micro-batches each worker prepares ahead
OPEN_FILES = 65536
_MB = 10**6


def bytes_ahead(data: DataConfig, images: int, ranks: int = 1) -> int:
    """Most bytes of training images on their way at once, of `ranks` with micro-batches of `images` on one machine.

    Images are uint8, of the largest size that resizing gives. What else a sample has is small.
    """
    return ranks * data.workers * PREFETCH * images * 3 * max(data.short_edges) * data.long_edge


def require_shared_memory(data: DataConfig, images: int, ranks: int = 1, folder: Path = SHARED) -> None:
    """UserError where the images on their way do not fit into `folder`: a worker would die of a bus error.

    images: of a micro-batch; ranks: on this machine.
    """
    if not data.workers or not folder.is_dir():
        return
    needed, free = bytes_ahead(data, images, ranks), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data.workers = {data.workers}: {ranks} processes with micro-batches of {images} images need up to "
            f"{needed / _MB:,.0f} MB in {folder}, which has {free / _MB:,.0f} MB free; in Docker start the container "
            f"with --shm-size={2 * needed // _MB + 1}m (or --ipc=host), else fewer workers; data.workers=0 needs none"
        )


def allow_open_files() -> None:
    """Raise this process's limit of open files where it may: every tensor that a worker hands over is an open file."""
    if os.name == "posix":
        import resource  # there is none on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
