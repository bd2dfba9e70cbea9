"""The data: rendered, split by content, tokenised once, batched in each trial's own order."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_search.data import TokenizedData, TokenSplit, collate, evaluation_batches, tokenize_data, training_rows
from lora_search.data.rows import read_splits
from lora_search.errors import InputError
from lora_search.spec import Data

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tokenizer(bos: bool = True, eos: str = "</s>", template: str | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, with or without a start token of its own."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: index for index, word in enumerate([*special, ":", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, unk_token="<unk>")
    fast.pad_token = fast.eos_token
    fast.chat_template = template
    return fast


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def distinct_rows(count: int) -> list[dict[str, str]]:
    draw = np.random.default_rng(0)
    return [
        {"prompt": " ".join(draw.choice(WORDS, 6)), "completion": f"{WORDS[i % len(WORDS)]} {i}"} for i in range(count)
    ]


def texts(split: TokenSplit, using: PreTrainedTokenizerFast) -> list[str]:
    return [using.decode(split.row(i)[0]) for i in range(len(split))]


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", distinct_rows(300))


def load(path: str, using: PreTrainedTokenizerFast | None = None, **keys: Any) -> TokenizedData:
    return tokenize_data(Data(path=path, **keys), using or tokenizer())


def test_loss_counts_the_completion_and_the_end_token_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"the {word}", "completion": f"sees {word}"} for word in WORDS]
    data = load(write(tmp_path / "a.jsonl", rows), template="{prompt} : ", validation=0.2, test=0.2)
    using = tokenizer()
    for split in (data.train, data.validation, data.test):
        for index in range(len(split)):
            tokens, trained = split.row(index)
            assert using.convert_ids_to_tokens(tokens.tolist())[0] == "<s>"
            assert using.convert_ids_to_tokens(tokens.tolist())[3] == ":"
            assert using.convert_ids_to_tokens(tokens.tolist())[-1] == "</s>"
            assert trained.tolist() == [False] * 4 + [True] * 3


def test_prompt_is_tokenised_as_it_will_be_alone(rows_file: str) -> None:
    """What the model reads in training is, to the token, what it reads when it answers."""
    using = AutoTokenizer.from_pretrained(str(shared("stories260k")))
    using.pad_token = using.eos_token
    data = load(rows_file, using)
    for index in range(20):
        tokens, trained = data.train.row(index)
        prompt = using.decode(tokens[~trained], skip_special_tokens=True)
        assert using(prompt.lstrip(" "))["input_ids"] == tokens[~trained].tolist()


def test_start_token_stands_once_where_the_tokenizer_has_one(rows_file: str) -> None:
    with_bos, without = tokenizer(bos=True), tokenizer(bos=False)
    assert load(rows_file, with_bos).train.row(0)[0].tolist().count(1) == 1
    assert load(rows_file, without).train.row(0)[0].tolist().count(1) == 0
    same = tokenizer(bos=True, eos="<s>")  # OPT: one token is both
    tokens, trained = load(rows_file, same).train.row(0)
    assert (tokens[0], tokens[-1], trained[0], trained[-1]) == (1, 1, False, True)


def test_text_is_trained_on_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"the {a} sees {b}"} for a in WORDS for b in WORDS])
    data = load(path, format="text")
    tokens, trained = data.train.row(0)
    assert trained.tolist() == [False, True, True, True, True, True]
    assert len(tokens) == 6


def test_chat_trains_on_every_turn_of_the_assistant(tmp_path: Path) -> None:
    def talk(word: str) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": f"the {word}"},
                {"role": "assistant", "content": "sees it"},
                {"role": "user", "content": "and then"},
                {"role": "assistant", "content": word},
            ]
        }

    path = write(tmp_path / "a.jsonl", [talk(word) for word in WORDS * 3])
    using = tokenizer(template=TEMPLATE)
    data = load(path, using, format="chat", validation=0.2, test=0.2)
    tokens, trained = data.train.row(0)
    assert using.decode(tokens[trained]).split()[:3] == ["sees", "it", "</s>"]
    assert using.decode(tokens[trained]).split()[-1] == "</s>"
    assert using.decode(tokens[~trained]).split()[0] == "<|user|>"
    with pytest.raises(InputError, match="chat template"):
        load(path, tokenizer(), format="chat")


ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "system", "content": "it"}, {"role": "assistant", "content": "sees"}], "System role not supported"),
        (["the cat", "sees"], "message 0 must be a mapping.*'the cat'"),
        ([None, {"role": "assistant", "content": "sees"}], "message 0 must be a mapping"),
        ([{"role": "user"}, {"role": "assistant", "content": "sees"}], "no attribute 'content'"),
        ([{"role": "user", "content": "it"}, {"role": "assistant"}], "no attribute 'content'"),
        ("the cat", "must list messages; found 'the cat'"),
        ([], "at least from the assistant"),
    ],
    ids=["refused role", "texts", "null", "no content", "no answer", "no list", "none"],
)
def test_chat_row_that_the_template_refuses_is_named(tmp_path: Path, messages: Any, said: str) -> None:
    good = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"}]
    path = write(tmp_path / "a.jsonl", [{"messages": good}, {"messages": messages}])
    template = ALTERNATING.replace("m['content']", "m['content'] + ''")
    with pytest.raises(InputError, match=rf"data\.path: row 1 of .*a\.jsonl: .*{said}") as caught:
        load(path, tokenizer(template=template), format="chat")
    assert len(str(caught.value).splitlines()) == 1


def test_columns_and_template_are_the_sweep_files(tmp_path: Path) -> None:
    rows = [{"question": f"the {a}", "answer": b} for a in WORDS for b in WORDS[:5]]
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, columns={"prompt": "question", "completion": "answer"}, template="red {prompt} blue ")
    assert texts(data.train, tokenizer())[0].split()[1:3] == ["red", "the"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_every_kind_of_file_reads_the_same(tmp_path: Path, rows_file: str, kind: str) -> None:
    import pandas as pd

    frame = pd.DataFrame(distinct_rows(300))
    path = tmp_path / f"same.{kind}"
    match kind:
        case "jsonl":
            path = Path(rows_file)
        case "json":
            frame.to_json(path, orient="records")
        case "csv":
            frame.to_csv(path, index=False)
        case "parquet":
            frame.to_parquet(path)
        case "folder":
            path = tmp_path / "folder"
            path.mkdir()
            frame.to_parquet(path / "train.parquet")
    assert load(str(path)).fingerprint == load(rows_file).fingerprint


AS_WRITTEN = [
    "001",
    "1.50",
    "true",
    "None",
    "NA",
    "1e3",
    "2024-05-01",
    "[1]",
    "10:00",
    "null",
    '"quoted"',
    " spaced ",
    "",
]


@pytest.mark.parametrize("lines", [True, False])
def test_plain_json_is_read_without_a_library_for_other_data(
    lines: bool, tmp_path: Path, rows_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` is imported by nobody else on a host: that would be a third of a second, and 80 MB."""
    file = Path(rows_file)
    if not lines:
        file = tmp_path / "list.json"
        file.write_text(json.dumps([json.loads(line) for line in Path(rows_file).read_text().splitlines()]))
    expected = tokenize_data(Data(path=rows_file), tokenizer()).fingerprint
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert tokenize_data(Data(path=str(file)), tokenizer()).fingerprint == expected


