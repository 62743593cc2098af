"""Readers of the published file layouts: IDX (MNIST) and whitespace tables (UCI), plain or gzip."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kronlaplace.demo.errors import CorruptDataError, MissingDataError

__all__ = ["read_bytes", "read_idx", "read_table", "read_index"]

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UNSIGNED_BYTE = 0x08


def read_bytes(path: Path, source: str) -> bytes:
    """Content of `path`, or of `path` with `.gz` appended, unpacked if it is gzip.

    Whether a file is packed is seen from its first bytes, because browsers unpack `.gz` files without renaming them.

    Args:
        path: Path without `.gz`.
        source: Where to get the file, for the error message.

    Raises:
        MissingDataError: Neither file exists.
        CorruptDataError: The gzip stream is broken off or damaged, or the file cannot be read.
    """
    packed = path.with_name(path.name + ".gz")
    found = next((candidate for candidate in (path, packed) if candidate.is_file()), None)
    if found is None:
        raise MissingDataError(f"no file {path} (nor {packed.name} next to it); get it from {source}.")
    try:
        content = found.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptDataError(
            f"{found} is a truncated or damaged gzip file ({error}); get it again from {source}."
        ) from error
    except OSError as error:
        raise MissingDataError(f"cannot read {found}: {error.strerror or error}.") from error


def read_idx(path: Path, n_dims: int, source: str) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    The layout: two zero bytes, the type code `0x08`, the number of dimensions, one big-endian 32-bit size per
    dimension, then the bytes in row-major order.

    Args:
        path: Path without `.gz`.
        n_dims: Number of dimensions that the file must have: 3 for images, 1 for labels.
        source: Where to get the file, for the error message.

    Raises:
        MissingDataError: The file is not there.
        CorruptDataError: The header is another one, or the number of bytes is not what the header says.
    """
    content = read_bytes(path, source)
    header = 4 + 4 * n_dims
    expected = bytes([0, 0, _IDX_UNSIGNED_BYTE, n_dims])
    if len(content) < header or content[:4] != expected:
        raise CorruptDataError(
            f"{path} is not an IDX file of unsigned bytes with {n_dims} dimension(s): expected a header of {header} "
            f"bytes that begins with {expected.hex(' ')}, got {len(content)} bytes that begin with "
            f"'{content[:4].hex(' ')}'; get it again from {source}."
        )
    shape = struct.unpack(f">{n_dims}I", content[4:header])
    n_bytes = int(np.prod(shape, dtype=object))
    if len(content) - header != n_bytes:
        what = "truncated" if len(content) - header < n_bytes else "too long"
        raise CorruptDataError(
            f"{path} is {what}: its header announces {' x '.join(map(str, shape))} = {n_bytes} bytes of data, "
            f"it holds {len(content) - header}; get it again from {source}."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def read_table(path: Path, source: str) -> npt.NDArray[np.float64]:
    """Read a table of numbers separated by white space, `(rows, columns)`.

    Raises:
        MissingDataError: The file is not there.
        CorruptDataError: It is empty, a row has another length than the first, or an entry is not a finite number.
    """
    lines = read_bytes(path, source).decode("utf-8", errors="replace").splitlines()
    rows = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise CorruptDataError(f"{path} is empty; get it again from {source}.")
    width = len(rows[0][1])
    for number, row in rows:
        if len(row) != width:
            raise CorruptDataError(
                f"{path}, line {number}: expected {width} columns as in the first row, got {len(row)}; "
                f"get it again from {source}."
            )
    try:
        table = np.array([row for _, row in rows], dtype=np.float64)
    except ValueError as error:
        raise CorruptDataError(f"{path} is not a table of numbers ({error}); get it from {source}.") from error
    if not np.isfinite(table).all():
        line = rows[int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])][0]
        raise CorruptDataError(f"{path}, line {line}: an entry is NaN or infinite; get it from {source}.")
    return table


def read_index(path: Path, upper: int, source: str) -> npt.NDArray[np.int64]:
    """Zero-based indices, one a line, each below `upper`, `(n,)`.

    Raises:
        MissingDataError: The file is not there.
        CorruptDataError: An entry is not a whole number from 0 to `upper - 1`.
    """
    values = read_table(path, source).ravel()
    wrong = (values < 0) | (values >= upper) | (values != np.floor(values))
    if wrong.any():
        raise CorruptDataError(
            f"{path} holds {values[wrong][0]:g}, expected whole numbers from 0 to {upper - 1}; "
            f"get it again from {source}."
        )
    return values.astype(np.int64)
