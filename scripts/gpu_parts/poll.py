"""A process that polls NVML and nothing else: `python poll.py UUID FILE.npz STOP counter|fields`.

Columns: fields (began ns, ended ns, instant mW, average mW), counter (began ns, ended ns, mJ), samples (stamp us, mW, read
at ns), calls for samples (began ns, ended ns, count, wall clock minus monotonic ns). -1 is "not answered". With "fields" the
counter is left alone: its calls take milliseconds and are lem_kit's own to make.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import numpy as np
import pynvml as nvml

FIELDS = [(186, 0), (185, 0)]


def main(uuid: str, path: str, stop: str, what: str) -> None:
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    now = time.monotonic_ns
    fields, counter, samples, calls = [], [], [], []
    newest = next_samples = 0
    while not os.path.exists(stop):
        began = now()
        try:
            values = [v.value.uiVal if v.nvmlReturn == 0 else -1 for v in nvml.nvmlDeviceGetFieldValues(handle, FIELDS)]
        except nvml.NVMLError:
            values = [-1, -1]
        fields.append((began, now(), *values))
        if what == "counter":
            began = now()
            with contextlib.suppress(nvml.NVMLError):
                counter.append((began, nvml.nvmlDeviceGetTotalEnergyConsumption(handle), now()))
            if now() > next_samples:
                next_samples = now() + 50_000_000
                began, offset = now(), time.time_ns() - now()
                with contextlib.suppress(nvml.NVMLError):  # "not found" when there is nothing new
                    _, found = nvml.nvmlDeviceGetSamples(handle, nvml.NVML_TOTAL_POWER_SAMPLES, newest)
                    ended = now()
                    samples += [(s.timeStamp, s.sampleValue.uiVal, ended) for s in found if s.timeStamp > newest]
                    calls.append((began, ended, len(found), offset))
                    newest = max([newest, *(s.timeStamp for s in found)])
        time.sleep(0.001 if what == "counter" else 0.004)
    np.savez(
        path,
        fields=np.array(fields, dtype=np.int64).reshape(-1, 4),
        counter=np.array([(a, c, b) for a, b, c in counter], dtype=np.int64).reshape(-1, 3),
        samples=np.array(samples, dtype=np.int64).reshape(-1, 3),
        calls=np.array(calls, dtype=np.int64).reshape(-1, 4),
    )
    nvml.nvmlShutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
