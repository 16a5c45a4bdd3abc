"""Prompts from data sets, by the real library `datasets` on files of this machine: nothing is fetched, and nothing run."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem_kit import prompts
from lem_kit.errors import LemError, Unavailable

ROWS = [{"prompt": f"Question {n}?", "text": f"Text {n}"} for n in range(12)]
SPOKEN = [("user", "One {}?"), ("assistant", "Yes."), ("user", "Two?")]
TALKS = [{"messages": [{"role": role, "content": text.format(n)} for role, text in SPOKEN]} for n in range(4)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The library's cache is this test's own, and it does not try the network."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_file_a_folder_and_a_saved_data_set_give_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import datasets

    wanted = [row["prompt"] for row in ROWS]
    file = written(tmp_path / "set" / "train.jsonl", ROWS)
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(2))}).save_to_disk(tmp_path / "both")
    saved.to_parquet(tmp_path / "rows.parquet")
    saved.to_csv(tmp_path / "rows.csv")
    capfd.readouterr()
    for source in (
        file,
        file.parent,
        tmp_path / "saved",
        tmp_path / "both",
        tmp_path / "rows.parquet",
        str(tmp_path / "rows.csv"),
    ):
        assert [r.prompt for r in prompts.dataset(source)] == wanted, source
    assert [r.prompt for r in prompts.dataset(tmp_path / "both", split="test")] == wanted[:2]
    assert capfd.readouterr().err == "", "no bars"
    assert not datasets.utils.are_progress_bars_disabled(), "and the user's setting is as it was"


def test_rows_are_chosen_like_lines(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", ROWS)
    made = prompts.dataset(file, field="text", count=3, max_new_tokens=7, fixed_length=True, top_k=1)
    assert [(r.prompt, r.max_new_tokens, r.fixed_length, r.options) for r in made] == [
        (f"Text {n}", 7, True, {"top_k": 1}) for n in range(3)
    ]
    drawn = [r.prompt for r in prompts.dataset(file, count=5, seed=3)]
    assert len(set(drawn)) == 5 and drawn == [r.prompt for r in prompts.dataset(file, count=5, seed=3)]
    with pytest.raises(LemError, match=r"rows\.jsonl holds 12 prompts, and 13 were asked for: ask for 12 or fewer"):
        prompts.dataset(file, count=13)
    with pytest.raises(LemError, match=r"has no field 'promt' in row 0: did you mean 'prompt'"):
        prompts.dataset(file, field="promt")
    with pytest.raises(LemError, match="count= takes a whole number"):
        prompts.dataset(file, count=0)
    with pytest.raises(LemError, match="'prompt' holds texts without answers"):
        prompts.dataset(file, max_new_tokens=None, tokenizer="tiny-llama")


def test_rows_at_hand_are_read_no_further_than_is_asked() -> None:
    import datasets

    def endless() -> Iterator[dict[str, Any]]:
        yield from ROWS
        raise AssertionError("read on")

    assert [r.prompt for r in prompts.dataset(endless(), count=3)] == ["Question 0?", "Question 1?", "Question 2?"]
    streaming = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert len(prompts.dataset(streaming, count=4)) == 4
    with pytest.raises(LemError, match="row 0: expected a row with named fields, and got str"):
        prompts.dataset(["text"])
    with pytest.raises(LemError, match="The data set holds no prompts"):
        prompts.dataset([])


def test_empty_rows_are_left_out_and_said() -> None:
    rows = [{"prompt": ""}, {"prompt": "a"}, {"prompt": None}, {"prompt": " \n"}, {"prompt": "b"}]
    with pytest.warns(UserWarning, match="3 rows hold no text under 'prompt'"):
        assert [r.prompt for r in prompts.dataset(rows)] == ["a", "b"]


def test_messages_are_conversations(tmp_path: Path) -> None:
    file = written(tmp_path / "talks.jsonl", TALKS)
    assert [r.prompt for r in prompts.dataset(file, field="messages")] == [f"One {n}?" for n in range(4)]
    made = prompts.dataset(file, field="messages", count=2, whole=True)
    assert [(r.conversation, r.turn) for r in made] == [("row-0", 0), ("row-0", 1), ("row-1", 0), ("row-1", 1)]
    assert made[1].prompt == "User: One 0?\n\nAssistant: Yes.\n\nUser: Two?\n\nAssistant:"
    with pytest.raises(LemError, match=r"row 1: 'prompt' holds no prompt: expected a list of messages"):
        prompts.dataset([{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": 5}])


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    import datasets

    with pytest.raises(
        LemError, match=r"Cannot load the data set 'nobody/nothing' .* `hf download nobody/nothing --repo-type"
    ):
        prompts.dataset("nobody/nothing")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": \n')
    with pytest.raises(LemError, match=r"Cannot load the data set '.*broken\.jsonl' .*: check the files"):
        prompts.dataset(broken)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(LemError, match=r"notes\.txt is no file that a data set is read from: those end in \.json"):
        prompts.dataset(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LemError, match="Cannot load the data set"):
        prompts.dataset(tmp_path / "empty")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(LemError, match="has no split 'trian': did you mean 'train'"):
        prompts.dataset(tmp_path / "saved", split="trian")


@pytest.mark.parametrize("bad", [None, 3, b"abc", ""])
def test_what_is_no_data_set_is_one_sentence(bad: Any) -> None:
    with pytest.raises(LemError, match=r"dataset\(\) takes a name, a folder, a file or rows: got"):
        prompts.dataset(bad)


def test_splits_and_columns_are_not_rows() -> None:
    import datasets

    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    for bad in (splits, {"prompt": ["a", "b"]}):
        with pytest.raises(LemError, match=r"holds (train|prompt) and no rows: give one of its splits, or a list of rows"):
            prompts.dataset(bad)


def test_a_field_is_a_name_and_a_seed_a_number() -> None:
    with pytest.raises(LemError, match=r"no field '\['x'\]' in row 0"):
        prompts.dataset([{"prompt": "a"}], field=["x"])  # type: ignore[arg-type]
    for bad in ([1], "a", 1.5):
        with pytest.raises(LemError, match="seed= takes a whole number"):
            prompts.dataset([{"prompt": "a"}], seed=bad)  # type: ignore[arg-type]


def test_code_of_a_data_set_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(LemError, match="Cannot load the data set"):
        prompts.dataset(folder)
    assert not (tmp_path / "ran").exists()


def test_the_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_such(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_such)
    with pytest.raises(Unavailable, match=r"need the package datasets: pip install 'lem_kit\[datasets\]'"):
        prompts.dataset("any")
