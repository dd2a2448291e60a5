"""Start the server."""

import socket
from typing import Any

from c2f_jax.errors import UserError
from c2f_jax.retriever import Retriever
from c2f_jax.serving.limits import Limits
from c2f_jax.serving.service import Service

CONNECTIONS = 256


def serve(
    retrievers: dict[str, Retriever], host: str, port: int, limits: Limits | None = None
) -> None:
    """Serve until interrupted; the port opens when all programs are compiled.

    Args:
      retrievers: kind of an index -> what searches it.
      host: address to listen at.
      port: port; 0 for a free one.
      limits: of the server.

    Raises:
      UserError: the port is taken or the host is not one of this machine.
    """
    import python_multipart  # noqa: F401  without it, the first form would fail and not the start
    import uvicorn

    from c2f_jax.serving.app import create_app

    limits = limits or Limits()
    service = Service(retrievers, limits)
    # Taken before the minutes of compiling, but it listens only after them.
    sock = _bind(host, port)
    print("compiling the programs of the model", flush=True)
    service.warm_up()
    config = uvicorn.Config(
        create_app(service, limits),
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=10,
    )
    for line in addresses(host, sock.getsockname()[1]):
        print(line, flush=True)
    uvicorn.Server(config).run(sockets=[sock])


def addresses(host: str, port: int) -> list[str]:
    """Return the lines that say where the page is and where microphones work.

    Args:
      host: address that is listened at.
      port: port.
    """
    local = host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")
    if not local:
        return [
            f"serving http://{host}:{port}",
            "browsers allow the microphone only at localhost or over HTTPS: forward the port, "
            f"`ssh -L {port}:{host}:{port} THIS_HOST`, and open http://localhost:{port}",
        ]
    lines = [f"serving http://localhost:{port} (the microphone works at this address)"]
    if host in ("0.0.0.0", "::"):
        lines.append(
            "from other machines, browsers allow the microphone only over HTTPS; or forward the "
            f"port, `ssh -L {port}:localhost:{port} THIS_HOST`, and open http://localhost:{port}"
        )
    return lines


def _bind(host: str, port: int) -> Any:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UserError(
            f"--host={host} --port={port}: {error.strerror}: choose another --port, or a --host of "
            "this machine"
        ) from error
    return sock
