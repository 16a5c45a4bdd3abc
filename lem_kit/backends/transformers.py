"""Hugging Face transformers: `model.generate` on one static batch at a time, in one worker thread.

The one idea: a streamer receives the new token of every row once per decoding step. It keeps the instant and the tensor,
nothing more; the event loop collects them a few times per second and makes TokenEvents of them, so that observing costs the
generating thread about a microsecond per step and wakes nobody.

Tokens: the end-of-sequence token of a row counts as an output token (it was computed); what is generated to fill up a
finished row (padding) does not. On Apple's MPS, release 5 hands tokens over one step late.

Not covered: requests that arrive while others run (`concurrent` is False: a static batch has no scheduler), beam search.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from .. import models
from ..errors import LemError, nearest
from ..measurement import Request, TokenEvent, jsonable

DRAIN_S = 0.03  # how often the event loop looks for new tokens; their instants are taken in the worker, not here
_HUB_KEYWORDS = (
    "cache_dir", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip
_PLACING_KEYWORDS = ("device_map", "device_mesh", "distributed_config", "tp_plan", "tp_size")
_OWN_OPTIONS = {"attention_mask", "input_ids", "inputs", "inputs_embeds", "max_new_tokens", "streamer"}
_CONFIG_FACTS = {
    "vocabulary": "vocab_size", "layers": "num_hidden_layers", "hidden_size": "hidden_size",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_size": "head_dim",
}  # fmt: skip


def load(model: str, **engine_args: Any) -> Transformers:
    """Load with AutoModelForCausalLM.from_pretrained(model, **engine_args), its tokenizer beside it.

    Without a placement of the user's (`device_map` and the like) the model goes to the GPU if there is one.
    """
    path = models.resolve(model)
    hub = {name: engine_args[name] for name in _HUB_KEYWORDS if name in engine_args}
    if not os.path.isdir(path) and "local_files_only" not in hub and not _hub_answers():
        hub["local_files_only"] = True
    placing = {}
    if torch.cuda.is_available() and not any(name in engine_args for name in _PLACING_KEYWORDS):
        placing = {"device_map": "cuda"}
    with models.quiet_loading():
        config = engine_args["config"] if "config" in engine_args else _read_config(model, path, hub)
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(path, **placing, **{**hub, **engine_args})
        except TypeError as error:  # a keyword that nobody takes ends at the model's class, before weights are read
            name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not name or name[1] not in engine_args:
                raise
            known = _engine_keywords(config)
            raise LemError(
                f"transformers does not know the engine argument '{name[1]}': {nearest(name[1], known)}"
            ) from error
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left", **hub)
    if isinstance(loaded, tuple):  # output_loading_info=True
        loaded = loaded[0]
    facts = _facts(model, path, hub, loaded, engine_args, placed_by_us=bool(placing))
    return Transformers(loaded.eval(), tokenizer, facts)


class Transformers:
    """A loaded model and the one thread that runs it."""

    name = "transformers"
    concurrent = False

    def __init__(self, model: Any, tokenizer: Any, facts: dict[str, Any]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._facts = facts
        self._steps = _Steps()
        # One thread for the backend's life: a new one per call would pay for its own start and for CUDA's.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lem_kit-transformers")

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[TokenEvent]:
        """One static batch. Requests of a batch share max_new_tokens, fixed_length and options."""
        options = self._options(requests)
        steps = self._steps = _Steps()
        stop_ids = _ids(self._setting(options, "eos_token_id"))
        rows = [_Row(index, requests[0].max_new_tokens, stop_ids) for index in range(len(requests))]
        running = asyncio.wrap_future(self._worker.submit(self._run, list(requests), options, steps))
        try:
            finished = False
            while not finished:
                finished = bool((await asyncio.wait({running}, timeout=DRAIN_S))[0])
                while steps.seen:
                    t_ns, tokens = steps.seen.popleft()
                    # A step is (rows,), or (1, k) when assisted decoding accepts k tokens of a single row.
                    for row, new in zip(rows, tokens.tolist()):
                        if not row.ended:
                            yield row.event(t_ns, new if isinstance(new, list) else [new], steps.prompt_tokens)
            running.result()
            if steps.stop:
                raise LemError("This backend was closed while it was generating.")
            for row in rows:
                if not row.begun:
                    raise LemError("transformers handed over no token: these options (a paged cache?) do not stream.")
                if not row.ended:  # by a criterion of the user's: stop_strings, max_time, ...
                    yield TokenEvent(row.index, 0, finish_reason="stop")
        finally:
            steps.stop = True
            if not running.done():
                await asyncio.wait({running})
            running.exception()  # seen, so that asyncio does not report it as lost when the caller left early

    def _run(self, requests: list[Request], options: dict[str, Any], steps: _Steps) -> None:
        """In the worker thread: tokenise, pad on the left, generate."""
        rows = [list(r.prompt_token_ids) if r.prompt_token_ids else self._tokenizer(r.prompt).input_ids for r in requests]
        steps.prompt_tokens = [len(row) for row in rows]
        vocabulary = self._facts["model"]["vocabulary"]
        if vocabulary and any(not 0 <= i < vocabulary for row in rows for i in row):
            raise LemError(f"A prompt holds a token id outside the model's vocabulary of {vocabulary}; use ids below that.")
        longest = max(steps.prompt_tokens)
        padding = options.get("pad_token_id") or 0
        ids = [[padding] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        device = self._model.device
        tensors = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
        try:
            self._model.generate(**tensors, streamer=steps, **options)
        except _Stopped:
            pass
        except ValueError as error:  # said before anything is generated
            name = re.search(r"`model_kwargs` are not used by the model: \['(\w+)'", str(error))
            if not name:
                raise
            known = [option for option in vars(transformers.GenerationConfig()) if not option.startswith("_")]
            raise LemError(f"generate does not know the option '{name[1]}': {nearest(name[1], known)}") from error

    def _options(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Keywords for model.generate, checked before anything runs."""
        if self._model is None:
            raise LemError("This backend is closed: load it again with lem_kit.load_backend.")
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
            options["do_sample"] = False
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
        return options

    def _setting(self, options: Mapping[str, Any], name: str) -> Any:
        """A generation setting as it will be in force: the call's, its generation_config's, the model's."""
        if name in options:
            return options[name]
        value = getattr(options.get("generation_config"), name, None)
        return getattr(self._model.generation_config, name, None) if value is None else value

    def describe(self) -> dict[str, Any]:
        return self._facts

    def close(self) -> None:
        self._steps.stop = True
        self._worker.shutdown(wait=True)
        self._model = self._tokenizer = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Stopped(Exception):
    """Raised inside `generate` to leave it at the next token."""


