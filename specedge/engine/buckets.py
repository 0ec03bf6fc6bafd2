"""Buckets: the few shapes in which passes are captured on a GPU, and how a batch is laid out in one of them.

A captured pass has fixed shapes and fixed addresses, so a batch is padded to the least bucket that holds it and packed into one buffer, which
moves to the device in one copy. Padding is a dummy: its rows write K/V to a row of the row buffer, and its tables name a page, that no sequence
owns; its segments hold no rows; nobody asks for its tokens. Pure arithmetic in numpy: knows nothing of devices, models or sequences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from specedge.config import MAX_ROWS_PER_TREE, EngineConfig, ModelConfig

WORDS = MAX_ROWS_PER_TREE // 64
EDITS, PATHS, STOPS = 2048, 8192, 4096  # room for what few requests ask for; a step that needs more runs uncaptured
ALIGN = 16  # bytes
SHORT = 2048  # tokens of the smallest table


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Room for `rows` rows in `segments` segments with tables of `pages` pages, `wanted` of them with logits."""

    rows: int
    segments: int
    wanted: int
    pages: int


class Field(NamedTuple):
    """One array of a bucket: its place in the buffer, and the value of padding."""

    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    pad: float


def buckets(max_rows: int, max_segments: int, least: int, table: int, page_size: int) -> list[Bucket]:
    """Largest first: rows `least`, doubled up to `max_rows`; 1, 4, 16 .. segments; logits of all rows or of `least`, as for prompt chunks; tables
    of 2 K tokens, 32 K .. up to `table` pages.

    A target begins with 64 rows: below a GPU's balance (about 190 rows) time hardly depends on rows, and all steps of up to 64 run the same
    products. Attention is launched for as many splits as a table has room for: 8 for 2 K tokens, 32 from 8 K on. A program that finds nothing to do
    takes about a microsecond of half a multiprocessor, and 16 sequences would have 4,900 of them for each layer.
    """
    rows, segments = _steps(min(least, max_rows), max_rows, 2), _steps(1, max_segments, 4)
    tables = _steps(min(table, SHORT // page_size), table, 16)
    found = {Bucket(r, min(s, r), w, t) for r in rows for s in segments for w in (r, min(least, r)) for t in tables}
    return sorted(found, reverse=True)


def _steps(first: int, last: int, factor: int) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(min(last, found[-1] * factor))
    return found


def least_bucket(among: list[Bucket], shape: Bucket) -> Bucket | None:
    """The smallest bucket that holds a batch of this shape; None: none does."""
    large = (b for b in among if b.rows >= shape.rows and b.segments >= shape.segments and b.wanted >= shape.wanted and b.pages >= shape.pages)
    return min(large, default=None)


def layout(b: Bucket, slots: int, page: int) -> dict[str, Field]:
    """Where the arrays of a StepBatch, a Draw and a verification lie; `slots` rows of row buffer, the last of them the dummy's, as is `page`."""
    i32, i64, f32, f64 = np.int32, np.int64, np.float32, np.float64
    kinds: dict[str, tuple[type[np.generic], tuple[int, ...], float]] = {
        "tokens": (i64, (b.rows,), 0), "positions": (i32, (b.rows,), 0), "slots": (i32, (b.rows,), slots - 1),
        "segments": (i32, (b.segments, 6), 0), "page_table": (i32, (b.segments, b.pages), page), "k_pos": (i32, (slots,), 0),
        "anc": (i64, (b.rows, WORDS), 0), "wanted": (i64, (b.wanted,), 0),
        "rows": (i32, (b.wanted, 4), 0), "penalties": (f32, (b.wanted, 3), 1), "edits": (i32, (EDITS, 3), 0), "bias": (f32, (EDITS,), 0),
        "paths": (i32, (PATHS,), 0), "inv_temperature": (f32, (b.wanted,), 1), "log_min_p": (f32, (b.wanted,), -np.inf),
        "top_k": (i32, (b.wanted,), 0), "top_p": (f64, (b.wanted,), 1), "noise_row": (i32, (b.wanted,), -2), "fills": (i64, (b.wanted, 3), -1),
        "verify": (i32, (b.segments, 5), -1), "stops": (i32, (STOPS,), -1),
    }  # fmt: skip
    fields, offset = {}, 0
    for name, (kind, shape, pad) in kinds.items():
        dtype = np.dtype(kind)
        fields[name] = Field(offset, dtype, shape, pad)
        offset += -(-int(np.prod(shape)) * dtype.itemsize // ALIGN) * ALIGN
    return fields


def size(fields: Mapping[str, Field]) -> int:
    """Bytes of a buffer."""
    return max(f.offset + -(-int(np.prod(f.shape)) * f.dtype.itemsize // ALIGN) * ALIGN for f in fields.values())


def fits(fields: Mapping[str, Field], arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether every array has room."""
    return all(have <= room for name, a in arrays.items() for have, room in zip(a.shape, fields[name].shape, strict=True))


def pack(buffer: np.ndarray, fields: Mapping[str, Field], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `arrays` to `buffer` (bytes), each in the corner of its field, and padding beside them."""
    for name, f in fields.items():
        view = buffer[f.offset :][: int(np.prod(f.shape)) * f.dtype.itemsize].view(f.dtype).reshape(f.shape)
        view[...] = f.pad
        if name in arrays:
            view[tuple(slice(n) for n in arrays[name].shape)] = arrays[name]


def workspace(c: ModelConfig, max_rows: int, itemsize: int) -> int:
    """Bytes that the largest pass takes beside weights and pages, generously: logits in two dtypes and a copy, noise, the activations of a layer
    several times over, partial sums of attention, the row buffer, and 1 GiB for libraries and captured graphs."""
    logits = max_rows * c.vocab * (itemsize + 3 * 4)
    activations = 4 * max_rows * (4 * c.hidden + 3 * c.ffn + (c.heads + 2 * c.kv_heads) * c.head_dim) * itemsize
    partials = 32 * max_rows * c.heads * (c.head_dim + 1) * 4
    return logits + activations + partials + max_rows * c.kv_bytes_per_token(itemsize) + (1 << 30)


def kv_tokens_that_fit(c: ModelConfig, sizes: EngineConfig, itemsize: int, free: int, total: int) -> int:
    """Tokens whose K/V fit a GPU of `total` bytes, `free` of them, if `sizes.gpu_share` of it may be used; whole pages, 0 if none."""
    left = int(sizes.gpu_share * total) - (total - free) - workspace(c, sizes.max_rows, itemsize)
    return max(0, left // c.kv_bytes_per_token(itemsize) // sizes.page_size * sizes.page_size)