def test_compressed_file_is_read_by_its_content(tmp_path: Path, rows_file: str) -> None:
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(Path(rows_file).read_bytes()))
    found = tokenize_data(Data(path=str(packed)), tokenizer())
    assert found.fingerprint == tokenize_data(Data(path=rows_file), tokenizer()).fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder of csv", "folder of jsonl"])
def test_text_is_trained_on_as_it_is_written(tmp_path: Path, kind: str) -> None:
    """Readers that guess types make 1 of 001, a missing value of None, and a time of day of a date."""
    import pandas as pd

    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / f"train.{kind.split()[-1]}"
    frame = pd.DataFrame({"prompt": AS_WRITTEN * 9, "completion": AS_WRITTEN * 9, "other": range(len(AS_WRITTEN) * 9)})
    if file.suffix == ".jsonl":
        frame.to_json(file, orient="records", lines=True)
    elif file.suffix == ".json":
        frame.to_json(file, orient="records")
    elif file.suffix == ".csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    data = Data(path=str(folder if "folder" in kind else file), template="{prompt}", validation=0.3, test=0.3)
    splits = read_splits(data, tokenizer())
    read = [row for part in (splits.train, splits.validation, splits.test) for row in part]
    assert sorted(row[1].text for row in read) == sorted(AS_WRITTEN * 9)
    assert all(row[0].text == row[1].text for row in read)


