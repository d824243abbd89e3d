"""With a key required, only what that key signed is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from release_making import Made

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

from posttrain.errors import IntegrityError, RegistryError
from posttrain.releases import Registry, Release


def write_pair(folder: Path, name: str) -> tuple[Path, Path]:
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path, "ours")


def test_a_signed_release_opens_with_its_key_and_without(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    release = Release.build(tmp_path / "out", Made(tmp_path / "w").parts(), sign_with=pair[0])
    assert Release.open(release.folder, key=pair[1]).id == Release.open(release.folder).id


def test_signing_does_not_change_the_id_and_may_come_later(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    parts = Made(tmp_path / "w").parts()
    unsigned = Release.build(tmp_path / "out", parts)
    with pytest.raises(IntegrityError, match="not signed and a key is required"):
        Release.open(unsigned.folder, key=pair[1])
    assert Release.build(tmp_path / "out", parts, sign_with=pair[0]).id == unsigned.id
    Release.open(unsigned.folder, key=pair[1])


def test_a_signature_by_another_key_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    release = Release.build(tmp_path / "out", Made(tmp_path / "w").parts(), sign_with=write_pair(tmp_path, "theirs")[0])
    with pytest.raises(IntegrityError, match="signature does not match"):
        Release.open(release.folder, key=pair[1])


def test_a_signature_moved_to_another_release_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    signed = Release.build(tmp_path / "out", Made(tmp_path / "w").parts(), sign_with=pair[0])
    other = Release.build(tmp_path / "out", Made(tmp_path / "w", fill=2.0).parts())
    (other.folder / "manifest.sig.json").write_bytes((signed.folder / "manifest.sig.json").read_bytes())
    with pytest.raises(IntegrityError, match="signature does not match"):
        Release.open(other.folder, key=pair[1])


@pytest.mark.parametrize(
    "data", [b"{}", b'{"algorithm":"none","key":"","signature":""}', b'{"algorithm":"ed25519","key":"","signature":"zz"}', b"[]"]
)
def test_an_unreadable_signature_is_refused(tmp_path: Path, pair: tuple[Path, Path], data: bytes) -> None:
    release = Release.build(tmp_path / "out", Made(tmp_path / "w").parts())
    (release.folder / "manifest.sig.json").write_bytes(data)
    with pytest.raises(IntegrityError, match="signature cannot be read"):
        Release.open(release.folder, key=pair[1])


def test_a_registry_with_a_key_serves_signed_releases_only(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    registry = Registry(tmp_path / "registry", pair[1])
    signed = registry.build(Made(tmp_path / "w").parts(), sign_with=pair[0])
    assert registry.get(signed.id).id == signed.id
    unsigned = Registry(registry.root).build(Made(tmp_path / "w", fill=3.0).parts())
    with pytest.raises(IntegrityError, match="not signed"):
        registry.get(unsigned.id)
    with pytest.raises(RegistryError):
        registry.get("r-0000000000000000")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN NONSENSE-----", None])
def test_a_file_that_is_no_ed25519_key_says_how_to_make_one(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    release = Release.build(tmp_path / "out", Made(tmp_path / "w").parts())
    with pytest.raises(IntegrityError, match="openssl genpkey"):
        Release.open(release.folder, key=path)
    with pytest.raises(IntegrityError, match="openssl genpkey"):
        Release.build(tmp_path / "out", Made(tmp_path / "w").parts(), sign_with=path)


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    key = x25519.X25519PrivateKey.generate()
    path = tmp_path / "x.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(IntegrityError, match="another kind of key"):
        Release.build(tmp_path / "out", Made(tmp_path / "w").parts(), sign_with=path)
