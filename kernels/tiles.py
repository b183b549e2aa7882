"""Tiles of the matrix products: a table of defaults by architecture, and files of measured ones.

    defaults (this file)  <-  tiles.json beside this file, shipped  <-  the cache file of this machine

The cache file is readable JSON: one entry per head and device, with the time of every candidate. ``TSO_FAST_TILES``
names it; by default it is ``tiles.json`` in ``TSO_FAST_CACHE`` (``~/.cache/tso-fast``). ``autotune.py`` writes it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tso_fast.kernels.blocks import capability

logger = logging.getLogger(__name__)

CUBLAS = "cublas"
"""Value in the files for a dhidden computed by torch's product."""


class Tile(NamedTuple):
    """Shape and schedule of one matrix product [rows, inner] x [inner, cols]."""

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int
    group: int = 16
    """Number of row tiles that run side by side, so that a wave covers a near-square patch that stays in L2 cache."""


class Tiles(NamedTuple):
    """The tiles of the three products of a head."""

    logits: Tile
    """T x V over D."""
    dhidden: Tile | None
    """T x D over V, if all rows have a gradient; None: torch's product."""
    dhidden_skipping: Tile
    """T x D over V, if rows may have no gradient; tiles without any cost nothing."""
    dweight: Tile
    """V x D over T."""


SMALL = Tile(128, 128, 64, 8, 3)
LARGE = Tile(128, 256, 64, 8, 4)
TALL = Tile(256, 128, 64, 8, 4)

_HOPPER = [LARGE, LARGE._replace(num_stages=3), LARGE._replace(group=8), LARGE._replace(group=32), TALL,
           TALL._replace(num_stages=3), SMALL, SMALL._replace(num_stages=4)]  # fmt: skip
_AMPERE = [SMALL, SMALL._replace(num_stages=4), SMALL._replace(inner=32, num_stages=4)]

CANDIDATES: dict[str, dict[str, list[Tile | None]]] = {
    "hopper": {"logits": [*_HOPPER], "dhidden": [None, *_HOPPER], "dweight": [*_HOPPER]},
    "blackwell": {"logits": [*_HOPPER], "dhidden": [None, *_HOPPER], "dweight": [*_HOPPER]},
    "ampere": {"logits": [*_AMPERE], "dhidden": [None, *_AMPERE], "dweight": [*_AMPERE]},
}
"""Tiles that ``autotune`` times, by architecture and product; all compile without spills, see ``--candidates`` of
tests/compile_kernels.py. Other architectures have no choice."""


def architecture(version: tuple[int, int]) -> str:
    """The architecture of a compute capability: ``interpreter``, ``ampere``, ``hopper``, ``blackwell``, or ``consumer``
    for chips with 99 KB of shared memory."""
    if version == (0, 0):
        return "interpreter"
    if version in ((8, 0), (8, 7)):
        return "ampere"
    if version == (9, 0):
        return "hopper"
    return "blackwell" if version[0] in (10, 11) else "consumer"


def default_tiles(D: int, dtype: torch.dtype, version: tuple[int, int]) -> Tiles:
    """Default tiles, which fit shared memory and registers without spills; not timed."""
    kind = architecture(version)
    if kind == "interpreter":  # small, so that small test shapes have several tiles
        wide, deep = Tile(16, 64, 32, 4, 1), Tile(32, 32, 64, 4, 1)
        return Tiles(wide, None if dtype != torch.float32 else deep, deep, Tile(64, 32, 16, 4, 1))
    if dtype == torch.float32:  # input_precision="ieee" uses no tensor cores; torch's product may use TF32
        tile = Tile(64, 64, 16, 8, 2)
        return Tiles(tile, tile, tile, tile)
    if D % 8:  # loads are element by element, which takes registers
        tile = Tile(64, 128, 32, 8, 2)
    elif kind == "consumer":
        tile = SMALL._replace(inner=32)
    else:  # two programs per multiprocessor for small D
        tile = SMALL if kind == "ampere" or D < 2048 else LARGE
    return Tiles(tile, None if has_float32_product() else tile, tile, tile)


