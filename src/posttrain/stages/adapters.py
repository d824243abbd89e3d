"""Stage 2, parameter-efficient specialisation: one small adapter per tenant on the one accepted base, from the tenant's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from posttrain.data.records import Conversation
from posttrain.errors import DataError
from posttrain.stages import sft
from posttrain.stages.bench import Log, Workbench, derive

AdapterOptions = sft.SftOptions


def run(options: AdapterOptions, by_tenant: Mapping[str, Sequence[Conversation]], bench: Workbench) -> dict[str, str | None]:
    """Train one adapter per tenant, named after it, each from that tenant's records only. Returns early-stop reasons by tenant.

    A record of another tenant in a tenant's data is an error: the adapter would carry it across the boundary.
    """
    for tenant, conversations in by_tenant.items():  # everything is checked before anything is trained
        strangers = [c.id for c in conversations if c.tenant != tenant]
        if strangers:
            raise DataError(
                f"{len(strangers)} record(s) of other tenants in the data of {tenant}: {', '.join(strangers[:3])}",
                where=f"adapters.{tenant}",
                remedy="give each tenant's adapter its own records only",
            )
        sft.check(options, conversations, bench)
    stopped = {}
    for tenant, conversations in by_tenant.items():
        own = replace(
            bench,
            folder=bench.folder / tenant,
            identity=f"{bench.identity}/{tenant}",
            seed=derive(bench.seed, tenant),
            log=_as_phase(tenant, bench.log),
        )
        stopped[tenant] = sft.run(options, conversations, own, name=tenant)
    return stopped


def _as_phase(tenant: str, log: Log) -> Log:
    """Each tenant's steps are a phase of their own, or they would be taken for one run's."""

    def logged(phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        log(tenant, step, total, metrics)

    return logged
