"""Which store a URL means. A folder needs no library; one in a bucket is imported only when it is asked for."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from model_delta.errors import Malformed
from model_delta.store import DirectoryStore, InventoriedStore

BUCKETS = ("s3", "gs", "az", "memory")


def open_store(url: str) -> InventoriedStore:
    """The store at `url`: a folder's path or `file://`, `s3://BUCKET/PREFIX`, `gs://`, `az://`, `memory://` (empty at
    first, gone with the process). Credentials and endpoints are read from the provider's environment variables.

    Raises Malformed for another URL, one with a login or query in it, and when obstore is not installed.
    """
    scheme = url.partition("://")[0]
    if scheme == url:
        if not url:
            raise Malformed("store: expected a folder or a URL, found nothing")
        return DirectoryStore(Path(url))
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        # Not repeated in the message: what stands there may be a secret.
        raise Malformed(
            f"store {scheme}://…: expected BUCKET/PREFIX alone, found a login, a query or a fragment; credentials come "
            "from the provider's environment variables"
        )
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise Malformed(f"store {url}: expected file:///ABSOLUTE/PATH")
        return DirectoryStore(Path(unquote(parts.path)))
    if scheme not in BUCKETS:
        raise Malformed(f"store {url}: expected a folder, file://, {', '.join(f'{one}://' for one in BUCKETS)}")
    if not parts.netloc and scheme != "memory":
        raise Malformed(f"store {url}: expected {scheme}://BUCKET/PREFIX, found no bucket")
    try:
        from model_delta.object_store import ObjectStore  # obstore comes with the extra `store`
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise Malformed(f"store {url}: obstore is not installed: pip install 'atoll[store]'") from None
    return ObjectStore(url)
