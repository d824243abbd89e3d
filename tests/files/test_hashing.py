"""Hashes are the same on every machine and refuse what has no single form."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import DataError, IntegrityError, StorageError
from posttrain.files.hashing import canonical_json, hash_file, hash_folder, sha256_of

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def test_canonical_json_is_sorted_compact_utf8() -> None:
    assert (
        canonical_json({"b": [1, 2.5, None, True], "a": "汉\n", "c": ()}) == '{"a":"汉\\n","b":[1,2.5,null,true],"c":[]}'.encode()
    )


def test_the_hash_of_a_value_is_the_sha256_of_its_canonical_bytes() -> None:
    assert sha256_of({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()
    assert sha256_of(1) != sha256_of(1.0) != sha256_of("1")


@given(_VALUES)
def test_a_round_trip_through_json_does_not_change_the_hash(value: object) -> None:
    assert sha256_of(json.loads(canonical_json(value))) == sha256_of(value)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), _SCALARS, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, object], random: object) -> None:
    items = list(value.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert canonical_json(dict(items)) == canonical_json(value)


@pytest.mark.parametrize("value", [float("nan"), [float("-inf")], {"a": {1: 2}}, [{None: 1}], {"a": b"x"}, {1, 2}, "\ud800"])
def test_what_has_no_single_form_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="canonical"):
        canonical_json(value)


def test_a_files_hash_is_that_of_its_bytes_and_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(StorageError, match=r"missing.*cannot be read"):
        hash_file(tmp_path / "missing")


def test_a_folders_hashes_cover_every_file_by_its_relative_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"b")
    (tmp_path / "z").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"h")
    assert list(hash_folder(tmp_path)) == [".hidden", "sub/b", "z"]
    assert hash_folder(tmp_path)["sub/b"] == hashlib.sha256(b"b").hexdigest()


def test_a_link_to_a_file_counts_as_its_content_but_a_linked_folder_or_pipe_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"o")
    (folder / "link").symlink_to(tmp_path / "outside")
    assert hash_folder(folder) == {"link": hashlib.sha256(b"o").hexdigest()}
    os.mkfifo(folder / "pipe")
    with pytest.raises(IntegrityError, match="pipe"):
        hash_folder(folder)
    (folder / "pipe").unlink()
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(IntegrityError, match="linked"):
        hash_folder(folder)


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        hash_folder(tmp_path / "nowhere")
