"""Files that survive: write to a temporary name, fsync, rename. The bottom room: every other room may import it.

Everything the system keeps (token stores, checkpoints, stage records, exports) is published through these few
functions, so that a kill -9 or a power cut leaves either the old thing, the new thing, or a temporary name that the
next run removes; never half a file under a final name.
"""

from durable_files.checksums import FolderManifest, sha256_file
from durable_files.publish import (
    TEMPORARY_MARK,
    discard_leftovers,
    fsync_tree,
    publish_folder,
    publish_once,
    publish_text_once,
    read_json,
    temporary_sibling,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "TEMPORARY_MARK",
    "FolderManifest",
    "discard_leftovers",
    "fsync_tree",
    "publish_folder",
    "publish_once",
    "publish_text_once",
    "read_json",
    "sha256_file",
    "temporary_sibling",
    "write_bytes",
    "write_json",
    "write_text",
]
