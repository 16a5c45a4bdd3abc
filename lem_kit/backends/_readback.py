"""What a loaded model, or its configuration alone, says of itself.

The one idea: a keyword counts as arrived when its effect can be read from the model: the dtype of its weights, the device
and the bytes they take there, the attention in force. Not covered: what the engine does with it at work (`_continuous`).
"""

from __future__ import annotations

import re
from typing import Any

from ..measurement import jsonable

_CONFIG_FACTS = {
    "vocabulary": "vocab_size", "layers": "num_hidden_layers", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_size": "head_dim",
}  # fmt: skip


def of_model(model: Any, name: str, revision: str | None) -> dict[str, Any]:
    """Identity and shape."""
    quantization: Any = getattr(model.config, "quantization_config", None)
    return {
        "name": name,
        "revision": revision,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": jsonable(quantization.to_dict() if hasattr(quantization, "to_dict") else quantization),
        **shape(model.config.get_text_config()),
    }


def shape(text: Any) -> dict[str, Any]:
    """What the configuration of a language model says of its size: an object with the attributes of config.json."""
    return {"context": _context(text), **{ours: getattr(text, theirs, None) for ours, theirs in _CONFIG_FACTS.items()}}


def is_secret(name: str) -> bool:
    """Whether a keyword of this name holds what a record must not."""
    return re.search(r"(^|_)(token|api_key|password|secret)$", name) is not None


def requested(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords as JSON: no secret, and no dump of a model that was given loaded."""
    told = {}
    for key, value in keywords.items():
        if key == "assistant_model":
            value = getattr(value, "name_or_path", value)
        told[key] = "(not kept)" if is_secret(key) else jsonable(value.to_dict() if hasattr(value, "to_dict") else value)
    return told


def effective(model: Any, placed_by: str) -> dict[str, Any]:
    """The configuration in force."""
    return {
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "device_map": jsonable(getattr(model, "hf_device_map", None)),
        "placement": placed_by,
        # max_memory is not kept by the engine; what it leads to is: bytes of weights on each device.
        "weight_bytes": _weight_bytes(model),
        # In force unless a request's options say otherwise.
        "generation": {**jsonable(model.generation_config.to_diff_dict()), "do_sample": model.generation_config.do_sample},
    }


def _weight_bytes(model: Any) -> dict[str, int]:
    """By device, as stored: weights that are packed in tensors of a kind of their own, or kept in buffers, are quantised."""
    stored = {id(tensor): tensor for tensor in model.parameters()}
    for module in model.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                stored[id(tensor)] = tensor
    found: dict[str, int] = {}
    for tensor in stored.values():
        device = str(tensor.device)
        found[device] = found.get(device, 0) + _stored_bytes(tensor)
    return found


def _stored_bytes(tensor: Any) -> int:
    """A packed tensor says the size of what it stands for; its parts say what it takes."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _context(text: Any) -> int | None:
    """The longest sequence in tokens; a stretched rotary embedding counts as long as its factor says."""
    length = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    if length and isinstance(factor := rope.get("factor"), (int, float)):
        length = max(length, int(factor * rope.get("original_max_position_embeddings", length)))
    return length
