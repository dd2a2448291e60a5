"""What one request may ask for, and how it is refused."""

from dataclasses import dataclass

MOST_ANSWERS = 100


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
      body_bytes: largest upload.
      seconds: longest recording.
      upload_seconds: time that an upload may take.
      queue: queries that may wait for the model.
    """

    body_bytes: int = 16 * 2**20
    seconds: float = 120.0
    upload_seconds: float = 20.0
    queue: int = 64


class Refusal(Exception):
    """An answer other than 200.

    Attributes:
      status: HTTP status.
      message: what is wrong and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
