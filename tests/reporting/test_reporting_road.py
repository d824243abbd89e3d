"""The road's picture: what is drawn lies within it."""

from __future__ import annotations

import re

from posttrain.reporting import road_svg


def stage(name: str, releases: dict[str, str]) -> dict[str, object]:
    return {"name": name, "kind": name, "verdict": "real_gain", "accepted": True, "releases": releases}


def test_the_channels_of_the_last_stage_have_room() -> None:
    tenants = {f"a_tenant_with_a_name_{i}": f"r-{i}" for i in range(3)}
    few, many = (road_svg("base", [stage("sft", {"main": "r"}), stage("adapters", own)], own) for own in ({"x": "r-x"}, tenants))
    flag = re.search(r'class="flag" x="([0-9.]+)"[^>]*>([^<]+)<', many)
    assert flag is not None and all(name in flag[2] for name in tenants)
    middle, width = float(flag[1]), float(re.search(r'viewBox="0 0 ([0-9]+) ', many)[1])  # type: ignore[index]
    assert middle + len(flag[2]) * 6 / 2 < width  # letters of 11 px are about 6 wide
    assert width > float(re.search(r'viewBox="0 0 ([0-9]+) ', few)[1])  # type: ignore[index]
