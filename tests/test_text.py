from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tiny_host import VOCAB, tiny_tokenizer

from rsae.text import (
    Document,
    documents,
    evaluation_contexts,
    pack,
    sae_probes_documents,
    shared_documents,
    text_fingerprint,
)

SPLITS = ("train", "validation", "evaluation")
TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(50)] + [f"w{i} w{i}" for i in range(50)]


def write(path, texts, column="text"):
    """Write texts in the format of the file's suffix."""
    table = pd.DataFrame({"id": range(len(texts)), column: texts})
    if path.name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif path.name.endswith(".parquet"):
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)  # .csv and .csv.zst
    return path


def test_packing_by_hand() -> None:
    docs = [Document("s", "w0 w1 w2"), Document("s", "w3"), Document("s", "w4 w5")]
    w, newline, bos = VOCAB["w0"], VOCAB["\n"], VOCAB["<bos>"]
    contexts = list(pack(docs, tiny_tokenizer(), 5))
    # the stream is w0 w1 w2 nl nl w3 nl nl w4 w5 nl nl: three contexts of BOS and 4 tokens
    assert [context.tokens.tolist() for context in contexts] == [
        [bos, w, w + 1, w + 2, newline],
        [bos, newline, w + 3, newline, newline],
        [bos, w + 4, w + 5, newline, newline],
    ]
    assert [context.document_ids.tolist() for context in contexts] == [
        [-1, 0, 0, 0, 0],
        [-1, 0, 1, 1, 1],
        [-1, 2, 2, 2, 2],
    ]
    assert len(list(pack(docs, tiny_tokenizer(), 6))) == 2  # the last 2 tokens do not fill a context


def test_packing_without_bos() -> None:
    tokenizer = tiny_tokenizer(unk_token="<unk>")
    [context] = pack([Document("s", "w0 w1")], tokenizer, 4)
    assert context.tokens.tolist() == [VOCAB["w0"], VOCAB["w1"], VOCAB["\n"], VOCAB["\n"]]
    assert context.document_ids.tolist() == [0, 0, 0, 0]


def test_control_tokens_in_the_text_are_dropped() -> None:
    [context] = pack([Document("s", "w0 <bos> w1 <eos> w2 <pad> what")], tiny_tokenizer(), 7)
    assert context.tokens.tolist() == [VOCAB[t] for t in ("<bos>", "w0", "w1", "w2", "<unk>", "\n", "\n")]


def test_bos_that_is_also_eos_stands_only_at_the_start() -> None:
    tokenizer = tiny_tokenizer(bos_token="<eos>", eos_token="<eos>", unk_token="<unk>")
    docs = [Document("s", "w1 w2 w3") for _ in range(20)]
    tokens = np.stack([context.tokens for context in pack(docs, tokenizer, 8)])
    assert (tokens[:, 0] == VOCAB["<eos>"]).all()
    assert not (tokens[:, 1:] == VOCAB["<eos>"]).any()


def test_packing_streams() -> None:
    """An endless text is read only as far as needed; nothing is lost between the batches it is tokenised in."""
    numbers = itertools.count()
    endless = (Document("s", TEXTS[i % 100]) for i in numbers)
    first = list(itertools.islice(pack(endless, tiny_tokenizer(), 16), 1000))
    assert next(numbers) < 10_000  # 15,000 tokens of 4.5 a document, and what was read ahead
    tokens = np.concatenate([context.tokens[1:] for context in first])
    words = " ".join(TEXTS[i % 100] + " \n \n" for i in range(5000)).split(" ")
    assert tokens.tolist() == [VOCAB[word] for word in words][: len(tokens)]


def test_context_too_small() -> None:
    with pytest.raises(ValueError, match="at least 2, not 1"):
        next(pack([], tiny_tokenizer(), 1))


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.csv.zst", "t.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name) -> None:
    path = write(tmp_path / name, [*TEXTS, TEXTS[3], "  "])
    splits = {split: [doc.text for doc in documents(str(path), split=split)] for split in SPLITS}
    assert sorted(itertools.chain(*splits.values())) == sorted(TEXTS)  # disjoint, complete, no duplicate, no blank
    assert len(splits["train"]) > 80
    assert splits["validation"]
    assert splits["evaluation"]
    assert [doc.text for doc in documents(str(path))] == splits["train"]  # the same order again
    reference = write(tmp_path / "reference.jsonl", TEXTS)
    assert [doc.text for doc in documents(str(reference))] == splits[
        "train"
    ]  # the split follows the text, not the file


