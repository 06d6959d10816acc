"""Who is calling: API keys, from `--api-key` (tenant `default`) and from Redis. Keys are compared by their sha256."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends
from pydantic import SecretStr
from starlette.requests import HTTPConnection

from common.errors import Forbidden, Unauthorized
from common.store.fleet import FleetStore, digest_of_key
from gateway.dependencies import Services, access_entry, services

DEFAULT_TENANT = "default"
CACHE_S = 10.0
MAX_CACHED = 10_000
LONGEST_KEY = 512


class KeyRing:
    """Tenants of keys, remembered for ten seconds: a revoked key works that much longer."""

    def __init__(
        self, fleet: FleetStore, api_key: SecretStr | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet, self._clock = fleet, clock
        self._own_digest = digest_of_key(api_key.get_secret_value()) if api_key else None
        self._tenants: dict[str, tuple[float, str | None]] = {}
        self._has_keys: tuple[float, bool] | None = None

    async def tenant_of(self, text: str | None) -> str:
        """The tenant of a key; `default` for everybody as long as there are no keys at all.

        Raises:
            Unauthorized: a key is needed and this is none.
            StoreUnavailable: Redis has to be asked and is away.
        """
        if text is not None and len(text) <= LONGEST_KEY:
            digest = digest_of_key(text)
            if self._is_own(digest):
                return DEFAULT_TENANT
            tenant = await self._lookup(digest)
            if tenant is not None:
                return tenant
        if await self.is_open():
            return DEFAULT_TENANT
        problem = "a key is needed: Authorization: Bearer …" if text is None else "this key is not known here"
        raise Unauthorized(problem, code="invalid_api_key")

    async def check_admin(self, text: str | None) -> None:
        """Only who holds `--api-key` may administer, or everybody as long as there are no keys at all.

        Raises:
            Unauthorized, Forbidden
        """
        if text is not None and self._is_own(digest_of_key(text[: LONGEST_KEY + 1])):
            return
        await self.tenant_of(text)
        if not await self.is_open():
            raise Forbidden("only the holder of --api-key may administer", code="admin_only")

    async def is_open(self) -> bool:
        """Whether there are no keys at all."""
        if self._own_digest is not None:
            return False
        now = self._clock()
        if self._has_keys is None or now - self._has_keys[0] >= CACHE_S:
            self._has_keys = (now, bool(await self._fleet.keys()))
        return not self._has_keys[1]

    def forget(self) -> None:
        """Keys were changed through this gateway."""
        self._tenants.clear()
        self._has_keys = None

    def _is_own(self, digest: str) -> bool:
        return self._own_digest is not None and hmac.compare_digest(digest, self._own_digest)

    async def _lookup(self, digest: str) -> str | None:
        now = self._clock()
        cached = self._tenants.get(digest)
        if cached is not None and now - cached[0] < CACHE_S:
            return cached[1]
        if len(self._tenants) >= MAX_CACHED:
            self._tenants.clear()
        tenant = await self._fleet.tenant_of(digest)
        self._tenants[digest] = (now, tenant)
        return tenant


def bearer(connection: HTTPConnection) -> str | None:
    """The key of the Authorization header, None without one."""
    scheme, _, text = connection.headers.get("authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" and text.strip() else None


async def tenant_of(connection: HTTPConnection, services: Annotated[Services, Depends(services)]) -> str:
    """Dependency: the tenant who calls.

    Raises:
        Unauthorized: answered in the shape of the route's other errors.
    """
    tenant = await services.keys.tenant_of(bearer(connection))
    access_entry(connection).tenant = tenant
    return tenant


async def admin(connection: HTTPConnection, services: Annotated[Services, Depends(services)]) -> None:
    """Dependency: only who may administer passes."""
    await services.keys.check_admin(bearer(connection))


Tenant = Annotated[str, Depends(tenant_of)]
