from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_house import House, running


@pytest.fixture
def still(tmp_path: Path) -> House:
    """A house whose server is not running yet."""
    return House(tmp_path)


@pytest.fixture
def house(still: House) -> Iterator[House]:
    with running(still):
        yield still
