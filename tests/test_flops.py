"""FLOPs, MFU and decode bandwidth: exact numbers by hand, torch's own count, and no ceiling that is a guess."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_metrics import measured

from lem_kit import flops
from lem_kit.backends import Needs
from lem_kit.errors import LemError
from lem_kit.measurement import Completion, Measurement, Repeat
from lem_kit.trace import Domain, Trace

SECOND = 1_000_000_000
# One layer by hand: q and o 8 x 8, k and v 8 x 4, three of 8 x 16: 64 * 2 + 32 * 2 + 128 * 3 = 576 entries. Head: 8 x 10.
SHAPE: dict[str, Any] = {
    "name": "by-hand", "dtype": "bfloat16", "quantization": None, "vocabulary": 10, "layers": 2, "hidden_size": 8,
    "heads": 4, "kv_heads": 2, "head_size": 2, "intermediate_size": 16, "parameters": 2 * 576 + 2 * 80,
}  # fmt: skip
H100 = {"driver": {"gpus": {"gpu0": {"name": "NVIDIA H100 80GB HBM3"}}}}
ON_GPU = {"weight_bytes": {"cuda:0": 2624}}


def done(prompt: int | None, events: list[tuple[float, int]], cached: int | None = None, **more: Any) -> Completion:
    """Events in (s, tokens)."""
    return Completion(
        0, 0, 9 * SECOND, tuple((round(t * SECOND), n) for t, n in events), prompt, cached_tokens=cached, **more
    )


def run(*completions: Completion, model: dict[str, Any] = SHAPE, effective: Any = None, **more: Any) -> Measurement:
    """Four seconds, unless `repeats` say otherwise."""
    backend = {"engine": "e", "model": model, "effective": ON_GPU if effective is None else effective}
    return measured(completions=completions, backend=backend, **{"sources": H100, **more})


def test_flops_of_a_shape_by_hand() -> None:
    one = done(5, [(1, 1), (2, 1), (3, 1)])
    # 5 + 3 - 1 tokens through the layers, 3 through the head; attention: 4 x 2 layers x 4 heads x 2 at 1 + ... + 7 places
    by_hand = 2 * 7 * 1152 + 2 * 3 * 80 + 64 * 28
    assert flops.of_run(run(one)) == (by_hand, "architecture")
    cached = done(5, [(1, 1), (2, 1), (3, 1)], cached=4)
    assert flops.of_run(run(cached)) == (2 * 3 * 1152 + 2 * 3 * 80 + 64 * (28 - 10), "architecture")
    assert flops.of_run(run(one, cached, done(None, [], error="oh"))) == (
        by_hand + 2 * 3 * 1152 + 480 + 64 * 18,
        "architecture",
    )


@given(st.integers(1, 300), st.integers(2, 60), st.integers(1, 59))
def test_the_flops_of_a_request_are_those_of_its_steps(prompt: int, output: int, cut: int) -> None:
    """Generating in two calls, the second with the first one's work in its cache, needs what one call needs."""
    cut = min(cut, output - 1)
    whole = flops.of_run(run(done(prompt, [(1, output)])))
    parts = run(done(prompt, [(1, cut)]), done(prompt + cut, [(1, output - cut)], cached=prompt + cut - 1))
    assert flops.of_run(parts) == whole


def test_a_shape_that_does_not_account_for_the_parameters_is_not_believed() -> None:
    one = done(5, [(1, 1), (2, 1), (3, 1)])
    tied = {**SHAPE, "parameters": 2 * 576 + 80}
    assert flops.of_run(run(one, model=tied)) == flops.of_run(run(one)), "one embedding for both ends"
    experts = {**SHAPE, "parameters": 8000}
    assert flops.of_run(run(one, model=experts)) == (2 * 7 * 8000, "parameters")
    lacking = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    assert flops.of_run(run(one, model=lacking)) == (2 * 7 * 1312, "parameters")
    plain = {**SHAPE, "kv_heads": None, "head_size": None, "parameters": 2 * (4 * 64 + 3 * 128) + 80}
    assert flops.of_run(run(one, model=plain)) == (2 * 7 * 1280 + 480 + 64 * 28, "architecture"), "every head its own"
    for unknown in ({}, {"name": "x", "parameters": None}):
        assert flops.of_run(run(one, model=unknown)) is None
    assert flops.of_run(run(done(None, [(1, 1)]))) is None and flops.of_run(run()) is None
    assert flops.of_run(measured(completions=[one])) is None, "no backend"


