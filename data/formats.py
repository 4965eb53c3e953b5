"""Text files of any kind as UTF-8: decompressed and decoded. Other formats are named.

Compression and formats are recognized by the first bytes of a file, tables and JSON by the end of
its name.
"""

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import UserError

BLOCK_BYTES = 1 << 20  # read at a time
SNIFF_BYTES = 1 << 13  # a zero byte in the first ones means a binary file, as in git
COMPRESSIONS = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz")
BROKEN = (EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged one raises; or OSError
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = b"PAR1"  # the first bytes
PARQUET_ROWS = 256  # read at a time
EXPANSION = {".parquet": 2.0} | dict.fromkeys(COMPRESSED_ENDINGS, 3.0)  # of English, to plan with
BOMS = {  # byte-order marks; that of UTF-32 starts with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HTML = re.compile(  # a comment ends at its first -->, so that there is only one way to match
    rb"(\s|<!--((?!-->).)*-->|<\?xml((?!\?>).)*\?>)*<(!doctype html|html)",
    re.DOTALL | re.IGNORECASE,
)
TABLE = (
    'python -c "import csv, json; [print(json.dumps(row)) for row in '
    "csv.DictReader(open('{path}', newline=''){delimiter})]\" > {stem}.jsonl, then use --field; or "
    "rename it to .txt to train on it as it is"
)
FORMATS = [  # first bytes, endings, name, what to do
    (b"PK\3\4", (".docx",), "a Word document", "pandoc {path} -t plain -o {stem}.txt"),
    (b"PK\3\4", (".odt", ".epub"), "a document", "pandoc {path} -t plain -o {stem}.txt"),
    (b"PK\3\4", (".xlsx",), "a spreadsheet", "export it as CSV"),
    (b"PK\3\4", (), "a zip archive", "unzip {path} -d {stem}, then use --input={stem}"),
    (b"%PDF", (), "a PDF", "pdftotext {path} {stem}.txt"),
    (b"{\\rtf", (), "an RTF document", "pandoc {path} -t plain -o {stem}.txt"),
    (b"\x28\xb5\x2f\xfd", (), "compressed by zstd", "zstd -d {path}"),
    (b"7z\xbc\xaf", (), "a 7z archive", "7z x {path}"),
    (b"Rar!", (), "a rar archive", "unrar x {path}"),
    (b"\xd0\xcf\x11\xe0", (), "an old Office document", "libreoffice --convert-to txt {path}"),
    (None, (".csv",), "a table", TABLE.replace("{delimiter}", "")),
    (None, (".tsv",), "a table", TABLE.replace("{delimiter}", ", delimiter='\\t'")),
]  # fmt: skip
ONE_JSON = (
    "python -c \"import json; [print(json.dumps(r)) for r in json.load(open('{path}'))]\" "
    "> {stem}.jsonl, if it is a list"
)


def other_format(path: Path, head: bytes) -> str:
    """What a file is instead of a text, and what to do with it; empty if it may be a text."""
    ending = Path(_plain_name(path)).suffix
    found = None
    for start, endings, name, advice in FORMATS:
        matches = start is None or head.startswith(start)
        if matches and (ending in endings if endings else start is not None):
            found = name, advice
            break
    if head[257:262] == b"ustar":
        found = "a tar archive", "tar xf {path}, then use --input with its folder"
    elif HTML.match(head.removeprefix(codecs.BOM_UTF8)):
        found = "a web page (HTML)", "pandoc {path} -t plain -o {stem}.txt"
    elif ending == ".json" and not is_json_lines(path, head):
        found = "one JSON document, not a record per line", ONE_JSON
    if found is None:
        return ""
    name, advice = found
    stem = path.name.split(".")[0] or "text"
    return f"{name}: {advice.replace('{path}', str(path)).replace('{stem}', stem)}"


def is_json_lines(path: Path, head: bytes) -> bool:
    """Whether a file has a JSON record per line, by its ending; .json if its first line is one."""
    name = _plain_name(path)
    if name.endswith(".json"):
        try:
            first = head.lstrip(codecs.BOM_UTF8).lstrip().split(b"\n")[0]
            return type(json.loads(first)) is dict
        except (ValueError, RecursionError):
            return len(head) >= SNIFF_BYTES and b"\n" not in head and head.startswith(b"{")
    return name.endswith(JSON_LINES)


def text_bytes(path: Path, size: int) -> float:
    """About how much text a file of `size` bytes has, judged by its name."""
    return size * EXPANSION.get(path.suffix.lower(), 1.0)


def _plain_name(path: Path) -> str:
    """A file's name in lower case, without the ending of its compression."""
    name = path.name.lower()
    return name.removesuffix(next(filter(name.endswith, COMPRESSED_ENDINGS), ""))


def is_binary(head: bytes, encoding: str) -> bool:
    """Whether a file has zero bytes which neither its encoding nor a byte-order mark explains."""
    if encoding:
        return "\0" in head.decode(encoding, "ignore")
    return b"\0" in head and not head.startswith(tuple(BOMS))


def is_stored_as_utf8(path: Path, encoding: str) -> bool:
    """Whether a text file is neither compressed nor in another encoding."""
    with open(path, "rb") as file:
        head = file.read(8)
    return codecs.lookup(encoding or "utf-8").name == "utf-8" and not head.startswith(
        (*COMPRESSIONS, *BOMS)
    )


def decompressed(file: BinaryIO, path: Path, name: str) -> BinaryIO:
    """Wrap an open file so that reading it decompresses it. Error messages call it `name`."""
    head = file.read(8)
    file.seek(0)
    for magic, module in COMPRESSIONS.items():
        if head.startswith(magic):
            return module.open(file, "rb")
    if path.suffix.lower() in COMPRESSED_ENDINGS:
        raise UserError(f"{name} is a broken {path.suffix} file: it does not start like one")
    return file


def read_head(path: Path, name: str) -> bytes:
    """The first SNIFF_BYTES of a file, decompressed."""
    try:
        with open(path, "rb") as file:
            return decompressed(file, path, name).read(SNIFF_BYTES)
    except (*BROKEN, OSError) as error:
        raise broken_file(name, error) from None


def utf8_blocks(
    path: Path, name: str, encoding: str, errors: str, counts: Counter
) -> Iterator[tuple[bytes, int]]:
    """Yield a file as UTF-8, in blocks that end between characters, each with how many bytes of the
    file have been read. Messages call it `name`.

    Without `encoding` the file's byte-order mark decides, and it is UTF-8 if it has none. Marks at
    the start of the file or of a line are dropped. Raises UserError for bytes that cannot be
    decoded and for zero bytes, with their offset; with errors="replace" they become U+FFFD, and
    `counts` says how many.
    """

    def replace(error: UnicodeError) -> tuple[str, int]:
        counts["bytes replaced"] += error.end - error.start
        return "\ufffd", error.end

    codecs.register_error("folio.replace", replace)
    try:
        with open(path, "rb") as raw:
            file = decompressed(raw, path, name)
            block, offset, at_line_start = file.read(BLOCK_BYTES), 0, False
            found = next((code for bom, code in BOMS.items() if block.startswith(bom)), "utf-8")
            handler = "folio.replace" if errors == "replace" else "strict"
            decoder = codecs.getincrementaldecoder(encoding or found)(handler)
            while block:
                following = file.read(BLOCK_BYTES)
                text = _decode(decoder, block, not following, name, offset)
                if at_line_start:  # as in the middle of a block
                    text = f"\n{text}"
                if offset == 0:
                    text = text.removeprefix("\ufeff")
                if n_marks := text.count("\n\ufeff"):  # of files that were put together
                    counts["byte-order marks inside the text, dropped"] += n_marks
                    text = text.replace("\n\ufeff", "\n")
                text, at_line_start = text[at_line_start:], text.endswith("\n")
                if n_zeros := text.count("\0"):
                    if errors != "replace":
                        what = f"zero byte at offset {offset + block.find(0):,}"
                        if block.count(0) > n_zeros:  # UTF-16: letters have zero bytes too
                            what = "zero character (U+0000)"
                        raise UserError(
                            f"{name} has a {what}: it is damaged, or not text; --errors=replace "
                            "reads it anyway"
                        )
                    counts["bytes replaced"] += n_zeros
                    text = text.replace("\0", "\ufffd")
                yield text.encode(), raw.tell()
                offset += len(block)
                block = following
    except (*BROKEN, OSError) as error:
        raise broken_file(name, error) from None


def _decode(
    decoder: codecs.IncrementalDecoder, block: bytes, final: bool, name: str, offset: int
) -> str:
    """Decode the block at `offset`; raises UserError where that is impossible."""
    n_pending = len(decoder.getstate()[0])  # bytes of the block before
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UserError(
            f"{name} is not {error.encoding.upper()}: byte 0x{bad:02x} at offset "
            f"{offset - n_pending + error.start:,}; name its encoding, as in "
            "--encoding=latin-1, or use --errors=replace"
        ) from None
    except UnicodeError as error:  # utf-16 or utf-32 without a byte-order mark
        raise UserError(
            f"{name}: {error}; name its byte order, as in --encoding=utf-16-le"
        ) from None


def parquet_rows(path: Path, name: str, field: str) -> Iterator[tuple[Any, float]]:
    """Yield the rows of a Parquet file, with the field or its first part, as RecordBatches of
    pyarrow, each with how many bytes of the file have been read, about. Messages call it `name`.
    Needs pyarrow; raises UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{name} is a Parquet file, which needs the package pyarrow: pip install pyarrow"
        ) from None
    size, n_read = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
            names = file.schema_arrow.names
            column = field if field in names else field.split(".")[0]
            columns = [column] if column in names else names  # all, for the message
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                for i in range(batch.num_rows):
                    n_read += 1
                    yield batch.slice(i, 1), size * n_read / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise broken_file(name, error) from None
        raise UserError(f"{name} is damaged, or not a Parquet file: {error}") from None


def broken_file(name: str, error: Exception) -> Exception:
    """What to raise for an error of reading a file: UserError, unless the disk failed."""
    if getattr(error, "errno", None) is not None:
        error.filename = error.filename or name
        return error
    return UserError(f"{name} is damaged, or not compressed as its first bytes say: {error}")
