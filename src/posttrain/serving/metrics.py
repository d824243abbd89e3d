"""Counters in Prometheus' text format. Labels are the served tenants and decisions: few, and never taken from a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from posttrain.serving.audit import AuditRecord

_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts finished requests. Used from the event loop only."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._buckets = [0] * len(_BUCKETS)
        self._seconds, self._count = 0.0, 0

    def count(self, record: AuditRecord) -> None:
        tenant, seconds = record.tenant or "", record.latency_ms / 1000
        self._requests[tenant, record.decision.value] += 1
        self._tokens[tenant, "prompt"] += record.prompt_tokens
        self._tokens[tenant, "completion"] += record.completion_tokens
        self._seconds += seconds
        self._count += 1
        for index, bound in enumerate(_BUCKETS):
            self._buckets[index] += seconds <= bound

    def text(self, waiting: int, *, by_tenant: bool) -> str:
        """The page, with a label for the tenant or over all of them; `waiting` is the queue's present length."""
        return "\n".join(self._lines(waiting, by_tenant)) + "\n"

    def _lines(self, waiting: int, by_tenant: bool) -> Iterator[str]:
        yield "# HELP posttrain_requests_total Requests by decision, and by tenant for who holds the metrics key."
        yield "# TYPE posttrain_requests_total counter"
        yield from _counts("posttrain_requests_total", "decision", self._requests, by_tenant)
        yield "# HELP posttrain_tokens_total Tokens read and written, by tenant for who holds the metrics key."
        yield "# TYPE posttrain_tokens_total counter"
        yield from _counts("posttrain_tokens_total", "kind", self._tokens, by_tenant)
        yield "# HELP posttrain_request_seconds Time from a request's arrival to its answer."
        yield "# TYPE posttrain_request_seconds histogram"
        for bound, count in zip(_BUCKETS, self._buckets, strict=True):
            yield f'posttrain_request_seconds_bucket{{le="{bound}"}} {count}'
        yield f'posttrain_request_seconds_bucket{{le="+Inf"}} {self._count}'
        yield f"posttrain_request_seconds_sum {self._seconds:.6f}"
        yield f"posttrain_request_seconds_count {self._count}"
        yield "# HELP posttrain_waiting_requests Requests in the queue."
        yield "# TYPE posttrain_waiting_requests gauge"
        yield f"posttrain_waiting_requests {waiting}"


def _counts(name: str, label: str, counts: Counter[tuple[str, str]], by_tenant: bool) -> Iterator[str]:
    """One line for each pair of a tenant and a value of the label, or for each value alone."""
    shown: Counter[str] = Counter()
    for (tenant, value), count in counts.items():
        shown[(f'tenant="{_escaped(tenant)}",' if by_tenant else "") + f'{label}="{value}"'] += count
    yield from (f"{name}{{{labels}}} {count}" for labels, count in sorted(shown.items()))


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