class _Steps(BaseStreamer):
    """What the generating thread leaves behind: an instant and a tensor of tokens per decoding step."""

    def __init__(self) -> None:
        self.seen: deque[tuple[int, Any]] = deque()
        self.prompt_tokens: list[int] = []
        self.stop = False
        self._prompt_pending = True

    def put(self, value: Any) -> None:
        t_ns = time.monotonic_ns()
        if self.stop:
            raise _Stopped
        if self._prompt_pending:  # the first put is the prompt itself
            self._prompt_pending = False
        else:
            self.seen.append((t_ns, value))

    def end(self) -> None:
        pass


class _Row:
    """How far one request has come."""

    def __init__(self, index: int, max_new_tokens: int, stop_ids: set[int]) -> None:
        self.index = index
        self.begun = self.ended = False
        self._missing = max_new_tokens
        self._stop_ids = stop_ids

    def event(self, t_ns: int, new: list[int], prompt_tokens: list[int]) -> TokenEvent:
        """The event of one step; what follows an end-of-sequence token is not output."""
        stop_at = next((i for i, token in enumerate(new) if token in self._stop_ids), None)
        n_tokens = len(new) if stop_at is None else stop_at + 1
        self._missing -= n_tokens
        reason = "stop" if stop_at is not None else None if self._missing > 0 else "length"
        facts = None if self.begun else prompt_tokens[self.index]
        self.begun, self.ended = True, reason is not None
        return TokenEvent(self.index, n_tokens, t_ns, prompt_tokens=facts, finish_reason=reason)


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


def _hub_answers() -> bool:
    """One attempt by the Hub's own client, which would make six, and wait 23 seconds, for each file that is not cached."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # its class depends on the client's release
        return False
    return True


def _commit(path: str, hub: dict[str, Any]) -> str | None:
    """The commit of a Hub model, from the place of its file in the local Hub cache."""
    if os.path.isdir(path):
        return None
    file = os.path.join(hub.get("subfolder") or "", hub.get("gguf_file") or "config.json").replace(os.sep, "/")
    cached = huggingface_hub.try_to_load_from_cache(path, file, hub.get("cache_dir"), hub.get("revision"))
    found = re.search(r"snapshots/([0-9a-f]{40})/", str(cached).replace(os.sep, "/"))
    return found[1] if found else None


def _engine_keywords(config: Any) -> set[str]:
    """What from_pretrained may take, to suggest a name. No list is published: it is read from signature and source."""
    known = set(config.to_dict()) if isinstance(config, transformers.PretrainedConfig) else set()
    for owner in (transformers.AutoModelForCausalLM, transformers.PreTrainedModel):
        known |= set(inspect.signature(owner.from_pretrained).parameters)
        known |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(owner.from_pretrained)))
    return {name for name in known if not name.startswith("_")} - {"pretrained_model_name_or_path", "model_args", "kwargs"}


def _facts(
    name: str, path: str, hub: dict[str, Any], model: Any, engine_args: dict[str, Any], placed_by_us: bool
) -> dict[str, Any]:
    """What was asked and what is loaded, read back from the loaded model."""
    text = model.config.get_text_config()
    quantization: Any = getattr(model.config, "quantization_config", None)
    weights: dict[str, int] = {}
    for parameter in model.parameters():
        weights[str(parameter.device)] = weights.get(str(parameter.device), 0) + parameter.nbytes
    return {
        "engine": "transformers",
        "version": transformers.__version__,
        "torch": torch.__version__,
        "model": {
            "name": name,
            "revision": _commit(path, hub),
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": jsonable(quantization.to_dict() if hasattr(quantization, "to_dict") else quantization),
            **{ours: getattr(text, theirs, None) for ours, theirs in _CONFIG_FACTS.items()},
        },
        "requested": {key: "(not kept)" if key == "token" else jsonable(value) for key, value in engine_args.items()},
        "effective": {
            "attn_implementation": getattr(model.config, "_attn_implementation", None),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "device_map": jsonable(getattr(model, "hf_device_map", None)),
            "placement": "lem_kit: no device_map was given and CUDA is available" if placed_by_us else "transformers",
            # max_memory is not kept by the engine; what it leads to is: bytes of weights on each device.
            "weight_bytes": weights,
            # In force unless a request's options say otherwise: greedy, whatever the checkpoint proposes.
            "generation": {**jsonable(model.generation_config.to_diff_dict()), "do_sample": False},
        },
    }
