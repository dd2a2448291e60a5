"""The HTTP application: the page, the JSON API, health and metrics."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from c2f_jax import reports
from c2f_jax.errors import UserError
from c2f_jax.serving.limits import Limits, Refusal
from c2f_jax.serving.metrics import Metrics
from c2f_jax.serving.service import Service
from c2f_jax.serving.uploads import UploadGuard
from c2f_jax.serving.worker import Worker

STATIC = Path(__file__).parent / "static"
WAV = Path(reports.__file__).parent / "wav.js"  # shared with the recorder of notebooks
DECODERS = 2  # uploads that are decoded at once
WRONG_TYPES = ("text/", "video/x-", "application/json", "application/x-www-form-urlencoded")
# The page takes nothing from elsewhere; blob: is what was recorded.
POLICY = "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:"
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def create_app(service: Service, limits: Limits) -> Any:
    """Return the FastAPI application of a service.

    Args:
      service: model and indexes, warmed up.
      limits: of the server.
    """
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    worker, metrics = Worker(limits.queue), Metrics()

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title="c2f serve", description="Search by voice.", lifespan=lifespan)
    app.add_middleware(UploadGuard, limits=limits, metrics=metrics)

    @app.middleware("http")
    async def count(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        # The template, not the path: strangers could make up any number of paths.
        route = getattr(request.scope.get("route"), "path", "unknown")
        metrics.count_request(route, response.status_code)
        response.headers["X-Content-Type-Options"] = "nosniff"
        if not route.startswith(("/docs", "/openapi")):
            response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.exception_handler(UserError)
    async def wrong(_: Any, error: UserError) -> Any:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(Refusal)
    async def refuse(_: Any, refusal: Refusal) -> Any:
        headers = {"Retry-After": "1"} if refusal.status == 503 else {}
        return JSONResponse({"detail": refusal.message}, refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> Any:
        found = [f"{each['loc'][-1]}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"detail": "; ".join(found)}, 422)

    @app.exception_handler(Exception)
    async def fail(_: Any, error: Exception) -> Any:
        logging.getLogger(__name__).error("a request failed", exc_info=error)
        return JSONResponse({"detail": "the server failed: see its log"}, 500)

    _add_search(app, service, worker, metrics)
    _add_items(app, service)
    _add_page(app, service, worker, metrics)
    return app


def _add_search(app: Any, service: Service, worker: Worker, metrics: Metrics) -> None:
    from fastapi import Request

    decoders = asyncio.Semaphore(DECODERS)
    main = next(iter(service.retrievers))

    async def ask(query: str, **options: Any) -> dict:
        found = await worker.run(lambda: service.answer(query, **options))
        metrics.add_seconds(found["seconds"])
        return found

    @app.post("/api/search", openapi_extra=UPLOAD)
    async def search(
        request: Request,
        find: str = main,
        top: int = 5,
        rerank: int | None = None,
        where: str | None = None,
        min_probability: float | None = None,
    ) -> dict:
        """Find the items that match a recording (find=image) or an image (find=speech)."""
        body = await _body(request)
        async with decoders:
            query = await asyncio.to_thread(service.read, body, find, "the query")
        return await ask(
            query, top=top, rerank=rerank, where=where, min_probability=min_probability
        )

    @app.get("/api/queries/{query}/answers")
    async def answers(
        query: str,
        top: int = 5,
        rerank: int | None = None,
        where: str | None = None,
        min_probability: float | None = None,
    ) -> dict:
        """Answer a query again, with other parameters."""
        return await ask(
            query, top=top, rerank=rerank, where=where, min_probability=min_probability
        )

    @app.get("/api/queries/{query}/attention/{row}")
    async def attention(query: str, row: int) -> dict:
        """Return the cross-attention between the moments of speech and the patches of an image."""
        return await worker.run(lambda: service.attention(query, row))

    # The annotations are names of this function, which FastAPI cannot see as text.
    del search, answers, attention


async def _body(request: Any) -> bytes:
    """Return the uploaded file, sent as a form or as it is."""
    from starlette.exceptions import HTTPException

    kind = request.headers.get("content-type", "").lower()
    if kind.startswith(WRONG_TYPES):
        raise Refusal(415, f"{kind} cannot be searched with: send a recording or an image")
    if not kind.startswith("multipart/form-data"):
        return await request.body()
    try:
        async with request.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            if file is None or isinstance(file, str):
                raise Refusal(422, "the form has no file: send it in the field `file`")
            return await file.read()
    except HTTPException as error:
        raise Refusal(422, f"the form cannot be read: {error.detail}") from error


def _add_items(app: Any, service: Service) -> None:
    from fastapi.responses import FileResponse, Response

    main = next(iter(service.retrievers))

    @app.get("/api/items/{row}/thumbnail")
    def thumbnail(row: int, find: str = main) -> Response:
        """Return the small image or the recording that the index holds of an item."""
        data, kind = service.thumbnail(find, row)
        return Response(data, media_type=kind)

    @app.get("/api/items/{row}/media")
    def media(row: int, find: str = main) -> FileResponse:
        """Return the file of an item, if it is still there."""
        return FileResponse(service.media(find, row))

    del thumbnail, media


def _add_page(app: Any, service: Service, worker: Worker, metrics: Metrics) -> None:
    from fastapi.responses import FileResponse, PlainTextResponse
    from fastapi.staticfiles import StaticFiles

    @app.get("/healthz")
    async def healthz() -> dict:
        """Say that the model is loaded."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> PlainTextResponse:
        """Return the counters in the text format of Prometheus."""
        items = {kind: len(each.gallery or ()) for kind, each in service.retrievers.items()}
        text = metrics.text(worker.jobs, items)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.get("/api/about")
    async def about() -> dict:
        """Return what is searched, and by which model."""
        return service.about()

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/static/wav.js", include_in_schema=False)
    async def wav() -> FileResponse:
        return FileResponse(WAV)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    del healthz, show_metrics, about, page, wav
