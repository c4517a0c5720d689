"""`beit serve`: a model that answers over HTTP, with the numbers that `classify` and `embed` give.

A request's body is a picture's file as it is: there is no form to parse, nothing is fetched, and nothing
touches the disk. Each picture goes through the engine alone, so that an answer does not depend on who else
asks. It listens on this machine only; an address that others reach needs a key.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.metadata import version
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
from cyclopts import Parameter
from cyclopts.types import PositiveInt

from beit.engine import Embedding, Engine, Precision, Prediction, Runtime
from beit.graphs import EmbedPooling, GraphError
from beit.plural import counted

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError:
    raise ValueError('beit serve needs FastAPI and uvicorn: pip install "beit[serve]"') from None

BODY_SECONDS = 30.0  # within which a picture must have come
UNREAD_SECONDS = 2.0  # for what still comes of a picture that is refused
DRAIN_SECONDS = 30  # for the answers that are under way when it is told to stop
AS_BODY = "send a picture's file as the body: curl --data-binary @photo.jpg"
QUERIES = {"/v1/classify": ("top",), "/v1/embed": ("pooling", "layer")}
TOLD = {
    400: "bad_request", 401: "wrong_key", 403: "other_origin", 404: "not_found",
    405: "method_not_allowed", 408: "too_slow", 413: "too_large", 421: "other_host",
    422: "unreadable_picture", 429: "busy",
}  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True)
class Serve:
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, a name that `beit models` lists, or a file of `beit export`."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs a key of yours in $BEIT_API_KEY."""
    port: int = 8000
    """0 takes a free one and tells it."""
    img_size: PositiveInt | None = None
    """Pixels a side that the model sees, if not its own: its tables of positions are resized."""
    max_waiting: PositiveInt = 64
    """Requests at work or waiting; more are answered at once with 429, come again."""
    max_megabytes: PositiveInt = 20
    """Of a picture's file."""
    runtime: Runtime = "auto"
    """What computes; auto is the fastest here that agrees with torch, measured once a model."""
    precision: Precision = "auto"
    """auto is bf16 where the processor has it; int8 is for files of `beit export`."""
    threads: PositiveInt | None = None
    """Of the model; the runtime's choice if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""


class Refused(Exception):
    """A request that is not answered: its HTTP status, and why; unread: its body was not read."""

    def __init__(self, status: int, message: str, unread: bool = True) -> None:
        super().__init__(message)
        self.status, self.message, self.unread = status, message, unread


def serve(settings: Serve) -> None:
    """Answer over HTTP: POST a picture to /v1/classify or /v1/embed."""
    key = os.environ.get("BEIT_API_KEY", "")
    if not key and not _is_this_machine(settings.host):
        raise ValueError(
            f"--host {settings.host} is reached by other machines; set BEIT_API_KEY to a long random text "
            "that callers send as 'Authorization: Bearer KEY', or leave --host out"
        )
    with _listen(settings.host, settings.port) as listening:
        engine = Engine(
            settings.model, settings.runtime, settings.precision, settings.threads,
            device=settings.device, batch_size=1, img_size=settings.img_size,
        )  # fmt: skip
        blank = np.zeros((*engine.image_spec.size, 3), np.uint8)
        with suppress(GraphError):  # a file of other features; else the first answer, which is slow
            next(engine.classify(blank) if engine.has_classifier else engine.embed(blank))
        host, port = listening.getsockname()[:2]
        config = uvicorn.Config(
            make_app(engine, settings, key), log_level="warning", access_log=False, lifespan="off",
            server_header=False, timeout_keep_alive=10, timeout_graceful_shutdown=DRAIN_SECONDS,
        )  # fmt: skip
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        does = "classify" if engine.has_classifier else "embed"
        print(f"{settings.model} in {engine.runtime} {engine.precision} answers at {address}")
        print(f"  curl --data-binary @photo.jpg {address}/v1/{does}", flush=True)
        uvicorn.Server(config).run([listening])


def _name_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # such as half of an IPv6 address
        return ""


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is not from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror}); --port 0 takes any that is free"
        ) from None


def make_app(engine: Engine, settings: Serve, key: str = "") -> FastAPI:
    """The routes. key: what callers must send; none where empty."""
    most = settings.max_megabytes * 1_000_000
    waiting = 0

    async def allowed(request: Request) -> None:
        """Refuse a page of another site, a name that was bent to this machine, and a wrong key."""
        host = request.headers.get("host", "")
        if not key and not _is_this_machine(_name_of(f"//{host}")):
            raise Refused(421, f"this server is not {host!r}; call it 127.0.0.1 or localhost")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("//")[2] != host:
            raise Refused(403, f"pages of {origin} may not ask here")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if key and not (
            scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), key.encode())
        ):
            raise Refused(401, "send the key as 'Authorization: Bearer KEY'")

    async def known_keys(request: Request) -> None:
        known = QUERIES.get(request.url.path, ())
        unknown = [key for key in request.query_params if key not in known]
        if known and unknown:
            raise Refused(
                400, f"{unknown[0]!r} is no key of {request.url.path}; it knows {', '.join(known)}"
            )

    async def picture(request: Request) -> bytes:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise Refused(400, f"a form is not read; {AS_BODY}")
        declared = request.headers.get("content-length", "")
        too_large = Refused(413, f"a picture may have {most:,} bytes; see --max-megabytes")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
        if not body:
            raise Refused(400, AS_BODY, unread=False)
        return bytes(body)

    async def answer(request: Request, ask: Callable[[bytes], Prediction | Embedding]) -> dict[str, Any]:
        nonlocal waiting
        if waiting >= settings.max_waiting:
            raise Refused(429, f"{counted(waiting, 'request')} waiting; come again in a second")
        waiting += 1
        try:
            body = await asyncio.wait_for(picture(request), BODY_SECONDS)
            found = (await asyncio.to_thread(ask, body)).to_dict()
        except asyncio.TimeoutError:
            message = f"the picture did not come within {BODY_SECONDS:.0f} s"
            raise Refused(408, message, unread=False) from None
        except (ValueError, ClientDisconnect) as error:
            raise Refused(400, str(error), unread=False) from None
        finally:
            waiting -= 1
        if found["error"] is not None:
            raise Refused(422, found["error"], unread=False)
        return {name: value for name, value in found.items() if name not in ("path", "error")}

    app = FastAPI(
        title="beit",
        version=version("beit"),
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(allowed), Depends(known_keys)],
    )

    @app.post("/v1/classify")
    async def classify(request: Request, top: int = Query(5, ge=1)) -> dict[str, Any]:
        """The body is a picture's file. Its label, score, the best `top` classes, and the model's ms."""
        return await answer(request, lambda body: next(engine.classify(body, top)))

    @app.post("/v1/embed")
    async def embed(
        request: Request, pooling: EmbedPooling = "mean", layer: int | None = None
    ) -> dict[str, Any]:
        """The body is a picture's file. Its features: `vector`, as `beit embed` has them in fp32."""
        return await answer(request, lambda body: next(engine.embed(body, pooling, layer)))

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What answers here, and how pictures are prepared for it."""
        return {
            "model": settings.model,
            "runtime": engine.runtime,
            "precision": engine.precision,
            "labels": engine.labels if engine.has_classifier else None,
            "preprocessing": asdict(engine.image_spec),
        }

    @app.get("/health")
    async def health() -> dict[str, int]:
        """That it answers, and how many requests are waiting."""
        return {"waiting": waiting}

    def told(status: int, message: str) -> JSONResponse:
        error = {"code": TOLD.get(status, "failed"), "message": message}
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
        return JSONResponse({"error": error}, status, headers)

    async def read_to_its_end(request: Request) -> None:
        """Take what is still sent: closed before, a connection is reset, and the answer lost with it."""
        if request.headers.get("expect", "").lower() == "100-continue":
            return  # it waits for leave to send
        left = 2 * most
        async for part in request.stream():
            left -= len(part)
            if left < 0:
                return

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        if error.unread:
            with suppress(asyncio.TimeoutError, ClientDisconnect):
                await asyncio.wait_for(read_to_its_end(request), UNREAD_SECONDS)
        return told(error.status, error.message)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return told(400, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        routes = "POST /v1/classify, POST /v1/embed, GET /v1/model, GET /health, GET /openapi.json"
        return told(error.status_code, f"{request.method} {request.url.path} is not one of {routes}")

    return app
