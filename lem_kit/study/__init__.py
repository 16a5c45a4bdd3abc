"""Studies: one notebook, many parameters, one folder of runs.

`grid` says what a study file asks for, `runner` executes it. `search` looks for the cheapest point instead of running all.
Not covered yet: several machines, interleaved order, repeats
that stop by themselves.
"""

from .grid import Planned, Study, read
from .runner import Outcome, run

__all__ = ["Outcome", "Planned", "Study", "read", "run"]
