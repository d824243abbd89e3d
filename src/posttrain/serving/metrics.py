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

    def text(self, waiting: int) -> str:
        """The page; `waiting` is the queue's present length."""
        return "\n".join(self._lines(waiting)) + "\n"

    def _lines(self, waiting: int) -> Iterator[str]:
        yield "# HELP posttrain_requests_total Requests by tenant and decision."
        yield "# TYPE posttrain_requests_total counter"
        for (tenant, decision), count in sorted(self._requests.items()):
            yield f'posttrain_requests_total{{tenant="{_escaped(tenant)}",decision="{decision}"}} {count}'
        yield "# HELP posttrain_tokens_total Tokens read and written, by tenant."
        yield "# TYPE posttrain_tokens_total counter"
        for (tenant, kind), count in sorted(self._tokens.items()):
            yield f'posttrain_tokens_total{{tenant="{_escaped(tenant)}",kind="{kind}"}} {count}'
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


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
