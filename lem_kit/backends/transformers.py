"""Hugging Face transformers: static batches through `model.generate`, or its own continuous batching.

The one idea: every keyword is the engine's, reaches it untouched and is read back from what it made. How tokens are seen is
in `_static`, `_criterion` and `_continuous`, which know nothing of the engine's arguments.

Tokens: the end-of-sequence token of a row counts as an output token (it was computed); what is generated to fill up a
finished row (padding) does not. Where a static batch is on a CUDA device, that stamps its tokens (`_criterion`). In assisted
decoding, and on other devices, they are stamped as the engine streams them; on Apple's MPS, release 5 does that one step
late.

Two keywords of `load` are lem_kit's, the rest are from_pretrained's:
    continuous_batching   True, or a dict of arguments of the engine's ContinuousBatchingConfig: requests join and leave the
                          running batch (`concurrent` is True), see `_continuous`. Else each call is one static batch.
    assistant_model       a name, a folder or a loaded model: the draft model of assisted decoding, for every request

Not covered: beam search; sampling that differs between requests of one batch.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import torch
import transformers

from .. import models
from ..errors import LemError, Unavailable, nearest
from ..measurement import Request, TokenEvent, jsonable
from . import _hub, _readback
from ._continuous import Asked, Continuous
from ._criterion import Criterion, DeviceClock
from ._static import Static, Steps, Stopped

NEEDS = {"package": "transformers", "image": "huggingface/transformers-pytorch-gpu:latest"}

_PLACING_KEYWORDS = ("device_map", "device_mesh", "distributed_config", "tp_plan", "tp_size")
_OUR_KEYWORDS = ("assistant_model", "continuous_batching")
# What makes decoding assisted. There, releases up to 5.17 ask the stopping criteria about candidates as well.
_ASSISTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_OWN_OPTIONS = {"attention_mask", "input_ids", "inputs", "inputs_embeds", "max_new_tokens", "streamer"}


def load(model: str, **engine_args: Any) -> Transformers:
    """Load with AutoModelForCausalLM.from_pretrained(model, **engine_args), its tokenizer beside it.

    Without a placement of the user's (`device_map` and the like) the model goes to the GPU if there is one.
    """
    requested = _readback.requested(engine_args)  # now: the engine changes what it is given, max_memory for one
    assistant, continuous = (engine_args.pop(name, None) for name in _OUR_KEYWORDS)
    batching = _batching(continuous)
    if batching is not None and assistant is not None:
        raise LemError("Continuous batching has no assisted decoding: leave out assistant_model or continuous_batching.")
    path = models.resolve(model)
    hub = _hub.keywords(path, engine_args)
    placing, placed_by = {}, "transformers"
    if torch.cuda.is_available() and not any(name in engine_args for name in _PLACING_KEYWORDS):
        placing, placed_by = {"device_map": "cuda"}, "lem_kit: no device_map was given and CUDA is available"
    loaded = _pretrained(model, path, {**placing, **hub, **engine_args})
    with models.quiet_loading():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left", **hub)
    # The checkpoint may propose to sample; a measurement is greedy unless the user says otherwise.
    if "generation_config" not in engine_args:
        loaded.generation_config.do_sample = False
    attention = getattr(loaded.config, "_attn_implementation", None)
    engine = None if batching is None else Continuous(_manager(loaded, batching))
    facts = {
        "engine": "transformers",
        "version": transformers.__version__,
        "torch": torch.__version__,
        "model": _readback.of_model(loaded, model, _hub.commit(path, hub)),
        "requested": requested,
        "effective": {**_readback.effective(loaded, placed_by), "timing": _timing(loaded.device, engine is not None)},
    }
    if engine is not None:
        facts["effective"]["attn_implementation_as_loaded"] = attention
        facts["effective"]["continuous_batching"] = jsonable(vars(engine.manager.continuous_batching_config))
    backend = Transformers(loaded, tokenizer, facts, engine)
    if assistant is not None:
        backend.assist(assistant)
    return backend


class Transformers:
    """A loaded model, and the one thread that runs it: ours for static batches, the engine's for continuous batching."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, facts: dict[str, Any], continuous: Continuous | None = None) -> None:
        self.concurrent = continuous is not None
        self._model = model
        self._tokenizer = tokenizer
        self._facts = facts
        self._continuous = continuous
        self._static = Static(f"lem_kit-{self.name}")
        self._assistant: Any = None
        self._assistants: dict[str, Any] = {}

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        """One static batch, whose requests share max_new_tokens, fixed_length and options; or requests for the running
        batch, each with its own."""
        return self._join(requests) if self.concurrent else self._batch(requests)

    def _batch(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        options = self._options(requests)
        run = functools.partial(self._run, list(requests), options)
        stop_ids = _ids(self._setting(options, "eos_token_id"))
        return self._static.generate(run, len(requests), requests[0].max_new_tokens, stop_ids)

    def _run(self, requests: list[Request], options: dict[str, Any], steps: Steps) -> None:
        """In the worker thread: tokenise, pad on the left, generate."""
        rows = self._encode(requests)
        steps.prompt_tokens = [len(row) for row in rows]
        if isinstance(options.get("assistant_model"), str):
            options["assistant_model"] = self._draft(options["assistant_model"])
        longest = max(steps.prompt_tokens)
        padding = options.get("pad_token_id") or 0
        ids = [[padding] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        device = self._model.device
        _own_graphs()
        lack = None
        try:
            tensors = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
            # An event is asked on the thread's current device, and another than the model's would be woken up for that.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                observing, returned = self._observing(steps, len(rows), options)
                returned(self._model.generate(**tensors, **{**options, **observing}))
        except Stopped:
            pass
        except ValueError as error:  # said before anything is generated
            name = re.search(r"`model_kwargs` are not used by the model: \['(\w+)'", str(error))
            if not name:
                raise
            raise LemError(
                f"generate does not know the option '{name[1]}': {nearest(name[1], _generation_names())}"
            ) from error
        except RuntimeError as error:
            if (lack := _lack_of_memory(str(error))) is None:
                raise
        if lack is not None:  # out here the tensors of the failed call are no longer held by its traceback
            self._free_memory()
            raise MemoryError(
                f"{lack} Requests together: {len(rows)}, padded to {longest} + {options['max_new_tokens']} tokens."
            )

    def _observing(self, steps: Steps, rows: int, options: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], None]]:
        """Keywords by which generate tells its steps, and what to call with what it returns."""
        device = self._model.device
        if device.type != "cuda" or self._assisted(options):
            return {"streamer": steps}, lambda _: None
        criterion = Criterion(steps, torch.zeros(rows, dtype=torch.bool, device=device), _device_clock(device))

        def returned(out: Any) -> None:
            sequences = getattr(out, "sequences", out)
            criterion.returned(sequences.shape[1] if isinstance(sequences, torch.Tensor) else None)

        criteria = transformers.StoppingCriteriaList([criterion, *(options.get("stopping_criteria") or ())])
        return {"stopping_criteria": criteria}, returned

    def _assisted(self, options: Mapping[str, Any]) -> bool:
        return any(self._setting(options, name) for name in _ASSISTING)

    async def _join(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        keywords = [self._keywords(request) for request in requests]
        if any(request.prompt is not None for request in requests):  # the tokeniser must not hold up the other requests
            rows = await self._static.submit(self._encode, requests)
        else:
            rows = self._encode(requests)
        asked = [Asked(row, _ids(extra["eos_token_id"]), extra) for row, extra in zip(rows, keywords)]
        assert self._continuous is not None
        stream = self._continuous.generate(asked)
        try:
            async for event in stream:
                yield event
        except RuntimeError as error:
            if (lack := _lack_of_memory(str(error))) is None:
                raise
            raise MemoryError(lack) from None
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids of each prompt. LemError for what the model cannot take."""
        self._check_open()
        rows = [list(r.prompt_token_ids) if r.prompt_token_ids else self._tokenizer(r.prompt).input_ids for r in requests]
        vocabulary, context = self._facts["model"]["vocabulary"], self._facts["model"]["context"]
        for request, row in zip(requests, rows):
            if vocabulary and max(row) >= vocabulary:
                raise LemError(
                    f"A prompt holds a token id outside the model's vocabulary of {vocabulary}; use ids below that."
                )
            if context and len(row) + request.max_new_tokens > context:
                raise LemError(
                    f"A request of {len(row)} prompt tokens and {request.max_new_tokens} new ones does not fit into the "
                    f"model's context of {context} tokens: shorten the prompt, or lower max_new_tokens."
                )
        return rows

    def token_ids(self, request: Request) -> list[int]:
        """The ids that the model gets of the prompt."""
        return self._encode([request])[0]

    def _check_open(self) -> None:
        if self._model is None:
            raise LemError("This backend is closed: load it again with lem_kit.load_backend.")

    def _keywords(self, request: Request) -> dict[str, Any]:
        """Keywords of the manager's add_request, checked. Sampling is the manager's: the engine takes one for all requests,
        and per request only what it made adjustable (`per_request_processors`)."""
        self._check_open()
        assert self._continuous is not None
        adjustable = getattr(self._continuous.manager.logit_processor, "supported_keys", None) or {}
        known = {"eos_token_id", "streaming", *adjustable}
        for name, value in request.options.items():
            if name in _OWN_OPTIONS:
                raise LemError(f"lem_kit sets the option '{name}' itself: use the fields of Request instead.")
            if name not in known | _generation_names():
                raise LemError(f"Continuous batching does not know the option '{name}': {nearest(name, known)}")
            if name not in known and value != getattr(self._model.generation_config, name, None):
                raise LemError(
                    f"Continuous batching takes no '{name}' per request: what holds for all requests is given when loading, "
                    "as generation_config=transformers.GenerationConfig(...)."
                )
        stop_ids = sorted(_ids(self._setting(request.options, "eos_token_id")))
        # The engine ends nowhere when it is given no valid id, and that is how it is told to ignore the end of sequence.
        return {
            **{name: value for name, value in request.options.items() if name in known},
            "max_new_tokens": request.max_new_tokens,
            "eos_token_id": [-1] if request.fixed_length or not stop_ids else stop_ids,
        }

    def _options(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Keywords for model.generate, checked before anything runs."""
        self._check_open()
        first = requests[0]
        for name in ("max_new_tokens", "fixed_length", "options"):
            if any(getattr(request, name) != getattr(first, name) for request in requests):
                raise LemError(
                    f"Requests of one static batch share {name}, as {self.name} generates them together: "
                    f"send requests with another {name} in a call of their own."
                )
        for name in _OWN_OPTIONS & first.options.keys():
            raise LemError(f"lem_kit sets the option '{name}' itself: use the fields of Request instead.")
        options = {"max_new_tokens": first.max_new_tokens, **first.options}
        if first.fixed_length:
            options["min_new_tokens"] = first.max_new_tokens
        if not {"do_sample", "generation_config"} & options.keys():
            options["do_sample"] = self._model.generation_config.do_sample
        if self._assistant is not None:
            options.setdefault("assistant_model", self._assistant)
        if self._setting(options, "pad_token_id") is None:
            stop_ids = sorted(_ids(self._setting(options, "eos_token_id")))
            options["pad_token_id"] = next((i for i in (self._tokenizer.pad_token_id, *stop_ids) if i is not None), 0)
        for name in ("num_beams", "num_return_sequences"):
            if (self._setting(options, name) or 1) != 1:
                raise LemError(
                    f"{name} must be 1: tokens are counted per request as they come. Send the request again instead."
                )
        if self._setting(options, "stop_strings"):
            options.setdefault("tokenizer", self._tokenizer)
        if len(requests) > 1 and (self._setting(options, "stop_strings") or options.get("stopping_criteria")):
            raise LemError(
                "stop_strings and stopping_criteria need one request per call: in a batch, transformers does not tell "
                "which row they have ended, and padding would be counted as output."
            )
        if len(requests) > 1 and self._assisted(options):
            raise LemError(
                "Assisted decoding (assistant_model, prompt_lookup_num_tokens) takes one request at a time: use "
                "arrivals=lem.traffic.batches(1)."
            )
        return options

    def _setting(self, options: Mapping[str, Any], name: str) -> Any:
        """A generation setting as it will be in force: the call's, its generation_config's, the model's."""
        if name in options:
            return options[name]
        value = getattr(options.get("generation_config"), name, None)
        return getattr(self._model.generation_config, name, None) if value is None else value

    def assist(self, assistant: Any) -> None:
        """Use a draft model, by name or loaded, for every request that does not name another."""
        self._assistant = self._draft(assistant)

    def _draft(self, assistant: Any) -> Any:
        """A model for assisted decoding on the device of the model, in its dtype; loaded once."""
        known = assistant if isinstance(assistant, str) else getattr(assistant, "name_or_path", type(assistant).__name__)
        if known not in self._assistants:
            revision = None
            if isinstance(assistant, str):
                path = models.resolve(assistant)
                hub = _hub.keywords(path, {})
                assistant = _pretrained(known, path, {**hub, "dtype": self._model.dtype}).to(self._model.device)
                revision = _hub.commit(path, hub)
            self._assistants[known] = assistant
            self._facts.setdefault("assistants", []).append(_readback.of_model(assistant, known, revision))
        return self._assistants[known]

    def describe(self) -> dict[str, Any]:
        return self._facts

    def counters(self) -> dict[str, float]:
        """Peaks of torch's allocator, summed over the GPUs that hold weights; with continuous batching, its occupancy."""
        found: dict[str, float] = {}
        gpus = [device for device in self._facts["effective"]["weight_bytes"] if device.startswith("cuda")]
        if gpus and self._model is not None:
            found["peak_memory_bytes"] = float(sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus))
            found["peak_reserved_memory_bytes"] = float(sum(torch.cuda.max_memory_reserved(gpu) for gpu in gpus))
            for gpu in gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
        return found if self._continuous is None else {**found, **self._continuous.counters()}

    def close(self) -> None:
        if self._continuous is not None and self._model is not None:
            self._continuous.close()
        self._static.close()
        spread = getattr(self._model, "hf_device_map", None) is not None
        self._model = self._tokenizer = self._assistant = None
        self._assistants.clear()
        if spread:  # such a model holds itself
            gc.collect()
        self._free_memory()

    def _free_memory(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _timing(device: torch.device, continuous: bool) -> str:
    """In words, whose clock it is and where it is read."""
    if continuous:
        return "engine: stamped in its loop"
    if device.type == "cuda":
        return "engine: stamped by the device and told on this host's clock; assisted decoding: client"
    return "client: stamped in the generating thread"


def _device_clock(device: torch.device) -> DeviceClock:
    """For what is put on the stream that this thread works on."""

    def host_like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    return DeviceClock(functools.partial(torch.cuda.Event, enable_timing=True), torch.cuda.current_stream(device), host_like)


def _own_graphs() -> None:
    """Let this thread run compiled CUDA graphs. torch keeps what they need for each thread, and up to 2.11 makes it only
    for the one that compiled first in this process: the user's, or that of a backend closed long ago. Others would fail."""
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:  # made for this thread, then, when it is the first to compile
        return
    try:
        trees.get_obj(trees.local, "tree_manager_containers")
    except AssertionError:
        trees.local.tree_manager_containers = {}
        trees.local.tree_manager_locks = collections.defaultdict(threading.Lock)


def _batching(asked: Any) -> dict[str, Any] | None:
    """Arguments of the engine's ContinuousBatchingConfig; None for static batches."""
    if asked is None or asked is False:
        return None
    known = getattr(transformers, "ContinuousBatchingConfig", None)
    if known is None:
        raise LemError(
            f"Continuous batching needs transformers 5.17 or newer, and this is {transformers.__version__}: "
            "pip install -U transformers, or leave out continuous_batching."
        )
    names = {field.name for field in dataclasses.fields(known)}
    if asked is not True and not isinstance(asked, Mapping):
        raise LemError(f"continuous_batching= takes True or a dict of arguments of ContinuousBatchingConfig: got {asked!r}.")
    # Prompts that share a beginning would be measured as if part of them cost nothing; another attention than the one
    # asked for would be measured under its name. The engine does both unless told.
    given = {"allow_block_sharing": False, **({"auto_switch_to_flash": False} if "auto_switch_to_flash" in names else {})}
    given.update({} if asked is True else asked)
    for name in given.keys() - names:
        raise LemError(f"Continuous batching does not know the argument '{name}': {nearest(name, names)}")
    return given


def _manager(model: Any, batching: dict[str, Any]) -> Any:
    """The engine's manager for `model`, not started."""
    for name in ("num_beams", "num_return_sequences", "prompt_lookup_num_tokens"):
        if (getattr(model.generation_config, name, None) or 1) != 1:
            raise LemError(f"Continuous batching has no {name}: leave it out of generation_config, or use static batches.")
    if model.device.type == "cpu":  # where the engine would size its cache and masks by the memory of the whole machine
        batching = {"num_blocks": 64, "max_batch_tokens": 512, **batching}
    attention = model.config._attn_implementation
    if "auto_switch_to_flash" not in batching and attention in ("eager", "sdpa"):
        model.set_attn_implementation(f"paged|{attention}")  # release 5.17 takes this for "do not switch"
    config = transformers.ContinuousBatchingConfig(**batching)
    return model.init_continuous_batching(copy.deepcopy(model.generation_config), config)


def _lack_of_memory(message: str) -> str | None:
    """What to do about an error of the engine's, if it is about memory."""
    if not re.search(r"out of memory|can't allocate memory|not enough memory", message, re.IGNORECASE):
        return None
    return (
        f"out of memory ({message.strip().splitlines()[0]}): send fewer requests together, ask for fewer tokens, or load "
        "the model with a smaller dtype or a quantization_config."
    )


@functools.cache
def _generation_names() -> frozenset[str]:
    return frozenset(name for name in vars(transformers.GenerationConfig()) if not name.startswith("_"))


def _pretrained(name: str, path: str, keywords: dict[str, Any]) -> Any:
    """The model, ready to generate; LemError where there is none, or for a keyword that nobody takes."""
    with models.quiet_loading():
        hub = {key: keywords[key] for key in _hub.KEYWORDS if key in keywords}
        config = keywords["config"] if "config" in keywords else _read_config(name, path, hub)
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(path, **keywords)
        except TypeError as error:  # a keyword that nobody takes ends at the model's class, before weights are read
            found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not found or found[1] not in keywords:
                raise
            known = _engine_keywords(config) | set(_OUR_KEYWORDS)
            raise LemError(
                f"transformers does not know the engine argument '{found[1]}': {nearest(found[1], known)}"
            ) from error
        except ImportError as error:  # an attention or a quantisation whose package is not installed
            raise Unavailable(f"transformers cannot load '{name}' as asked: {str(error).strip()}") from error
    return (loaded[0] if isinstance(loaded, tuple) else loaded).eval()  # a tuple with output_loading_info=True


def _ids(value: Any) -> set[int]:
    """Token ids given as nothing, one, several or a tensor."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _read_config(model: str, path: str, hub: dict[str, Any]) -> Any:
    """The model's configuration, or one sentence that says why there is none."""
    try:
        if model.startswith(("/", ".", "~")) and not os.path.isdir(path):  # no name of a Hub model begins so
            raise OSError("there is no such folder.")
        return transformers.AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError) as error:
        raise LemError(
            f"Model '{model}' cannot be loaded: {str(error).strip().splitlines()[0]} Give a folder, a Hub id that this "
            f"machine can reach, or a name that lem_kit builds itself; {nearest(model, models.names())}"
        ) from error


def _engine_keywords(config: Any) -> set[str]:
    """What from_pretrained may take, to suggest a name. No list is published: it is read from signature and source."""
    known = set(config.to_dict()) if isinstance(config, transformers.PretrainedConfig) else set()
    for owner in (transformers.AutoModelForCausalLM, transformers.PreTrainedModel):
        known |= set(inspect.signature(owner.from_pretrained).parameters)
        known |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(owner.from_pretrained)))
    return {name for name in known if not name.startswith("_")} - {"pretrained_model_name_or_path", "model_args", "kwargs"}