@pytest.fixture(scope="module")
def llama() -> Any:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=96, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("prompt", "output", "batch"), [(1, 1, 1), (9, 1, 1), (9, 5, 1), (9, 5, 3)])
def test_torch_counts_what_the_shape_says(llama: Any, prompt: int, output: int, batch: int) -> None:
    shape = {
        "dtype": "float32", "vocabulary": 96, "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2,
        "intermediate_size": 48, "parameters": llama.num_parameters(),
    }  # fmt: skip
    computed = flops.of_run(run(*[done(prompt, [(1, output)])] * batch, model=shape))
    assert computed is not None and computed.method == "architecture"
    # torch computes the whole square of the prompt's attention, where half is used; and it makes the rotary angles anew.
    square = batch * 4 * 2 * 4 * 8 * (prompt**2 - prompt * (prompt + 1) / 2)
    angles = 8 * (prompt + output - 1) * batch
    count = flops.counted(llama, prompt, output, batch)
    assert count.method == "counted"
    assert count.flop == pytest.approx(computed.flop + square, abs=angles)


def test_a_count_that_went_with_the_run_comes_first() -> None:
    one = done(5, [(1, 1), (2, 1), (3, 1)])
    m = run(one, config={"counted_flop": 8e12})
    assert flops.of_run(m) == (8e12, "counted")
    share = flops.mfu(m)
    assert share is not None and (share.achieved, share.method) == (2e12, "counted")
    row = flops.summary(m)
    assert (row["flop"], row["flop_method"], row["flop_per_s"]) == (8e12, "counted", 2e12)


def test_keys_and_values_take_bytes_for_each_token() -> None:
    assert flops.kv_bytes_per_token(run()) == 2 * 2 * 2 * 2 * 2  # keys and values, layers, heads, entries, bytes
    assert flops.kv_bytes_per_token(run(model={**SHAPE, "dtype": "float32"})) == 64
    assert flops.kv_bytes_per_token(run(model={**SHAPE, "layers": None})) is None
    assert flops.kv_bytes_per_token(run(model={**SHAPE, "dtype": None})) is None


def test_mfu_is_a_share_of_the_boards_in_use() -> None:
    one = done(5, [(1, 1), (2, 1), (3, 1)])
    flop = 2 * 7 * 1152 + 480 + 64 * 28
    share = flops.mfu(run(one))
    assert share == (pytest.approx(flop / 4 / 989.4e12), flop / 4, 989.4e12, "architecture", ("NVIDIA H100 80GB HBM3",))
    spans = [Repeat(0, SECOND, {}), Repeat(2 * SECOND, 3 * SECOND, {})]
    m = Measurement("r", "run", "l", "ok", "", 0, 4 * SECOND, {}, tuple(spans), (one,), backend=run().backend, sources=H100)
    assert flops.mfu(m).achieved == flop / 2, "over the seconds inside the repeats"  # type: ignore[union-attr]
    counted = flops.mfu(run(one), flops.Count(8e12, "counted"))
    assert counted is not None and (counted.achieved, counted.method) == (2e12, "counted")
    assert flops.mfu(run(one), dtype="float8").ceiling == 1978.9e12  # type: ignore[union-attr]
    assert flops.mfu(run(one, model={**SHAPE, "dtype": "float32"})).ceiling == pytest.approx(66.9e12)  # type: ignore[union-attr]
    with pytest.raises(LemError, match="did you mean 'float16'"):
        flops.mfu(run(one), dtype="float-16")


def gpus(*names: str) -> dict[str, Any]:
    return {
        "meter": {"what": "no gpus here"},
        "driver": {"gpus": {f"gpu{k}": {"name": name} for k, name in enumerate(names)}},
    }


H200, T4 = "NVIDIA H200", "Tesla T4"