def test_column_of_dates_stays_text(tmp_path: Path) -> None:
    dates = [f"2024-05-{day:02d}" for day in range(1, 29)]
    path = write(tmp_path / "a.jsonl", [{"prompt": str(i), "completion": day} for i, day in enumerate(dates)])
    splits = read_splits(Data(path=path, validation=0.3, test=0.3), tokenizer())
    assert {row[1].text for part in (splits.train, splits.validation, splits.test) for row in part} == set(dates)


def test_numbers_in_json_stand_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": {i}, "completion": {i}.50}}\n' for i in range(40)))
    splits = read_splits(Data(path=str(file), template="{prompt}", validation=0.3, test=0.3), tokenizer())
    read = {tuple(s.text for s in row) for part in (splits.train, splits.validation, splits.test) for row in part}
    assert read == {(str(i), f"{i}.50") for i in range(40)}


@pytest.mark.parametrize("value", [True, 0.5, "time"])
def test_parquet_that_holds_no_text_is_refused(tmp_path: Path, value: Any) -> None:
    import pandas as pd

    value = pd.Timestamp("2024-05-01") if value == "time" else value
    pd.DataFrame({"prompt": ["a"] * 5, "completion": [value] * 5}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 0 of .*a\.parquet: column 'completion' must be text.*found"):
        load(str(tmp_path / "a.parquet"))


def test_slice_of_a_split_is_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", distinct_rows(100))
    write(tmp_path / "test.jsonl", distinct_rows(50))
    for split, count in (("train[:50%]", 50), ("train[10:]+test", 140), ("test", 50)):
        data = load(str(tmp_path), split=split, validation=0.2, test=0.2)
        assert len(data.train) + len(data.validation) + len(data.test) == count
    with pytest.raises(InputError, match="'dev'; it has train, test"):
        load(str(tmp_path), split="dev")


def test_duplicates_never_cross_from_one_split_to_another(tmp_path: Path) -> None:
    rows = distinct_rows(200)
    spaced = [{"prompt": row["prompt"], "completion": f" {row['completion']} "} for row in rows]
    data = load(write(tmp_path / "a.jsonl", [*rows, *rows, *spaced]), validation=0.3, test=0.3)
    using = tokenizer()
    splits = [set(texts(split, using)) for split in (data.train, data.validation, data.test)]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 600


def test_added_rows_move_no_other(tmp_path: Path) -> None:
    before = load(write(tmp_path / "a.jsonl", distinct_rows(200)))
    after = load(write(tmp_path / "b.jsonl", reversed(distinct_rows(300))))
    using = tokenizer()
    for name in ("train", "validation", "test"):
        assert set(texts(getattr(before, name), using)) <= set(texts(getattr(after, name), using))


def test_shares_are_near_what_was_asked_for(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", distinct_rows(5000)), validation=0.1, test=0.2)
    assert len(data.validation) == pytest.approx(500, abs=75)
    assert len(data.test) == pytest.approx(1000, abs=100)


def test_splits_may_be_files_of_their_own(tmp_path: Path, rows_file: str) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "the cat", "completion": f"{w} it"} for w in WORDS])
    data = load(rows_file, validation=other)
    assert len(data.validation) == len(WORDS)
    assert len(data.train) + len(data.test) == 300


def test_row_that_stands_in_a_file_to_judge_by_is_not_trained_on(tmp_path: Path) -> None:
    """Nor is a row that is tested by validated by."""
    rows = distinct_rows(100)
    spaced = [row | {"completion": f"{row['completion']} "} for row in rows]
    path = write(tmp_path / "all.jsonl", rows)
    validation = write(tmp_path / "validation.jsonl", spaced[:30])
    test = write(tmp_path / "test.jsonl", rows[20:50])
    data = load(path, validation=validation, test=test)
    assert (len(data.train), len(data.validation), len(data.test), data.overlapping) == (50, 20, 30, 60)
    data = load(path, validation=validation)
    assert (len(data.train) + len(data.test), len(data.validation), data.overlapping) == (70, 30, 30)
    with pytest.raises(InputError, match="none fell into the train split; 100 stand in"):
        load(path, validation=path)


