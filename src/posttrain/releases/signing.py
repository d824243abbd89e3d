"""Optional ed25519 signatures over the manifest: who vouches for a release, checked with a key the reader already has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from posttrain.errors import IntegrityError, PosttrainError
from posttrain.files.atomic import write_json
from posttrain.releases.manifest import MANIFEST, SIGNATURE, read_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_ALGORITHM = "ed25519"


def sign(folder: Path, private_key: Path) -> None:
    """Write `manifest.sig.json`. `private_key` is a PEM file (PKCS8, as `openssl genpkey -algorithm ed25519` writes)."""
    key = _private(private_key)
    signature = key.sign((folder / MANIFEST).read_bytes())
    write_json(folder / SIGNATURE, {"algorithm": _ALGORITHM, "key": _key_id(key.public_key()), "signature": signature.hex()})


def verify_signature(folder: Path, public_key: Path) -> None:
    """Raise IntegrityError unless the folder's manifest carries a valid signature by this key (a PEM file)."""
    key, where = _public(public_key), str(folder / SIGNATURE)
    from cryptography.exceptions import InvalidSignature

    if not (folder / SIGNATURE).exists():
        raise IntegrityError(
            "the release is not signed and a key is required", where=str(folder), remedy=f"sign it with the key {_key_id(key)}"
        )
    value = read_json(folder / SIGNATURE)
    try:
        if value["algorithm"] != _ALGORITHM:
            raise ValueError(f"algorithm {value['algorithm']!r}")
        key.verify(bytes.fromhex(value["signature"]), (folder / MANIFEST).read_bytes())
    except InvalidSignature as error:
        raise IntegrityError(
            "the signature does not match the manifest and key",
            where=where,
            value=value["key"],
            remedy=f"the required key is {_key_id(key)}; the release was altered or signed by another",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the signature cannot be read ({error})", where=where, remedy="sign the release again") from error


def _key_id(key: Ed25519PublicKey) -> str:
    return key.public_bytes_raw().hex()[:16]


def _private(path: Path) -> Ed25519PrivateKey:
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise _bad_key(path, "private", error) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _bad_key(path, "private", TypeError("another kind of key"))
    return cast("Ed25519PrivateKey", key)


def _public(path: Path) -> Ed25519PublicKey:
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise _bad_key(path, "public", error) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _bad_key(path, "public", TypeError("another kind of key"))
    return cast("Ed25519PublicKey", key)


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise PosttrainError(
            "signing needs the package `cryptography`", where="signing", remedy="pip install cryptography"
        ) from error
    return ed25519, serialization


def _bad_key(path: Path, side: str, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"not an ed25519 {side} key in PEM ({error})",
        where=str(path),
        remedy="openssl genpkey -algorithm ed25519 makes one; openssl pkey -pubout writes its public half",
    )