@pytest.mark.parametrize(
    ("sources", "effective", "boards"),
    [
        (gpus(H200), {}, 1),
        (gpus(H200), {"device": "cuda:0"}, 1),
        (gpus(H200, H200), ON_GPU, 1),
        (gpus(H200, H200), {"weight_bytes": {"cuda:0": 5, "cuda:1": 5}}, 2),
        (gpus(H200, T4), {"weight_bytes": {"cuda:0": 5, "cuda:1": 5}}, None),  # a T4 has no bfloat16
        (gpus(H200, T4), ON_GPU, None),  # CUDA's order need not be the driver's
        (gpus(H200, H200), {}, None),  # who knows how many were in use?
        (gpus(H200), {"weight_bytes": {"cuda:0": 5, "cpu": 5}}, None),
        (gpus(H200), {"weight_bytes": {"cpu": 5}}, None),
        (gpus(H200), {"device": "cpu"}, None),
        (gpus(H200), {"weight_bytes": {"cuda:0": 5, "cuda:1": 5}}, None),
        (gpus("NVIDIA A10G"), {}, None),
        ({}, ON_GPU, None),
        ({"meter": None}, ON_GPU, None),
    ],
)
def test_no_ceiling_is_guessed(sources: dict[str, Any], effective: dict[str, Any], boards: int | None) -> None:
    m = run(done(5, [(1, 1), (2, 1)]), sources=sources, effective=effective)
    compute, memory = flops.mfu(m), flops.bandwidth_share(m)
    if boards is None:
        assert compute is None
        assert memory is None or T4 in memory.gpus
    else:
        assert compute is not None and memory is not None
        assert (compute.ceiling, memory.ceiling) == (boards * 989.4e12, boards * 4.8e12)
        assert compute.gpus == (H200,) * boards


@pytest.mark.parametrize(
    ("names", "effective", "boards"),
    [
        ((H200,), {"tp_size": 1, "pp_size": 1}, 1),
        ((H200, H200), {"tp_size": 1, "pp_size": 1}, 1),
        ((H200, H200), {"config": {"tp_size": 2, "pp_size": 1}}, 2),
        ((H200,) * 4, {"config": {"tp_size": 2, "pp_size": 2}, "device_config": {"device_type": "cuda"}}, 4),
        ((H200,) * 4, {"config": {"tp_size": 2, "data_parallel_size": 2}}, None),  # further ways, of unknown meaning
        ((H200,), {"tp_size": 2}, None),
        ((H200,), {"tp_size": 1, "device_config": {"device_type": "cpu"}}, None),
        ((H200, H200), {"seed": 1}, None),
    ],
)
def test_an_engine_may_say_over_how_many_boards_it_spread_the_model(
    names: tuple[str, ...], effective: dict[str, Any], boards: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flops, "backend_names", lambda: ["e"])
    monkeypatch.setattr(flops, "needs", lambda name: Needs(parallel=("tp_size", "pp_size")))
    compute = flops.mfu(run(done(5, [(1, 1), (2, 1)]), sources=gpus(*names), effective=effective))
    assert (compute and compute.gpus) == (None if boards is None else (H200,) * boards)


def test_quantised_weights_and_divided_boards_have_no_share() -> None:
    one = done(5, [(1, 1), (2, 1)])
    assert flops.mfu(run(one, model={**SHAPE, "quantization": {"bits": 4}})) is None
    assert flops.of_decode(run(one, model={**SHAPE, "quantization": {"bits": 4}})) is None
    assert flops.mfu(run(one, model={**SHAPE, "quantization": {"w8a8": 1}}), dtype="float8") is not None
    asked = {**ON_GPU, "model_config": {"quantization": "fp8"}}  # by the user, of a checkpoint that is not
    assert flops.mfu(run(one, effective=asked)) is None and flops.of_decode(run(one, effective=asked)) is None
    assert flops.mfu(run(one, model={**SHAPE, "dtype": "float64"})) is None
    for label, known in (("H100 GPU-1", True), ("H100 GPU-1 (parent GPU, not this instance: MIG)", False)):
        trace = Trace(domains={"driver:gpu0": Domain("gpu", "counter", label=label)})
        assert (flops.mfu(run(one, trace=trace)) is not None) is known
        assert (flops.bandwidth_share(run(one, trace=trace)) is not None) is known


