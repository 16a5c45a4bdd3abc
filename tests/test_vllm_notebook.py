"""The vLLM notebook as a batch runs it: papermill here, the engine in a kernel of its own environment (`make test-vllm`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT
from jupyter_client.kernelspec import KernelSpecManager

from lem_kit import metrics, notebooks, store

NOTEBOOK = ROOT / "notebooks/experiment_vllm.ipynb"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        "lem-vllm" not in KernelSpecManager().find_kernel_specs(), reason="there is no kernel lem-vllm: make test-vllm"
    ),
]


@pytest.mark.parametrize("rate_per_s", [0.0, 30.0], ids=["closed", "poisson"])
def test_experiment_vllm_ipynb_through_papermill(tmp_path: Path, rate_per_s: float) -> None:
    values = {
        "rate_per_s": rate_per_s,
        "requests": 8,
        "repeats": 2,
        "engine_args": {"dtype": "bfloat16", "enforce_eager": True, "kv_cache_memory_bytes": 2**28},
        "sampling_args": {"temperature": 0.7, "seed": 3},
        "folder": str(tmp_path),
        "run_id": "run",
    }
    notebooks.execute(NOTEBOOK, tmp_path / "executed.ipynb", values, kernel="lem-vllm")
    m = store.load(tmp_path / "run")
    assert m.status == "ok" and (m.backend or {})["engine"] == "vllm"
    assert [c.output_tokens for c in m.completions] == [16] * 16 and {c.timing_source for c in m.completions} == {"engine"}
    assert m.config["arrivals"] == ("poisson" if rate_per_s else "concurrency")
    assert "vllm" in m.environment["versions"] and metrics.output_tokens_per_s(m)
