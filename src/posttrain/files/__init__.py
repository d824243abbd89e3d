"""Files: atomic writes, canonical hashes and the append-only chained log. Everything that must survive a kill is written here."""

from posttrain.files.atomic import atomic_folder, write_bytes, write_json, write_text
from posttrain.files.chainlog import ChainLog, Head
from posttrain.files.hashing import canonical_json, hash_file, hash_folder, sha256_of

__all__ = [
    "ChainLog",
    "Head",
    "atomic_folder",
    "canonical_json",
    "hash_file",
    "hash_folder",
    "sha256_of",
    "write_bytes",
    "write_json",
    "write_text",
]
