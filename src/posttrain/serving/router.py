"""The router g(z): API key -> tenant -> channel -> release -> adapter, or a refusal. There is no default and no fallback."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from posttrain.errors import BindingError, ContractError, PermissionDenied, PosttrainError
from posttrain.releases import Channels, Kind, Release, check_binding
from posttrain.serving.keys import AccessFile, Caller

_RETRY_SECONDS = 30.0  # how long a release that could not be loaded is left alone while its channel stays


class RoutingReason(StrEnum):
    """Where a request went, or why it went nowhere."""

    ROUTED = "routed"  # to the release the tenant's channel points at
    NO_KEY = "no_key"  # the request carries no API key
    UNKNOWN_KEY = "unknown_key"  # the key is not one that was issued, or it was revoked
    UNKNOWN_TENANT = "unknown_tenant"  # the key's tenant is not served here
    NO_RELEASE = "no_release"  # the tenant's channel points at nothing yet
    OTHER_MODEL = "other_model"  # `model` names another tenant's release, an old one, or nothing at all
    NOT_SERVABLE = "not_servable"  # the release is altered, unsigned, or made for other weights or another contract


_ANSWERS: Mapping[RoutingReason, tuple[int, str]] = {
    RoutingReason.NO_KEY: (401, "authentication_error"),
    RoutingReason.UNKNOWN_KEY: (401, "authentication_error"),
    RoutingReason.UNKNOWN_TENANT: (403, "permission_error"),
    RoutingReason.NO_RELEASE: (403, "permission_error"),
    RoutingReason.OTHER_MODEL: (404, "invalid_request_error"),
    RoutingReason.NOT_SERVABLE: (503, "server_error"),
}


class Refused(PermissionDenied):
    """The router's refusal. `reason` says why; `status` and `type` are the answer's; `detail` is for the operator only."""

    def __init__(self, reason: RoutingReason, what: str, *, value: object = None, remedy: str, detail: str = "") -> None:
        super().__init__(what, value=value, remedy=remedy)
        self.reason, self.detail = reason, detail
        self.status, self.type = _ANSWERS[reason]


class ServingModel(Protocol):
    """The loaded model, as the router sees it. Called on the model's thread only, never while a batch runs."""

    @property
    def weights(self) -> str:
        """Fingerprint of the dense weights in memory."""
        ...

    @property
    def contract(self) -> str:
        """Fingerprint of the contract lock that prompts are rendered with."""
        ...

    def adapter_for(self, release_id: str) -> str | None:
        """Name under which the sampler knows the release's adapter, loading it first when needed; None only for a release of
        the dense weights themselves. The name must be the release's own: two releases never share one."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes."""

    tenant: str
    channel: str
    release: str
    adapter: str | None
    weights_sha256: str
    contract: str


