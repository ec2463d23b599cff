"""Files that survive crashes: write to a temporary name, fsync, rename. Every other package may import this one.

Everything that is kept (token stores, checkpoints, stage records, exports) is published through these functions. A
kill -9 or a power cut leaves the old file, the new one, or a temporary name that the next run removes; never half a
file under its final name. `exclusive` is the one lock of the project.
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
