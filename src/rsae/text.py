"""Text in, contexts of tokens out: readers of text specs, their splits, and the packing of documents into contexts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "evaluation"]

PACKING_RULE = (
    "documents are tokenised without special tokens, each followed by two newlines, and joined; every context is the "
    "tokenizer's BOS (if it has one, and only at the start) and the next context_length - 1 tokens; a last, shorter "
    "context is dropped"
)


class Document(NamedTuple):
    """A text, and where it is from."""

    source: str
    text: str


class Context(NamedTuple):
    """One packed context: token ids and, for each, the number of its document in reading order (-1 for BOS)."""

    tokens: np.ndarray  # int64 (context_length,)
    document_ids: np.ndarray  # int64 (context_length,)


class Contexts(NamedTuple):
    """A set of contexts held in memory, for evaluation. `sources` names the texts' sources, sorted."""

    tokens: Int[Tensor, "N T"]
    documents: Int[Tensor, "N T"]
    sources: list[str]


def documents(spec: str, *, split: Split = "train") -> Iterator[Document]:
    """Stream the documents of one split of a text spec, in an order that is always the same, without duplicates.

    Args:
        spec: `package:sae-probes` (training text from its non-probing sets, validation and evaluation text from others,
            see `sae_probes_documents`); a file or a folder of .txt, .jsonl, .csv, .csv.zst, .parquet (tables: a column
            `text`, `prompt` or `content`); or `hf:dataset[split]` or `hf:dataset:config[split]`, streamed from the hub, column
            `text`.
        split: files, folders and hub data are divided by a hash of the text, 90% train, 5% validation, 5% evaluation; texts that
            differ in blanks and newlines alone are one.

    Raises:
        ValueError: unknown spec or split, unreadable file, no text column, missing package.
    """
    if split not in ("train", "validation", "evaluation"):
        raise ValueError(f'split must be "train", "validation" or "evaluation", not {split!r}')
    if spec == "package:sae-probes":
        yield from sae_probes_documents(split)
        return
    if not spec:
        raise ValueError("the text has no name: expected package:sae-probes, a file or folder, or hf:dataset[split]")
    if spec.startswith("package:"):
        raise ValueError(f"unknown packaged text {spec!r}: expected package:sae-probes")
    seen: set[bytes] = set()
    for document in _hub_documents(spec) if spec.startswith("hf:") else _file_documents(Path(spec)):
        digest = _digest(" ".join(document.text.split()))
        if digest not in seen and document.text.strip():
            seen.add(digest)
            bucket = int.from_bytes(digest[:4], "big") % 20
            if split == ("evaluation" if bucket == 19 else "validation" if bucket == 18 else "train"):
                yield document


def text_fingerprint(spec: str) -> str:
    """Names the content behind a spec, and how it is split: the package's version, or the files' names, sizes and times."""
    if spec == "package:sae-probes":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("sae-probes")
        except PackageNotFoundError:
            return "missing"
    if spec.startswith("hf:"):
        return f"hub, {_SPLIT_RULE}"
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _files(Path(spec))]
    return hashlib.sha256(json.dumps([_SPLIT_RULE, stats]).encode()).hexdigest()[:16]


_SPLIT_RULE = "by a hash of the words"
"""Changes whenever a text of a file, a folder or the hub may come into another split."""