def test_decoding_alone_reads_weights_and_context_at_every_step() -> None:
    one = done(5, [(1, 1), (1.5, 1), (2, 1)])
    # Two steps: layers and head each, and 2 x 2 layers x 2 heads x 2 entries for 6 and then 7 tokens; two bytes each.
    read = 2 * (2 * (1152 + 80) + 16 * (6 + 7))
    assert flops.of_decode(run(one)) == (read, 1.0, "architecture")
    share = flops.bandwidth_share(run(one))
    assert share == (pytest.approx(read / 3.35e12), read, 3.35e12, "architecture", ("NVIDIA H100 80GB HBM3",))
    experts = flops.of_decode(run(one, model={**SHAPE, "parameters": 8000}))
    assert experts == (2 * (2 * 8000 + 16 * 13), 1.0, "parameters")
    assert flops.of_decode(run(done(5, [(1, 4)]))) is None, "one event: no step was seen"
    assert flops.of_decode(run(done(None, [(1, 1), (2, 1)]))) is None and flops.of_decode(run()) is None


def test_requests_decoded_together_share_their_steps() -> None:
    weights, entries = 1232 * 2, 16 * 2
    together = [done(5, [(1, 1), (2, 1), (3, 1)]), done(9, [(1, 1), (2, 1), (3, 1)])]
    assert flops.of_decode(run(*together)) == (2 * weights + entries * (6 + 7 + 10 + 11), 2.0, "architecture")
    late = [together[0], done(9, [(1.02, 1), (2.01, 1), (3.03, 1)])]  # stamped by the client, a little later each
    assert flops.of_decode(run(*late)) == (2 * weights + entries * 34, pytest.approx(2.03), "architecture")
    apart = [together[0], done(9, [(4, 1), (5, 1)])]
    assert flops.of_decode(run(*apart)) == (3 * weights + entries * (6 + 7 + 10), 3.0, "architecture")
    joined = [done(5, [(1, 1), (2, 1), (3, 1), (4, 1)]), done(9, [(2, 1), (3, 1)])]  # comes and goes on the way
    assert flops.of_decode(run(*joined)) == (3 * weights + entries * (6 + 7 + 8 + 10), 3.0, "architecture")
    speculated = done(5, [(1, 1), (2, 3), (3, 2)])  # several tokens in a step
    assert flops.of_decode(run(speculated)) == (2 * weights + entries * (6 + 9), 2.0, "architecture")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=7))
def test_disjoint_spans_are_as_many_as_can_be(pairs: list[tuple[int, int]]) -> None:
    spans = [(start, start + length) for start, length in pairs]
    best = 0
    for mask in range(1 << len(spans)):
        chosen = sorted(span for k, span in enumerate(spans) if mask >> k & 1)
        if all(a[1] <= b[0] for a, b in itertools.pairwise(chosen)):
            best = max(best, len(chosen))
    assert flops._disjoint(spans) == best
    assert flops._covered_ns(spans) == len({t for start, stop in spans for t in range(start, stop)})


def test_ceilings_are_found_by_the_drivers_name() -> None:
    assert flops.peak("Tesla V100-SXM2-16GB") == flops.peak("V100-SXM2-16GB") is not None
    assert flops.peak("NVIDIA GeForce RTX 4090").gigabytes_per_s == 1008  # type: ignore[union-attr]
    for other in (
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10G",
        "NVIDIA H100",
        "",
        "AMD Instinct MI300X",
    ):
        assert flops.peak(other) is None, "a name that is nearly known is not known"
    for name, p in flops.PEAKS.items():
        assert p.source.startswith("NVIDIA") and p._fields[:4] == flops.DTYPES
        ladder = [x for x in (p.float32, p.float16, p.float8) if x is not None]
        assert ladder == sorted(ladder) and p.bfloat16 in (None, p.float16), name


def test_a_row_has_the_same_columns_whatever_is_known() -> None:
    known, unknown = flops.summary(run(done(5, [(1, 1), (2, 1)]))), flops.summary(measured())
    assert list(known) == list(unknown) and set(unknown.values()) == {None} and None not in known.values()
    assert json.loads(json.dumps(known, allow_nan=False)) == known
    assert (known["peak_source"], known["weight_bytes"]) == ("NVIDIA H100 datasheet", 2624)
    assert known["mfu"] == pytest.approx(known["flop_per_s"] / known["peak_flop_per_s"])
    assert known["bandwidth_share"] == pytest.approx(known["decode_bytes_per_s"] / known["peak_bytes_per_s"])
