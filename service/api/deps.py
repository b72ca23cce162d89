"""What handlers ask for: the platform, the caller, the page of a list."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated

from fastapi import Depends, Request

from service.auth import Caller
from service.errors import InvalidRequest
from service.platform import Platform


def get_platform(request: Request) -> Platform:
    """The platform that the app was built with."""
    platform: Platform = request.app.state.platform
    return platform


PlatformDep = Annotated[Platform, Depends(get_platform)]


async def no_body(request: Request) -> None:
    """InvalidRequest for a body that the route would otherwise drop silently."""
    if (await request.body()).strip() not in (b"", b"{}", b"null"):
        raise InvalidRequest("This request takes no body.", code="invalid_body")


@cache
def caller(*scopes: str) -> Callable[[Request], Caller]:
    """A dependency that returns the caller if its key holds any of the scopes (admin holds all); 403 otherwise.

    The middleware has authenticated the request before any route was looked up, so nothing is read here.
    """

    async def check(request: Request) -> Caller:
        who: Caller = request.state.caller
        who.require(*scopes)
        return who

    return check  # type: ignore[return-value]  # FastAPI awaits it; handlers see the Caller


AdminDep = Annotated[Caller, Depends(caller("admin"))]
FilesDep = Annotated[Caller, Depends(caller("files"))]
JobsDep = Annotated[Caller, Depends(caller("jobs"))]
ModelsDep = Annotated[Caller, Depends(caller("models"))]
ModelsReadDep = Annotated[Caller, Depends(caller("models", "inference"))]  # whoever may call a model may see it
InferenceDep = Annotated[Caller, Depends(caller("inference"))]
