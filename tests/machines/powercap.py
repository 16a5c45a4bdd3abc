"""A fake /sys/class/powercap in a folder."""

from __future__ import annotations

from pathlib import Path

RANGE_UJ = 262_143_328_850


def zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
    """Make one zone, e.g. zone(root, "intel-rapl:0", "package-0", 5_000_000); return its energy_uj."""
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path / "energy_uj"
