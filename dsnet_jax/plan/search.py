"""The largest batch that fits, by few compilations."""

import dataclasses
import math
from collections.abc import Callable

Tried = dict[int, tuple[float, bool]]  # Batch -> bytes that it needs (inf: not known), and whether it fits.


@dataclasses.dataclass(frozen=True)
class Largest:
    """What a search ended with.

    Attributes:
      fits: the largest batch that was measured and fits; 0 if none does.
      too_large: the least that was measured and does not; None if every one fits.
      expected: what would have been measured next; at most `fits` where, by growth, nothing larger fits.
    """

    fits: int
    too_large: int | None
    expected: int


def largest_batch(
    measure: Callable[[int], tuple[float, bool]], limit: float, tried: Tried, unit: int = 1, compilations: int = 4
) -> Largest:
    """Searches the largest batch that fits, assuming that memory grows nearly in proportion to the batch.

    The next batch to try is where the line through the two measurements nearest to the limit meets it; where there is
    no line, or it is wrong, half way between the largest that fits and the least that does not.

    Args:
      measure: called with a batch, a multiple of `unit`; gives the bytes that it needs and whether it fits.
      limit: bytes.
      tried: what was measured before, of one batch at least; a batch of 0 may be told too.
      unit: between batches.
      compilations: how often `measure` may be called.
    """
    tried = dict(tried)
    while True:
        fits = max((batch for batch, (_, fits) in tried.items() if fits), default=0)
        too_large = min((batch for batch, (_, fits) in tried.items() if not fits), default=None)
        batch = _where_the_line_meets(limit, tried, unit)
        if batch is None:
            batch = 2 * fits if too_large is None else too_large
        if too_large is not None and (batch >= too_large or fits == 0):
            batch = min(batch, (fits + too_large) // 2) // unit * unit
            if fits == 0 and too_large > unit:  # The least is tried before it is said that none fits.
                batch = max(batch, unit)
        if batch <= fits or compilations == 0:
            return Largest(fits, too_large, batch)
        tried[batch] = measure(batch)
        compilations -= 1


def _where_the_line_meets(limit: float, tried: Tried, unit: int) -> int | None:
    """The batch, a multiple of `unit`; None where there are not two measurements, or memory does not grow."""
    points = sorted((abs(memory - limit), batch, memory) for batch, (memory, _) in tried.items() if memory < math.inf)
    if len(points) < 2:
        return None
    (_, batch, memory), (_, other, others) = points[:2]
    slope = (memory - others) / (batch - other)
    if slope <= 0:
        return None
    return int((batch + (limit - memory) / slope) // unit) * unit
