"""The tools that are compared, each as a user would call it: open once, then begin and end windows.

`figures` gives what the tool said of the last window: figure's name -> (joules or None, 95 % half-width or None, reasons);
`stated`, where there is one, from when until when it says that window was.
Zeus is told not to synchronise (that needs torch); CodeCarbon to stay offline and write no file. All else is their default.
"""

from __future__ import annotations

from typing import Any

Figures = dict[str, tuple[float | None, float | None, list[str]]]
JOULES_PER_KWH = 3.6e6


class LemKit:
    def __init__(self, sources: list[str] | None = None) -> None:
        import lem_kit
        from lem_kit.energy import source_names

        power = [name for name in ("nvml_power",) if name in source_names()]
        self.session = lem_kit.Session(sources=sources or ["nvml", *power])

    def begin(self) -> None:
        self.context = self.session.window("benchmark")
        self.window = self.context.__enter__()

    def end(self) -> None:
        self.context.__exit__(None, None, None)

    def figures(self) -> Figures:
        m = self.window.measurement
        self.stated = m.t0_ns, m.t1_ns
        energies = {key: e for key, e in m.energy.items() if key.startswith("nvml")}
        self.session.measurements.clear()
        found: Figures = {}
        for key, energy in energies.items():
            source = key.partition(":")[0]
            found["lem_kit" if source == "nvml" else f"lem_kit {source.removeprefix('nvml_')}"] = (
                energy.joules,
                energy.uncertainty_j,
                list(energy.reasons),
            )
        return found or {"lem_kit": (None, None, ["no energy"])}

    def close(self) -> None:
        self.session.close()


class Zeus:
    def __init__(self) -> None:
        from zeus.monitor import ZeusMonitor

        self.monitor = ZeusMonitor()

    def begin(self) -> None:
        self.monitor.begin_window("benchmark", sync_execution=False)

    def end(self) -> None:
        self.measured = self.monitor.end_window("benchmark", sync_execution=False)

    def figures(self) -> Figures:
        energies = self.measured.gpu_energy
        return {"Zeus": (sum(energies.values()), None, [])} if energies else {"Zeus": (None, None, ["no GPU"])}

    def close(self) -> None:
        pass


def _tracker() -> Any:
    from codecarbon import OfflineEmissionsTracker

    return OfflineEmissionsTracker(country_iso_code="FRA", save_to_file=False, log_level="critical")


class CodeCarbon:
    """start() and stop(), with a tracker for each window. A first pair warms it up."""

    def __init__(self) -> None:
        self.tracker = _tracker()
        self.begin()
        self.end()
        self.figures()

    def begin(self) -> None:
        self.tracker.start()

    def end(self) -> None:
        self.tracker.stop()

    def figures(self) -> Figures:
        joules = self.tracker.final_emissions_data.gpu_energy * JOULES_PER_KWH
        self.tracker = _tracker()
        return {"CodeCarbon": (joules, None, [])}

    def close(self) -> None:
        pass


class CodeCarbonTask:
    """start_task() and stop_task() of one tracker. A first pair warms it up."""

    def __init__(self) -> None:
        self.tracker = _tracker()
        self.begin()
        self.end()

    def begin(self) -> None:
        self.tracker.start_task()

    def end(self) -> None:
        self.measured = self.tracker.stop_task()

    def figures(self) -> Figures:
        return {"CodeCarbon task": (self.measured.gpu_energy * JOULES_PER_KWH, None, [])}

    def close(self) -> None:
        self.tracker.stop()


# By the name of each tool's main figure.
TOOLS = {"lem_kit": LemKit, "Zeus": Zeus, "CodeCarbon": CodeCarbon, "CodeCarbon task": CodeCarbonTask}