def pack(
    docs: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    counts: Counter[str] | None = None,
) -> Iterator[Context]:
    """Pack a stream of documents into contexts of exactly `context_length` tokens, by `PACKING_RULE`.

    Control tokens (BOS, EOS, padding) that a text spells out are dropped, so that BOS stands nowhere else. `counts`,
    if given, is filled as documents are read: `documents`, and `source/NAME` for each source.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if context_length < len(bos) + 1:
        raise ValueError(f"context_length must be at least {len(bos) + 1}, not {context_length}")
    control: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    banned = np.array([i for i in control if i not in (None, tokenizer.unk_token_id)], dtype=np.int64)
    width = context_length - len(bos)
    start = np.array(bos, dtype=np.int64)
    tokens, owners, held, number = [], [], 0, 0
    stream = iter(docs)
    while batch := list(islice(stream, 256)):
        # Half of a pair of surrogates, which JSON may hold, is no character
        texts = [document.text.encode("utf-8", "replace").decode() + "\n\n" for document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):  # type: ignore[arg-type]
            row = np.asarray(ids, dtype=np.int64)
            row = row[~np.isin(row, banned)]
            tokens.append(row)
            owners.append(np.full(len(row), number, dtype=np.int64))
            held += len(row)
            number += 1
            if counts is not None:
                counts.update(("documents", f"source/{document.source}"))
        if held < width:
            continue
        joined, owner = np.concatenate(tokens), np.concatenate(owners)
        whole = held // width * width
        for at in range(0, whole, width):
            piece = slice(at, at + width)
            yield Context(np.concatenate([start, joined[piece]]), np.concatenate([np.full(len(bos), -1), owner[piece]]))
        tokens, owners, held = [joined[whole:]], [owner[whole:]], held - whole


def evaluation_contexts(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    n_tokens: int,
    split: Split = "evaluation",
    context_length: int = 256,
) -> Contexts:
    """Read contexts of `split` until they hold at least `n_tokens` tokens (or the text ends).

    Raises:
        ValueError: the split holds less than one context.
    """
    read: list[str] = []  # the source of each document, some of which will be in no context

    def noted() -> Iterator[Document]:
        for document in documents(text, split=split):
            read.append(document.source)
            yield document

    packed = pack(noted(), tokenizer, context_length)
    contexts = list(islice(packed, max(1, -(-n_tokens // context_length))))
    if not contexts:
        raise ValueError(too_short(text, split, context_length))
    owners = torch.from_numpy(np.stack([context.document_ids for context in contexts]))
    sources = sorted({read[number] for number in owners.unique().tolist() if number >= 0})
    return Contexts(torch.from_numpy(np.stack([context.tokens for context in contexts])), owners, sources)


def too_short(text: str, split: str, context_length: int) -> str:
    """The message for a text that does not fill one context."""
    return (
        f"the {split} split of {text!r} holds no text or less than one context of {context_length} tokens: give more text or a "
        "smaller context length (splits are by document, of which a .txt is one: 90% train, 5% validation, 5% evaluation)"
    )


def shared_documents(spec: str, split: Split = "evaluation") -> int:
    """How many documents of `split` share a line or a sentence with a training document: one that has 30 characters or more besides
    blanks and punctuation (case aside), which two texts do not have by chance."""
    held_out = [_long_keys(document.text) for document in documents(spec, split=split)]
    wanted = set().union(*held_out)
    found: set[str] = set()
    for document in documents(spec, split="train"):
        found |= _long_keys(document.text) & wanted
    return sum(not keys.isdisjoint(found) for keys in held_out)


# --- the packaged text ---

_TRAIN_SETS = ("45_context_ans", "55_open_qa", "93_glue_stsb", "99_sci_cat", "111_yelp_data")
"""Non-probing sets with sentences in them: passages with questions, elementary science, sentence pairs, science
forum, restaurant reviews. (112_amzn_rev repeats 111; others hold names, numbers, headlines or probing sets' rows.)"""

_HELD_OUT_SETS = ("49_cm_isshort", "94_ai_gen", "97_news_class", "100_news_fake", "101_disease_class")
"""Other sources, for validation and evaluation alone: stories, essays, short news, political news, medical abstracts."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+| \| ")
_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + string.whitespace + "\xa0‘’“”–—…"))


def sae_probes_documents(split: Split) -> Iterator[Document]:
    """Documents of the package sae-probes, by its 155 labelled sets, in the order of a hash of their text.

    train: five of the 42 sets that are not in its k-sparse probing benchmark; what has a line that is a text of the
    benchmark's 113 sets, or shares a sentence of 40 characters with one, is left out (blanks, case and punctuation aside).
    validation, evaluation: texts of 200 characters or more from five sets of other sources, each text in one of the two
    by its hash; labels are never read.
    """
    import pandas as pd

    spec = importlib.util.find_spec("sae_probes")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError('package:sae-probes is not installed; install it with: pip install "sae-probes>=0.4.2"')
    data = Path(spec.submodule_search_locations[0]) / "data"

    def texts(name: str) -> list[str]:
        table = pd.read_csv(data / "cleaned_data" / f"{name}.csv.zst", usecols=lambda column: column == "prompt")
        return [*table["prompt"].dropna().astype(str)]

    found: dict[bytes, Document] = {}
    if split == "train":
        master = pd.read_csv(data / "probing_datasets_MASTER.csv.zst")
        probing = master.loc[master["Data type"] == "Binary Classification", "Dataset save name"]
        units = {name: _units(name, texts(name)) for name in _TRAIN_SETS}
        ours = {key for groups in units.values() for group in groups for part in group for key in _keys(part)}
        probed: set[str] = set()
        for text in {text for name in probing for text in texts(Path(name).stem)}:
            probed.update(key for key in (_bare(text), *_sentences(text)) if key in ours)
        for name, groups in units.items():
            for head, *tails in groups:
                if probed.isdisjoint(_keys(head)):
                    kept = [tail for tail in tails if probed.isdisjoint(_keys(tail))]
                    text = "\n".join([head, *kept])
                    found.setdefault(_digest(text), Document(name, text))
    else:
        for name in _HELD_OUT_SETS:
            for text in texts(name):
                digest = _digest(text)
                if len(text) >= 200 and (digest[0] < 128) == (split == "validation"):
                    found.setdefault(digest, Document(name, text))
    for digest in sorted(found):
        yield found[digest]


def _units(name: str, texts: list[str]) -> list[list[str]]:
    """Texts as [head, *tails] whose parts may be left out one by one; a passage repeated for each of its questions
    becomes one head with the questions as tails."""
    if name != "45_context_ans":
        return [[text.replace("\\n", "\n")] for text in dict.fromkeys(texts)]  # Yelp's newlines came escaped
    passages: dict[str, dict[str, None]] = {}
    for text in texts:
        passage, question, answers = text.rsplit("\n", 2)
        passages.setdefault(passage, {})[f"{question}\n{answers}"] = None
    return [[passage, *questions] for passage, questions in passages.items()]


def _keys(text: str) -> set[str]:
    """What is looked up among the probing texts: the text, its lines, and its longer sentences."""
    return {_bare(text), *map(_bare, text.split("\n")), *_sentences(text)} - {""}


def _long_keys(text: str) -> set[str]:
    """The bare lines and sentences of a text that are long enough not to be in two by chance."""
    return {key for key in _keys(text) if len(key) >= 30}


def _sentences(text: str) -> Iterator[str]:
    """The bare sentences of 40 characters or more."""
    return (_bare(sentence) for sentence in _SENTENCE_END.split(text) if len(sentence) >= 40)


def _bare(text: str) -> str:
    """A text in lower case without blanks and punctuation, in which copies often differ."""
    return text.translate(_PUNCTUATION).lower()


# --- files and the hub ---

_SUFFIXES = (".txt", ".jsonl", ".csv", ".csv.zst", ".parquet")


def _files(path: Path) -> list[Path]:
    """The readable files at a path, sorted."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(_SUFFIXES))
        if not files:
            raise ValueError(f"folder {path} holds no text: expected files ending in {', '.join(_SUFFIXES)}")
        return files
    if not path.exists():
        raise ValueError(
            f"text {str(path)!r} not found: expected package:sae-probes, a file or folder, or hf:dataset[split]"
        )
    if not path.name.lower().endswith(_SUFFIXES):
        raise ValueError(f"cannot read {path}: expected a file ending in {', '.join(_SUFFIXES)}")
    return [path]


def _file_documents(path: Path) -> Iterator[Document]:
    from zstandard import ZstdError

    for file in _files(path):
        try:
            for text in _file_texts(file):
                yield Document(file.name, text)
        except (ValueError, ZstdError) as error:
            if type(error) is ValueError:  # our own, which names the file
                raise
            raise ValueError(f"cannot read {file} ({error}): is it whole, and what its name says?") from error


def _file_texts(file: Path) -> Iterator[str]:
    """Texts of one file; a .txt is one document, a table has one a row."""
    name = file.name.lower()
    if name.endswith(".txt"):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from None
        if "\0" in text:  # what UTF-16 may look like
            raise ValueError(f"{file} is not UTF-8 text (it holds NUL characters): save it as UTF-8")
        yield text
    elif name.endswith(".jsonl"):
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _texts([_json_row(line, file, number)], f"{file} line {number}")
    elif name.endswith(".parquet"):
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(file)
        column = _text_column(table.schema_arrow.names, file)
        for batch in table.iter_batches(1024, columns=[column]):
            yield from _texts(batch.column(0).to_pylist(), f"column {column} of {file}")
    else:
        import pandas as pd

        column = _text_column(pd.read_csv(file, nrows=0).columns.tolist(), file)
        # As it stands there: "null" is a text, 1 is not 1.0, and rows that end in a comma have no index
        how: dict[str, Any] = {"dtype": str, "keep_default_na": False, "index_col": False}
        for chunk in pd.read_csv(file, usecols=lambda name: name == column, chunksize=1024, **how):
            yield from chunk[column]


def _texts(values: Iterable[Any], where: str) -> Iterator[str]:
    """Texts as they are, or as the bytes of UTF-8; what is empty is left out.

    Raises:
        ValueError: something else, which has no one way to be read as text.
    """
    for value in values:
        if isinstance(value, bytes):
            yield value.decode("utf-8", "replace")
        elif isinstance(value, str):
            yield value
        elif value is not None:
            raise ValueError(f"{where}: the text is a {type(value).__name__}, expected a string")


def _json_row(line: str, file: Path, number: int) -> Any:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or "text" not in row:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f'{file} line {number}: expected an object with a string "text", got {keys}')
    return row["text"]


