"""Messages of the workers of a training.

In a separate file, because the process of the actor imports what this file imports.
"""

import ray


@ray.remote(num_cpus=0)
class StatusActor:
    """Holds the messages of the workers for the process that started them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failure: str | None = None

    def add_line(self, line: str) -> None:
        """Add a line for the user."""
        self.lines.append(line)

    def fail(self, reason: str) -> None:
        """Record a failure that a restart would only repeat."""
        self.failure = self.failure or reason

    def read(self, start: int) -> tuple[list[str], str | None]:
        """The lines from number `start` on, and the reason of a failure, or None."""
        return self.lines[start:], self.failure
