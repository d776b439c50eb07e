"""Read text and rows from files and from `datasets`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from qsim_cache.made_once import made_once
from qsim_transformers.hub import offline_unless_reachable
from qsim_transformers.tokens import check_ids
from torch import Tensor

from qsim_core import Data, DataError, LoadedModel, files
from qsim_core.evaluation.data import check_source
from qsim_evaluators.fitting import device, longest

ROWS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Endings of files of rows, and the names that `datasets` has for their formats."""
ARCHIVES = (
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"7z\xbc\xaf",
    b"Rar!",
)
"""The first bytes of files that `datasets` would unpack: gzip, zip, bzip2, xz, zstd, lz4, 7z and rar."""
LARGEST = 2**30
"""Bytes of the longest text that is unpacked."""
LONGEST = 512
"""Tokens that a model of texts takes at most, if its configuration has no maximum."""


def read_text(source: str, measure: str, split: str) -> Data:
    """Read text from a file, or from the column `text` of a file of rows or of `datasets`: `NAME[:CONFIG[:SPLIT]]`.

    Rows are joined by blank lines, as in GPTQ's evaluation.
    """
    path = files.place(source)
    whole = path.is_file() and path.suffix not in ROWS
    text = read_file(path) if whole else "\n\n".join(map(str, read_rows(source, ["text"], split)["text"]))
    if not text.strip():
        raise DataError(f"{source} is empty: there is no text to measure {measure} on")
    return Data.of_text(source, text)


def read_rows(source: str, columns: list[str], split: str) -> Any:
    """Read a data set with these columns from a file of rows, `NAME[:CONFIG[:SPLIT]]` or a directory of data files.

    If the source does not name a split, `split` is read.
    """
    path = files.place(source)
    if path.is_file() and path.suffix not in ROWS:
        raise DataError(f"{source} is not a file of rows; their names end in {', '.join(ROWS)}")
    check_source(source)
    if path.is_file():
        _check_no_archive(path)
    from datasets import load_dataset

    name, config, named, *_ = (*source.split(":"), None, None, None)
    try:
        if path.is_file():
            rows = load_dataset(ROWS[path.suffix], data_files=str(path), split="train")
        else:
            with offline_unless_reachable(name):
                rows = load_dataset(name, config or None, split=named or split)
    except Exception as error:  # its loaders raise errors of any class
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        cannot = "datasets cannot load"
        what = f"{cannot} {source}" if path.is_file() else f"{source!r} is not a file, and {cannot} it"
        raise DataError(f"{what}: {reason}") from None
    for column in columns:
        if column not in rows.column_names:
            raise DataError(f"{source!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return rows


def tokenized(loaded: LoadedModel, texts: list[str], length: int, padded: bool = False) -> dict[str, Any]:
    """Convert texts to the model's inputs, cut off after `length` tokens.

    Texts are padded to the longest one, or to `length` if `padded` is true. Raises `DataError`.
    """
    if length > longest(loaded, LONGEST):
        raise DataError(f"the model takes {longest(loaded, LONGEST)} tokens at most, not {length}")
    padding = "max_length" if padded else len(texts) > 1
    if padding and loaded.tokenizer.pad_token_id is None:
        hint = "which training needs" if padded else "so that a batch holds one text; give --batch-size 1"
        raise DataError(f"the tokenizer has no padding token, {hint}")
    options = {"truncation": True, "max_length": length, "return_tensors": "pt", **on_the_right(loaded)}
    inputs = loaded.tokenizer(texts, padding=padding, **options)
    check_ids(loaded.model, inputs["input_ids"])
    check_padding(loaded, inputs)
    return {key: value.to(device(loaded)) for key, value in inputs.items()}


def on_the_right(loaded: LoadedModel) -> dict[str, str]:
    """Return the option with which a tokenizer that pads on the left pads on the right, or none.

    Padding before a text moves it to other positions, which a model with learned positions does not undo. The padding
    stays where the configuration says that the model reads the last token of a row (XLNet).
    """
    config: Any = getattr(loaded.model, "config", None)
    left = config is not None and getattr(loaded.tokenizer, "padding_side", None) == "left"
    return {"padding_side": "right"} if left and getattr(config, "summary_type", None) != "last" else {}


def check_padding(loaded: LoadedModel, inputs: Mapping[str, Tensor]) -> None:
    """Raise `DataError` for inputs that are padded with another token than the model's configuration names.

    Models find the last token of a text, or the places of its tokens, by that token.
    """
    own, mask = loaded.tokenizer.pad_token_id, inputs.get("attention_mask")
    config: Any = getattr(loaded.model, "config", None)
    known = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "pad_token_id", None)
    if known not in (None, own) and mask is not None and not bool(mask.all()):
        raise DataError(
            f"the tokenizer pads with token {own}, and the model's configuration names token {known}; correct "
            f"pad_token_id in its config.json, or give --batch-size 1"
        )