def _text_column(columns: list[str], file: Path) -> str:
    for name in ("text", "prompt", "content"):
        if name in columns:
            return name
    raise ValueError(f"{file} has no column text, prompt or content; its columns are {', '.join(map(str, columns))}")


def _hub_documents(spec: str) -> Iterator[Document]:
    """hf:name[split] or hf:name:config[split] -> its column `text`, streamed."""
    match = re.fullmatch(r"hf:([^\[\]:]+)(?::([^\[\]:]+))?\[([^\[\]]+)\]", spec)
    if match is None:
        raise ValueError(
            f"cannot read {spec!r}: expected hf:dataset[split] or hf:dataset:config[split], as in hf:NeelNanda/pile-10k[train] and "
            "hf:allenai/c4:en[train]"
        )
    name, subset, part = match.groups()
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{spec} needs the package datasets; install it with: pip install datasets") from None
    try:
        rows = load_dataset(name, subset, split=part, streaming=True)
    # A dataset that needs code of its own or a config, or has no such split; no network is an OSError
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot read {spec!r} from the hub: {error}") from error
    for number, row in enumerate(rows):
        if "text" not in row:
            raise ValueError(f"{spec} has no column text; its columns are {', '.join(row)}")
        for text in _texts([row["text"]], f"{spec} row {number}"):
            yield Document(name, text)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
