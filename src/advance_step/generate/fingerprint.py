"""What tells one model's files from another's: all of their bytes."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

# Of a model's directory: what transformers may read. Its README and the like do not matter.
SUFFIXES = {".json", ".jinja", ".safetensors", ".bin", ".pt", ".model", ".txt", ".tiktoken", ".gguf", ".py"}


def cache_directory() -> Path:
    """Where unpacked models are kept: $XDG_CACHE_HOME/advance-step, or ~/.cache/advance-step."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advance-step"


def model_fingerprint(model: Path) -> str:
    """Of a file, or of the files in a directory with their names; the same wherever they lie."""
    if model.is_file():
        return file_fingerprint(model)
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.is_file() and file.suffix in SUFFIXES:
            digest.update(f"{file.name} {file_fingerprint(file)}\n".encode())
    return digest.hexdigest()


def file_fingerprint(file: Path) -> str:
    """The SHA-256 of a file. It is read once: kept in the cache until the file is replaced or written to."""
    found = file.stat()
    # A change of the content cannot leave the time of the last change of the inode as it was.
    key = f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
    kept = cache_directory() / "sha256" / key
    if kept.is_file() and len(known := kept.read_text()) == 64:
        return known
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    with suppress(OSError):  # a cache that cannot be written to costs the reading again, and nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(digest.hexdigest())
    return digest.hexdigest()
