"""How fast a run is."""

import contextlib
import time
from collections.abc import Iterator


class Pace:
    """Time per step, and the share of it that the loop waits for data; evaluations and saves do not count."""

    def __init__(self, start: int, batch_size: int):
        self.waited = 0.0
        self._step, self._batch_size = start, batch_size
        self._since = time.monotonic()

    def lap(self, step: int) -> dict[str, float]:
        """Figures since the last call."""
        now = time.monotonic()
        seconds, steps = now - self._since, step - self._step
        figures = {
            "images_per_second": steps * self._batch_size / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait": self.waited / seconds,
        }
        self.waited, self._step, self._since = 0.0, step, now
        return figures

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time does not count: steps before and after it share one lap."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began
