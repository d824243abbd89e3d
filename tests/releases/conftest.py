from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.releases import Channels, Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def channels(registry: Registry) -> Channels:
    return Channels(registry)
