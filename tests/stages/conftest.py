from __future__ import annotations

from pathlib import Path

import pytest
from workshop import Shop

from posttrain.contract import Contract


@pytest.fixture
def shop(contract: Contract, tmp_path: Path) -> Shop:
    return Shop(contract, tmp_path)