@dataclass(frozen=True, slots=True)
class _Resident:
    """What was found for a channel's pointer: a route for its tenants, or why not (then `error`)."""

    release: str
    adapter: str | None = None
    weights_sha256: str = ""
    error: PosttrainError | None = None
    since: float = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to try again; what was made for other weights or another contract stays so."""
        passing = self.error is not None and not isinstance(self.error, BindingError | ContractError)
        return passing and time.monotonic() - self.since >= _RETRY_SECONDS


class Router:
    """Decides by key alone; a request can only confirm the model that its key leads to."""

    def __init__(self, channels: Channels, access: AccessFile, model: ServingModel) -> None:
        self._channels, self._access, self._model = channels, access, model
        self._resident: Mapping[str, _Resident] = {}  # by channel; replaced whole, so readers need no lock

    def authenticate(self, key: str | None) -> Caller:
        """Who calls. Raises Refused without a key or with an unknown one."""
        if not key:
            raise Refused(RoutingReason.NO_KEY, "no API key", remedy="send it as `Authorization: Bearer KEY`")
        caller = self._access.current().caller(key)
        if caller is None:
            raise Refused(RoutingReason.UNKNOWN_KEY, "unknown API key", remedy="ask the operator for a valid one")
        return caller

    def moved(self, caller: Caller) -> bool:
        """Whether some served channel points elsewhere than what is loaded, or the caller's own could not be loaded a while ago; then
        `refresh` must run, for which all wait: no tenant's broken release may ask for it at another's request. Cheap enough per request."""
        pointers = self._channels.pointers()
        wanted = {channel: pointers[channel] for channel in self._served() if channel in pointers}
        own = self._resident.get(self._access.current().tenants.get(caller.tenant, ""))
        return wanted != {channel: resident.release for channel, resident in self._resident.items()} or (
            own is not None and own.due
        )

    def refresh(self) -> None:
        """Load what the served channels point at, each release verified first. On the model's thread.

        A release that cannot be served leaves its own tenants refused and all others served.
        """
        pointers = self._channels.pointers()
        found: dict[str, _Resident] = {}
        for channel in self._served():
            if channel in pointers:
                known = self._resident.get(channel)
                usable = known is not None and known.release == pointers[channel] and not known.due
                found[channel] = known if known is not None and usable else self._load(pointers[channel], found)
        self._resident = found

    def route(self, caller: Caller, model: str) -> Route:
        """The caller's route. Raises Refused when the tenant is not served or `model` is not its own."""
        channel = self._access.current().tenants.get(caller.tenant)
        if channel is None:
            raise Refused(
                RoutingReason.UNKNOWN_TENANT, "this key's tenant is not served here", remedy="ask the operator to add the tenant"
            )
        resident = self._resident.get(channel)
        if resident is None:
            raise Refused(
                RoutingReason.NO_RELEASE, "no release is in service for this tenant", remedy=f"promote one to channel {channel}"
            )
        names = (channel, caller.tenant, resident.release)
        if model not in names:
            raise Refused(
                RoutingReason.OTHER_MODEL,
                "the model does not exist or is not this key's",
                value=model,
                remedy=f"use {' or '.join(dict.fromkeys(names))}",
            )
        if resident.error is not None:
            raise Refused(
                RoutingReason.NOT_SERVABLE,
                f"the tenant's release cannot be served: {resident.error.what}",
                value=resident.release,
                remedy="roll the channel back, or mend the release",
                detail=str(resident.error),
            )
        return Route(caller.tenant, channel, resident.release, resident.adapter, resident.weights_sha256, self._model.contract)

    def models(self, caller: Caller) -> tuple[str, ...]:
        """Names the caller may use as `model`: its channel and the release it points at. Raises Refused as `route` does."""
        channel = self._access.current().tenants.get(caller.tenant, caller.tenant)
        route = self.route(caller, channel)
        return (route.channel, route.release)

    def _served(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._access.current().tenants.values())))

    def _load(self, release_id: str, others: Mapping[str, _Resident]) -> _Resident:
        try:
            release = self._channels.registry.get(release_id)
            check_binding(release, self._model.weights)
            if release.contract.fingerprint != self._model.contract:
                raise ContractError(
                    "the release was made with another contract than the server renders with",
                    where=release.id,
                    value=self._model.contract,
                    remedy=f"serve it with its own: {release.contract.fingerprint}",
                )
            adapter = self._model.adapter_for(release.id)
            _check_adapter(release, adapter, others)
        except PosttrainError as error:
            return _Resident(release_id, error=error, since=time.monotonic())
        except Exception as error:  # whatever a loading library raises, the other tenants stay served
            failed = PosttrainError(f"could not be loaded ({type(error).__name__})", where=release_id, value=str(error))
            return _Resident(release_id, error=failed, since=time.monotonic())
        return _Resident(release_id, adapter, release.weights_sha256)


def _check_adapter(release: Release, adapter: str | None, others: Mapping[str, _Resident]) -> None:
    """An adapter release never runs as the bare base, and never under a name that another release has."""
    if (adapter is None) == (release.lineage.kind is Kind.ADAPTER):
        raise BindingError(
            "the model answered with the wrong kind of weights for the release",
            where=release.id,
            value=adapter,
            remedy="load the release's own adapter; the base is never a substitute",
        )
    for other in others.values():
        if adapter is not None and other.adapter == adapter and other.release != release.id:
            raise BindingError(
                f"its adapter has the name of release {other.release}'s",
                where=release.id,
                value=adapter,
                remedy="name adapters by their release id",
            )
