"""Take uploads whole, and refuse the large and the slow before anything reads them."""

import asyncio
import json
from typing import Any

from c2f_jax.serving.limits import Limits, Refusal

PATIENCE = (
    8  # times the largest upload that is read and dropped, so that its sender gets the answer
)


class UploadGuard:
    """ASGI middleware that reads the body of each POST within limits of size and time.

    Attributes:
      app: the application.
      limits: of the server.
      metrics: counts what is refused.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Any) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        try:
            body = await self._read(receive)
        except Refusal as refusal:
            self.metrics.count_request("upload", refusal.status)
            return await _refuse(send, refusal)
        if body is None:  # the client has gone
            return None

        given = False

        async def replay() -> dict:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, send)

    async def _read(self, receive: Any) -> bytes | None:
        most, seconds = self.limits.body_bytes, self.limits.upload_seconds
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(seconds):
                while more and size <= PATIENCE * most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size <= most:
                        body += part
        except TimeoutError:
            if size <= most:
                raise Refusal(
                    408, f"the upload took more than {seconds:g} s: send it again"
                ) from None
        if size > most:
            raise Refusal(
                413, f"the upload is larger than {most / 2**20:g} MiB: send a shorter recording"
            )
        return bytes(body)


async def _refuse(send: Any, refusal: Refusal) -> None:
    body = json.dumps({"detail": refusal.message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
