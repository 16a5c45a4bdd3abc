"""Prompts from data sets: by name from the Hugging Face Hub, from a folder or a file, or from rows at hand.

The one idea: the library `datasets` reads them, and nothing of a data set is ever run: `trust_remote_code` is not set.

Not covered: rows of token ids (make a `Request` of each), images and sound.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .chats import Form, Said, said
from .errors import LemError, Unavailable, nearest, shown
from .measurement import Request
from .models import hub_as_it_is
from .synthetic import counted, seeded
from .texts import chosen, of_conversations, texts

_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # what the library calls them


def dataset(
    source: Any,
    split: str = "train",
    field: str = "prompt",
    count: int | None = None,
    seed: int | None = None,
    config: str | None = None,
    revision: str | None = None,
    max_new_tokens: int | None = 64,
    whole: bool = False,
    tokenizer: Any = None,
    fixed_length: bool = False,
    **options: Any,
) -> list[Request]:
    """Rows of a data set: the name of one on the Hub (with `config` and `revision`), a folder, a file (.json, .jsonl, .csv,
    .parquet), or rows at hand, such as a data set that is loaded already, streaming or not.

    A row's `field` holds a text, or a list of messages; of these, as in `sharegpt`, what the user says first or, with
    `whole`, every turn. `count` of them: the first, or, with a `seed`, drawn. Rows without a text are left out, with a
    warning. Without a network a data set is read from its folder, or from the local cache of the Hub.
    """
    form = Form(whole, max_new_tokens, tokenizer, fixed_length, options)
    named = isinstance(source, (str, Path))
    where = f"The data set {source}" if named else "The data set"
    if isinstance(source, bytes) or not (str(source) if named else isinstance(source, Iterable)):
        raise LemError(f"dataset() takes a name, a folder, a file or rows: got {shown(source)}.")
    if isinstance(source, Mapping):
        held = ", ".join(map(str, source))
        raise LemError(f"The data set holds {held} and no rows: give one of its splits, or a list of rows.")
    if count is not None:
        counted("count= takes", count)
    if seed is not None:
        seeded(seed)
    rows = _loaded(str(source), split, config, revision) if named else source
    found = list(_values(rows, field, where, None if seed is not None else count))
    if all(isinstance(value, str) for _, value in found):
        if max_new_tokens is None:
            raise LemError(f"{where}: '{field}' holds texts without answers to take a length from: say max_new_tokens=64.")
        values = chosen([value for _, value in found], count, seed, f"{where} holds {{}} prompts")
        return texts(values, max_new_tokens, fixed_length, **options)
    spoken: list[tuple[str, list[Said]]] = []
    for number, value in found:
        try:
            spoken.append((f"row-{number}", said(value)))
        except ValueError as error:
            raise LemError(f"{where}, row {number}: '{field}' holds no prompt: {error}.") from error
    return of_conversations(spoken, form, where, count, seed)


def _values(rows: Iterable[Any], field: str, where: str, enough: int | None) -> Iterator[tuple[int, Any]]:
    """What `enough` rows hold under `field`, and their numbers; rows that hold nothing there are passed over."""
    left = given = 0
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise LemError(f"{where}, row {number}: expected a row with named fields, and got {type(row).__name__}.")
        if field not in tuple(row):
            raise LemError(f"{where} has no field '{field}' in row {number}: {nearest(str(field), map(str, row))}")
        value = row[field]
        if value is None or (isinstance(value, str) and not value.strip()):
            left += 1
            continue
        yield number, value
        given += 1
        if given == enough:
            break
    if left:
        warnings.warn(f"{where}: {left} rows hold no text under '{field}' and were left out.", stacklevel=3)


def _loaded(name: str, split: str, config: str | None, revision: str | None) -> Any:
    """A data set by name. One that would need code of its own is refused by the library."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise Unavailable(f"Data sets need the package {error.name}: pip install 'lem_kit[datasets]'") from error
    path = Path(name)
    if path.is_file() and path.suffix not in _FILES:
        raise LemError(f"{path} is no file that a data set is read from: those end in {', '.join(_FILES)}.")
    try:
        with _quiet(datasets.utils), hub_as_it_is():
            if path.is_file():
                return datasets.load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
            if not any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
                return datasets.load_dataset(name, config, split=split, revision=revision)
            saved = datasets.load_from_disk(name)
    except Exception as error:  # the library raises a dozen classes, those of the network among them
        sentence = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = (
            "check the files."
            if path.exists()
            else "check the name. Without a network, fetch it elsewhere with "
            f"`hf download {name} --repo-type dataset --local-dir FOLDER` and give that folder."
        )
        raise LemError(f"Cannot load the data set '{name}' ({sentence}): {remedy}") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise LemError(f"The data set {name} has no split '{split}': {nearest(split, map(str, saved))}")
    return saved[split]


@contextlib.contextmanager
def _quiet(bars: Any) -> Iterator[None]:
    """No bars while it loads; the user's setting is put back after."""
    hidden = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            bars.enable_progress_bars()
