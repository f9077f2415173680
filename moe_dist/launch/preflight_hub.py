"""Check that a data set of the Hugging Face hub can be had, before any rank starts: from the cache or the network."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from moe_dist.config import RunConfig

SECONDS = 1.0
HUB = "https://huggingface.co"


def hub_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for every data set that is neither a folder nor in the cache, if the hub does not answer."""
    for name, source in config.corpus.by_source.items():
        data_set = source.name
        if source.kind != "hub" or data_set is None or os.path.exists(data_set) or _is_cached(data_set):
            continue
        endpoint = os.environ.get("HF_ENDPOINT", HUB)
        if not _answers(endpoint):
            key = f"corpus.sources.{name}" if name else "corpus"
            yield (
                f"{key}.name={data_set} is no folder and not in the cache of Hugging Face, and {endpoint} does not "
                "answer: run once where there is a network and share that cache (HF_HOME), or give local files"
            )


def _is_cached(data_set: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    downloads = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"datasets--{data_set.replace('/', '--')}"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")) / data_set.replace("/", "___")
    return downloads.is_dir() or prepared.is_dir()


def _answers(endpoint: str) -> bool:
    """Return True if a server accepts a connection; a name server that hangs is not waited for."""
    parts, found = urlsplit(endpoint), list[bool]()

    def connect() -> None:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=SECONDS).close()
            found.append(True)
        except OSError:
            return

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(found)