def under_softcap(tile: Tile, version: tuple[int, int]) -> Tile:
    """The tile of logits with a softcap, whose tanh would make a large tile spill on Blackwell."""
    is_large = tile.rows * tile.cols > SMALL.rows * SMALL.cols
    return SMALL if is_large and architecture(version) == "blackwell" else tile


@functools.cache
def has_float32_product() -> bool:
    """Whether torch can multiply 16-bit matrices into float32 on a GPU, which needs torch 2.8."""
    return "dtype" in torch.ops.aten.mm.overloads()


# ------------------------------------------------------------------------------------------------------ files of tiles


def cache_file() -> Path:
    """The file that ``autotune`` writes on this machine."""
    if given := os.environ.get("TSO_FAST_TILES"):
        return Path(given)
    return Path(os.environ.get("TSO_FAST_CACHE") or Path.home() / ".cache/tso-fast") / "tiles.json"


SHIPPED = Path(__file__).with_name("tiles.json")


def key_of(D: int, V: int, dtype: torch.dtype, device: torch.device) -> str:
    """Key of a head on a device in the files, e.g. ``NVIDIA H200, bfloat16, D 4096, V 128256``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, {str(dtype).removeprefix('torch.')}, D {D}, V {V}"


def to_json(tile: Tile | None) -> Any:
    return CUBLAS if tile is None else tile._asdict()


def _from_json(value: Any, what: str) -> Tile | None:
    if value == CUBLAS:
        return None
    try:
        tile = Tile(**value)
        is_good = all(isinstance(n, int) and n > 0 for n in tile) and not any(n & n - 1 for n in tile[:4])
    except TypeError:
        is_good = False
    if not is_good:
        raise ValueError(f"{what} is {value!r}; expected {CUBLAS!r} or an object of {', '.join(Tile._fields)} (rows, "
                         "cols, inner and num_warps powers of 2); mend the entry or delete it")  # fmt: skip
    return tile


def read(file: Path) -> dict[str, Any]:
    """The entries of a file by key; empty if there is no such file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); mend it or delete it, it is made again by "
                         "TSO_FAST_AUTOTUNE=1") from error  # fmt: skip
    if not isinstance(entries, dict):
        raise ValueError(f"{file} must hold a JSON object of entries by head and device, got {type(entries).__name__}")
    return entries


def write(file: Path, key: str, entry: dict[str, Any]) -> None:
    """Adds or replaces one entry of a file; the file is rewritten as a whole."""
    entries = read(file) | {key: entry}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
        part.write(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    Path(part.name).replace(file)


def _timed(key: str) -> tuple[dict[str, Any], Path] | None:
    for file in (cache_file(), SHIPPED):
        if (entry := read(file).get(key)) is not None:
            return entry, file
    return None


@functools.cache
def tiles(D: int, V: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tiles of a head from the cache file, the shipped file or the table; chosen once per process, and logged.

    Raises:
        ValueError: a file's entry is not a valid tile.
    """
    chosen, source = default_tiles(D, dtype, capability(device)), "the table"
    key = key_of(D, V, dtype, device)
    if (found := _timed(key)) is not None:
        entry, file = found
        source = str(file)
        given = {name: _from_json(entry[name], f"{file}: {key}: {name}") for name in Tiles._fields if name in entry}
        if any(given.get(name, ...) is None for name in ("logits", "dhidden_skipping", "dweight")):
            raise ValueError(f"{file}: {key}: only dhidden may be {CUBLAS!r}")
        chosen = chosen._replace(**given)
    logger.info("triton tiles of %s from %s: %s", key, source,
                ", ".join(f"{name} {CUBLAS if tile is None else 'x'.join(map(str, tile))}"
                          for name, tile in chosen._asdict().items()))  # fmt: skip
    if D % 8 and device.type == "cuda":
        logger.warning("triton: D = %d is no multiple of 8, so tiles are loaded element by element without a "
                       "pipeline: right, but several times slower; pad the hidden dimension with zeros", D)  # fmt: skip
    return chosen
