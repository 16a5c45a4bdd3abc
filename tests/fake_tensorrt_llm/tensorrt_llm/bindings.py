"""The clock of the stamps, as a timedelta of whole microseconds."""

import time
from datetime import timedelta

from .behaviour import BEHAVIOUR


def steady_clock_now() -> timedelta:
    return timedelta(microseconds=time.monotonic_ns() // 1000) + timedelta(seconds=BEHAVIOUR.clock_offset_s)
