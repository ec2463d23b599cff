"""Crash-safe files: write to a temporary name, fsync, rename. Every other package may import this one.

All results (token stores, checkpoints, stage records, exports) are published through these functions. After a kill -9
or a power cut, the final name has the old content or the new content, never half of it. Files with temporary names
may remain; the next run removes them. `exclusive` is the project's lock.
"""

from durable_files.checksums import FolderManifest, sha256_file
from durable_files.lock import HeldError, exclusive, refuse_while_held
from durable_files.processes import ProcessIdentity
from durable_files.publish import (
    TEMPORARY_MARK,
    discard_leftovers,
    fsync_tree,
    publish_folder,
    publish_once,
    publish_text_once,
    read_json,
    temporary_folder,
    temporary_sibling,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "TEMPORARY_MARK",
    "FolderManifest",
    "HeldError",
    "ProcessIdentity",
    "discard_leftovers",
    "exclusive",
    "fsync_tree",
    "publish_folder",
    "publish_once",
    "publish_text_once",
    "read_json",
    "refuse_while_held",
    "sha256_file",
    "temporary_folder",
    "temporary_sibling",
    "write_bytes",
    "write_json",
    "write_text",
]
