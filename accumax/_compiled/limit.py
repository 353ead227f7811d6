"""A limit of memory, as users write it, and bytes, as they read them."""

import operator
import re
from collections.abc import Iterable
from typing import Any

import jax

UNITS = {"B": 1}
UNITS |= {f"{p}B": 1000**n for n, p in enumerate(("k", "M", "G", "T"), 1)}
UNITS |= {f"{p}iB": 1024**n for n, p in enumerate(("K", "M", "G", "T"), 1)}
ACCEPTED = f'a unit of {", ".join(UNITS)} (as in "16GiB"), or % (as in "80%")'


class Limit:
    """The bytes of a device that a program may take.

    Args:
      given: bytes, an integer; a string with a unit; a string with %, a share of the
        device's memory; or None for all of it.

    Raises:
      TypeError, ValueError: `given` is none of these, or a share of a memory that the
        backend does not tell.
    """

    def __init__(self, given: int | str | None) -> None:
        self.share, self.bytes = _parse(given)
        self.given = given
        if self.share:
            self._of(jax.local_devices()[:1])  # before anything is compiled

    def of(self, devices: Iterable[Any]) -> int:
        """The limit in bytes for a program on `devices`.

        Raises:
          ValueError: it is a share, and one of the devices does not tell its memory.
        """
        if not self.share:
            return self.bytes
        return self._of(list(devices) or jax.local_devices()[:1])

    def _of(self, devices: Iterable[Any]) -> int:
        here = jax.local_devices()
        limits = []
        for device in devices:
            # A device that is only compiled for has no memory to ask for.
            stats = device.memory_stats() if device in here else None
            if not stats or "bytes_limit" not in stats:
                raise ValueError(
                    f"memory_limit={self.given!r} needs the memory of {device}, which "
                    'JAX does not know. Pass bytes, or a string such as "16GiB".'
                )
            limits.append(stats["bytes_limit"])
        return int(self.share * min(limits))


def _parse(given: int | str | None) -> tuple[float, int]:
    """The share of the device's memory, or 0 and the bytes."""
    if given is None:
        return 1.0, 0
    if not isinstance(given, str):
        try:
            if isinstance(given, bool):
                raise TypeError
            number = operator.index(given)
        except TypeError:
            raise TypeError(
                f"memory_limit={given!r} must be bytes, an integer, or a string with "
                f"{ACCEPTED}."
            ) from None
        if number < 1:
            raise ValueError(f"memory_limit={given!r} must be at least 1 byte.")
        return 0.0, number
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[A-Za-z]*)\s*", given)
    if not found or found[2] not in {"%", *UNITS}:
        raise ValueError(f"memory_limit={given!r} must be a number with {ACCEPTED}.")
    number, unit = float(found[1]), found[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise ValueError(f"memory_limit={given!r} must be above 0%, up to 100%.")
        return number / 100, 0
    if number * UNITS[unit] < 1:
        raise ValueError(f"memory_limit={given!r} must be at least 1 byte.")
    return 0.0, int(number * UNITS[unit])


def scale_of(count: float) -> tuple[str, int]:
    """The largest unit of which `count` bytes are at least one, and its bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= UNITS[unit]:
            return unit, UNITS[unit]
    return "B", 1


def readable(count: float) -> str:
    """Bytes for a reader.

    >>> print(readable(1536), readable(3 * 2**30), readable(12))
    1.50 KiB 3.00 GiB 12 B
    """
    unit, scale = scale_of(count)
    return f"{count / scale:.2f} {unit}" if scale > 1 else f"{count:.0f} B"