def tokens_of(loaded: LoadedModel, text: str, **options: Any) -> Tensor:
    """Tokenize the whole text in one piece. Raises `DataError` for a token that the model does not have."""
    return check_ids(
        loaded.model, torch.tensor(loaded.tokenizer(text, verbose=False, **options).input_ids, dtype=torch.long)
    )


def split_opening(loaded: LoadedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Split tokens into the special ones that the tokenizer puts before a text, and the text."""
    tokenizer = loaded.tokenizer
    special = {getattr(tokenizer, "bos_token_id", None), *getattr(tokenizer, "all_special_ids", [])}
    special -= {getattr(tokenizer, "unk_token_id", None)}
    many = next((place for place, token in enumerate(tokens.tolist()) if token not in special), len(tokens))
    return tokens[:many], tokens[many:]


def opened(opening: Tensor, windows: Tensor) -> Tensor:
    """Put the opening tokens before each window `[windows, tokens]`."""
    return torch.cat([opening.expand(len(windows), -1), windows], 1)


KEPT: dict[tuple[str, type, str, bool, str], Tensor] = {}
"""The tokens of the last four texts. A training measures on one, calibrates with one and learns one."""
LONG = 2**18
"""Characters of the shortest text whose tokens are kept for later runs."""


def tokens_of_corpus(loaded: LoadedModel, text: str, **options: Any) -> Tensor:
    """Tokenize a long text once, however often evaluations need its tokens.

    Tokens are kept under the text and the tokenizer's whole state. A changed tokenizer is asked again, and a tokenizer
    that is loaded again is not.
    """
    tokenizer = loaded.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokens_of(loaded, text, **options)
    key = (text, type(tokenizer), backend.to_str(), tokenizer.split_special_tokens, repr(options))
    kept = KEPT.pop(key, None)
    if kept is None:
        kept = _tokens_of_any_run(key, lambda: tokens_of(loaded, text, **options).int())
    KEPT[key] = kept  # the latest is the last
    while len(KEPT) > 4:
        del KEPT[next(iter(KEPT))]
    return check_ids(loaded.model, kept.long())


def _tokens_of_any_run(key: tuple[str, type, str, bool, str], tokenize: Callable[[], Tensor]) -> Tensor:
    """Read the tokens of a long text from the user's cache, or tokenize it.

    Tokens of a tokenizer with code of its own are not kept, because its code is not in the key.
    """
    text, kind, *state = key
    if len(text) < LONG or not kind.__module__.startswith("transformers."):
        return tokenize()
    versions = [version(library) for library in ("tokenizers", "transformers")]
    made_from = repr((text, kind.__module__, kind.__qualname__, state, versions)).encode()
    tokens: Tensor = made_once("tokens", "tokens of a text", made_from, tokenize)
    return tokens


def draw_windows(tokens: Tensor, samples: int, length: int, seed: int, name: str) -> list[Tensor]:
    """Draw windows `[1, length]` at random places, as GPTQ does. Raises `DataError` if the text is too short."""
    if len(tokens) < length:
        raise DataError(f"{name} has {len(tokens)} tokens, fewer than one calibration window of {length}")
    starts = torch.randint(len(tokens) - length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    return [tokens[start : start + length].unsqueeze(0) for start in starts.tolist()]


def cut_windows(tokens: Tensor, length: int, name: str) -> Tensor:
    """Cut into windows `[many, length]`, without the remainder. Raises `DataError` if the text is too short."""
    if len(tokens) < length:
        raise DataError(f"{name} has {len(tokens)} tokens, fewer than one training window of {length}; lower --seqlen")
    return tokens[: len(tokens) // length * length].view(-1, length)


def read_file(path: Path) -> str:
    """Read the text of a file. Raises `DataError`."""
    return files.read_text(path, DataError)


def _check_no_archive(path: Path) -> None:
    """Raise `DataError` for an archive: its size is not known until it is unpacked."""
    with path.open("rb") as file:
        if file.read(8).startswith(ARCHIVES):
            raise DataError(f"{path} is an archive; unpack it, and name the file of rows")


def holds_lines(path: Path) -> bool:
    """Tell if the path is a file that can hold JSON: any ending but those of other kinds of rows."""
    return path.is_file() and ROWS.get(path.suffix, "json") == "json"


def read_lines(path: Path) -> list[Any]:
    """Read the JSON of each line that is not blank, also from a `.gz` file. Raises `DataError`."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise DataError(f"{path} unpacks to more than {LARGEST >> 20} MiB; unpack it yourself if it should")
        else:
            data = path.read_bytes()
        text = data.decode()
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read {path} as JSON lines: {getattr(error, 'strerror', None) or error}") from None
