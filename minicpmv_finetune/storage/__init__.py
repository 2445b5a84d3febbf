"""Files and folders by URI: local paths, `s3://` (any S3-compatible server) and `hf://` for base models.

Two guarantees hold everywhere: no incomplete file or folder is visible under its final name (`staged_folder`,
`write_bytes`), and an error message contains the URI, the cause and the remedy. Credentials and the endpoint come from
the environment as boto3 reads it (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, a pod's role).
Kubeflow Pipelines writes `minio://` for its built-in object store; it means the same as `s3://`.

Other packages use only the names below: `storage.read_bytes(uri)`.
"""

from .fetching import WITHOUT_HUB, cache_folder, fetch, hub_reference, read_model_file
from .files import (
    StoredFile,
    expand,
    is_folder,
    list_files,
    open_stream,
    read_bytes,
    remove_file,
    require_no_file,
    size,
    walk,
    write_bytes,
)
from .staging import make_readable, staged_folder, swap_in
from .transfers import FILES_AT_ONCE, check_upload, download_file, file_sha256, kept_beside, upload_file, upload_folder
from .uris import is_object_uri, is_supported, join, local_path, parent, real_path, require_allowed, resolve

__all__ = [
    "FILES_AT_ONCE",
    "WITHOUT_HUB",
    "StoredFile",
    "cache_folder",
    "check_upload",
    "download_file",
    "expand",
    "fetch",
    "file_sha256",
    "hub_reference",
    "is_folder",
    "is_object_uri",
    "is_supported",
    "join",
    "kept_beside",
    "list_files",
    "local_path",
    "make_readable",
    "open_stream",
    "parent",
    "read_bytes",
    "read_model_file",
    "real_path",
    "remove_file",
    "require_allowed",
    "require_no_file",
    "resolve",
    "size",
    "staged_folder",
    "swap_in",
    "upload_file",
    "upload_folder",
    "walk",
    "write_bytes",
]