def test_tables_are_read_as_they_stand(tmp_path) -> None:
    """Texts that pandas would take for missing ones or numbers, and rows that end in a comma, which it would take for an index."""
    texts = ["null", "None", "N/A", "1", "007", "real words"]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"{text},,\n" for text in [*texts, ""]))
    found = [doc.text for split in SPLITS for doc in documents(str(tmp_path), split=split)]
    assert sorted(found) == sorted(texts)


def test_a_folder_and_its_txt_files(tmp_path) -> None:
    for i, text in enumerate(TEXTS[:30]):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    write(tmp_path / "more.csv", TEXTS[20:40], column="content")
    found = [doc for split in SPLITS for doc in documents(str(tmp_path), split=split)]
    assert sorted(doc.text for doc in found) == sorted(TEXTS[:40])  # 20 to 29 stand in both


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.txt", r"not found: expected package:sae-probes, a file or folder, or hf:dataset\[split\]"),
        (
            lambda p: write(p / "t.csv", ["a"], column="body"),
            "no column text, prompt or content; its columns are id, body",
        ),
        (lambda p: write(p / "t.parquet", ["a"], column="body"), "its columns are id, body"),
        (lambda p: p, "holds no text"),
        (lambda p: "hf:nosplit", r"expected hf:dataset\[split\]"),
        (lambda p: "package:shakespeare", "expected package:sae-probes"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, make, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(documents(str(make(tmp_path))))


def test_broken_rows_and_wrong_splits(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "w1"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"t\.jsonl line 2 is not JSON"):
        list(documents(str(tmp_path / "t.jsonl")))
    (tmp_path / "t.jsonl").write_text('{"words": "w1"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected an object with a string \"text\", got \['words'\]"):
        list(documents(str(tmp_path / "t.jsonl")))
    (tmp_path / "t.doc").write_text("w1")
    with pytest.raises(ValueError, match=r"expected a file ending in \.txt"):
        list(documents(str(tmp_path / "t.doc")))
    with pytest.raises(ValueError, match="split must be"):
        list(documents(str(tmp_path), split="test"))  # type: ignore[arg-type]


def test_what_editors_and_tables_make_of_text(tmp_path) -> None:
    """Byte order marks, empty rows, bytes and suffixes in capitals are read; what is no text is refused, not turned into some."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def texts(path):
        return sorted(doc.text for split in SPLITS for doc in documents(str(path), split=split))

    (tmp_path / "T.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "w1"}\n{"text": null}\n{"text": "w2"}\n')
    assert texts(tmp_path / "T.JSONL") == texts(tmp_path) == ["w1", "w2"]
    for text, encoding, found in (
        ("w1", "utf-16", "at byte 0"),
        ("w1", "utf-16-le", "NUL"),
        ("w1 é", "latin-1", "at byte 3"),
    ):
        (tmp_path / "t.txt").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=rf"t\.txt is not UTF-8 text \(.*{found}"):
            texts(tmp_path / "t.txt")
    parquet.write_table(pa.table({"text": [b"w1\nw2", None]}), tmp_path / "bytes.parquet")
    assert texts(tmp_path / "bytes.parquet") == ["w1\nw2"]
    parquet.write_table(pa.table({"text": [[{"role": "user"}]]}), tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match=r"lists\.parquet: the text is a list, expected a string"):
        texts(tmp_path / "lists.parquet")
    (tmp_path / "n.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"n\.jsonl line 1: the text is a int"):
        texts(tmp_path / "n.jsonl")


def test_copies_that_differ_in_blanks_are_one_document(tmp_path) -> None:
    lines = [f"w{i} w{j}" for i in range(20) for j in range(20)]
    rows = [{"text": f"{line}{end}"} for end in ("\n", "\r\n ") for line in lines]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {split: [doc.text.split() for doc in documents(str(tmp_path), split=split)] for split in SPLITS}
    assert sum(map(len, found.values())) == len(lines)
    assert len(found["evaluation"]) > 5


def test_half_a_pair_of_surrogates_is_packed(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "w1 \\ud83d w2"}\n')
    docs = [doc for split in SPLITS for doc in documents(str(tmp_path), split=split)]
    ((tokens, _),) = pack(docs, tiny_tokenizer(), 6)
    assert tiny_tokenizer().convert_ids_to_tokens(tokens) == ["<bos>", "w1", "<unk>", "w2", "\n", "\n"]


def test_hub_data_is_streamed(monkeypatch) -> None:
    asked = []

    def load_dataset(name, subset, split, streaming):
        asked.append((name, subset, split, streaming))
        return ({"text": text} for text in [None, *TEXTS])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = [doc for split in SPLITS for doc in documents("hf:org/data[train]", split=split)]
    assert asked == [("org/data", None, "train", True)] * 3
    assert sorted(doc.text for doc in found) == sorted(TEXTS)
    assert {doc.source for doc in found} == {"org/data"}
    assert len(list(documents("hf:org/data:en[train]", split="train"))) > 0
    assert asked[3] == ("org/data", "en", "train", True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **b: [{"text": 3}]))
    with pytest.raises(ValueError, match=r"hf:org/data\[train\] row 0: the text is a int, expected a string"):
        list(documents("hf:org/data[train]", split="train"))


def test_text_fingerprint_follows_the_files(tmp_path) -> None:
    path = write(tmp_path / "t.jsonl", TEXTS)
    before = text_fingerprint(str(path))
    assert text_fingerprint(str(path)) == before
    write(path, TEXTS[:-1])
    assert text_fingerprint(str(path)) != before


def test_evaluation_contexts(tmp_path) -> None:
    path = write(tmp_path / "t.jsonl", [f"w{i % 58} w{j}" for i in range(58) for j in range(58)])
    contexts = evaluation_contexts(tiny_tokenizer(), str(path), n_tokens=100, context_length=16)
    expected = list(pack(documents(str(path), split="evaluation"), tiny_tokenizer(), 16))[:7]  # 7 * 16 >= 100
    assert contexts.tokens.tolist() == [context.tokens.tolist() for context in expected]
    assert contexts.documents.tolist() == [context.document_ids.tolist() for context in expected]
    assert contexts.sources == ["t.jsonl"]
    write(tmp_path / "u.jsonl", [f"w{i} w{j} w1" for i in range(20) for j in range(20)])
    assert evaluation_contexts(tiny_tokenizer(), str(tmp_path), n_tokens=100, context_length=16).sources == ["t.jsonl"]
    both = evaluation_contexts(tiny_tokenizer(), str(tmp_path), n_tokens=2000, context_length=16)
    assert both.sources == ["t.jsonl", "u.jsonl"]
    with pytest.raises(ValueError, match=r"less than one context of 5000 tokens"):
        evaluation_contexts(tiny_tokenizer(), str(path), n_tokens=100, context_length=5000)


def test_shared_documents_are_found(tmp_path) -> None:
    texts = [f"document {i} tells of nothing that another one tells of, {i} times" for i in range(400)]
    for name, more in (("apart", []), ("shared", ["a sentence that many of them have in common here."])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": " ".join([text + ".", *more])}) + "\n" for text in texts)
        )
    apart, shared = str(tmp_path / "apart.jsonl"), str(tmp_path / "shared.jsonl")
    assert shared_documents(apart) == 0
    assert shared_documents(shared) == len(list(documents(shared, split="evaluation"))) > 5


@pytest.mark.slow
def test_probing_texts_are_never_trained_on() -> None:
    from sae_probes.utils_data import get_numbered_binary_tags, read_numbered_dataset_df  # the benchmark's own list

    tags = get_numbered_binary_tags()
    assert len(tags) == 113
    by_split = {split: list(sae_probes_documents(split)) for split in SPLITS}
    train = by_split["train"]
    sources = {split: Counter(doc.source for doc in docs) for split, docs in by_split.items()}
    assert not set(sources["train"]) & set(tags)
    assert not set(sources["train"]) & set(sources["evaluation"])
    assert set(sources["validation"]) == set(sources["evaluation"])
    texts = {split: {doc.text for doc in docs} for split, docs in by_split.items()}
    assert not texts["validation"] & texts["evaluation"]
    assert not texts["train"] & (texts["validation"] | texts["evaluation"])
    parts = texts["train"] | {line.strip() for doc in train for line in doc.text.split("\n")}
    for tag in tags:
        for prompt in filter(str.strip, read_numbered_dataset_df(tag)["prompt"].dropna().astype(str)):
            assert prompt.strip() not in parts, f"{tag}: {prompt}"
    assert sum(len(doc.text) for doc in train) > 6_000_000  # 4.3 characters a token: 1.4 M tokens of Gemma's
    assert train == list(sae_probes_documents("train"))


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.csv.zst", "t.parquet"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00damaged")
    with pytest.raises(ValueError, match=name):
        list(documents(str(tmp_path / name)))