def test_limit_reads_the_first_rows(rows_file: str) -> None:
    data = load(rows_file, limit=100)
    assert len(data.train) + len(data.validation) + len(data.test) == 100


def test_long_rows_are_cut_and_empty_ones_dropped_and_both_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "the " * 3, "completion": f"cat sees {w}"} for w in WORDS]
    rows += [{"prompt": "the " * 20, "completion": w} for w in WORDS]
    data = load(write(tmp_path / "a.jsonl", rows), max_length=6, validation=0.2, test=0.2)
    assert (data.truncated, data.dropped) == (2 * len(WORDS), len(WORDS))
    assert max(data.train.lengths_N) == 6


def test_fingerprint_changes_with_what_is_trained_on(rows_file: str) -> None:
    first = load(rows_file)
    assert load(rows_file).fingerprint == first.fingerprint
    assert load(rows_file, max_length=8).fingerprint != first.fingerprint
    assert load(rows_file, template="{prompt} : ").fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("content", "keys", "said"),
    [
        ('{"prompt": "a"}\n', {}, "column 'completion'"),
        ('{"prompt": "a", "completion": null}\n{"prompt": "a", "completion": "b"}\n', {}, "row 0 of"),
        ('{"prompt": "a", "comp\n', {}, "cannot read"),
        ('{"prompt": "a", "completion": true}\n', {}, "row 0 of .* found True"),
        ('{"prompt": "a", "completion": "\\ud800"}\n', {}, "row 0 of .*surrogates"),
        ('{"prompt": "a", "completion": NaN}\n', {}, "must be text, or a number in JSON; found nothing"),
        ("3\n", {}, "line 1: found 3"),
        ("", {}, "cannot read"),
        ('{"prompt": "a", "completion": "b"}\n', {}, "split"),
        ('{"prompt": "a", "completion": "b"}\n', {"format": "chat"}, "column 'messages'"),
    ],
    ids=[
        "no column",
        "null",
        "malformed",
        "true",
        "half a character",
        "nan",
        "no object",
        "empty",
        "one row",
        "no messages",
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, content: str, keys: dict[str, Any], said: str) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        load(str(file), **keys)
    assert "wrong.jsonl" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_real_data_sets_read() -> None:
    e2e = load(str(shared("e2e") / "valid.jsonl"), max_length=512)
    assert len(e2e.train) + len(e2e.validation) + len(e2e.test) == 4672
    columns = {"prompt": "question", "completion": "answer"}
    gsm8k = load(str(shared("gsm8k") / "test.jsonl"), columns=columns, max_length=512)
    assert len(gsm8k.train) + len(gsm8k.validation) + len(gsm8k.test) == 1319


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 100), st.integers(1, 50))
def test_order_of_the_data_is_a_function_of_seed_and_position(rows: int, seed: int, start: int, count: int) -> None:
    whole = training_rows(rows, seed, 0, start + count)
    assert training_rows(rows, seed, start, count) == whole[start:]
    for epoch in range(len(whole) // rows):
        assert sorted(whole[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_batch_holds_the_rows_and_nothing_else(tiny_data: TokenizedData) -> None:
    batch = collate(tiny_data.train, [3, 1, 4], tiny_data.pad_token_id)
    lengths = [len(tiny_data.train.row(i)[0]) for i in (3, 1, 4)]
    assert batch.input_ids_BT.shape == (3, max(lengths))
    assert batch.attention_mask_BT.sum(1).tolist() == lengths
    assert batch.tokens == sum(lengths)
    assert batch.targets == int(batch.trained_BT.sum())
    assert not (batch.trained_BT & (batch.attention_mask_BT == 0)).any()


def test_evaluation_reads_every_row_once(tiny_data: TokenizedData) -> None:
    split = tiny_data.train
    batches = list(evaluation_batches(split, tiny_data.pad_token_id, max_tokens=100))
    assert sum(batch.tokens for batch in batches) == len(split.tokens_S)
    assert sum(batch.targets for batch in batches) == int(split.trained_S.sum())
    assert all(batch.input_ids_BT.numel() <= 100 for batch in batches)
    assert torch.cat([batch.attention_mask_BT.sum(1) for batch in batches]).diff().min() >= 0
