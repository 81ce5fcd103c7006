"""Load a transcoder of any layout, into memory or on demand, and write circuit-tracer's layout, the native one."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import torch

from transcoders import hub
from transcoders.errors import TranscoderError
from transcoders.files import sync, told_in_one_line
from transcoders.formats import circuit_tracer, open_folder
from transcoders.model import CrossLayerTranscoder, StoredTranscoder
from transcoders.stored import Encoder, Stored, expand

BLOCK = 1 << 16
N_BLOCKS = 1 << 10


def ignore(done: int, total: int) -> None:
    """A progress callback that does nothing."""


def open_stored(source: str | Path, **overrides: str) -> Stored:
    """A transcoder of any known layout, still in its files; `source` is a folder, a pattern or a Hub id.

    `overrides` (reads, writes, model_name) replace what the files say, or leave unsaid.
    """
    return open_folder(hub.locate(source), **overrides)


def load(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CrossLayerTranscoder:
    """Read a whole transcoder into memory."""
    return in_memory(open_stored(source), device=device, dtype=dtype)


def in_memory(
    stored: Stored, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CrossLayerTranscoder:
    """All of a transcoder that is in its files."""
    transcoder = CrossLayerTranscoder(stored.config)
    _place(transcoder, device, dtype)
    _copy_encoders(transcoder, stored)
    features = torch.arange(stored.config.n_features)
    with torch.no_grad():
        for layer, decoder in enumerate(transcoder.W_dec):
            decoder.copy_(stored.decoder(layer, features))
    return transcoder.eval().requires_grad_(False)


def load_on_demand(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> StoredTranscoder:
    """Read all but the decoders, of which only the rows of active features are ever read."""
    stored = open_stored(source)
    transcoder = StoredTranscoder(stored)
    _place(transcoder, device, dtype)
    _copy_encoders(transcoder, stored)
    return transcoder.eval().requires_grad_(False)


def _place(transcoder: CrossLayerTranscoder, device: str | torch.device, dtype: torch.dtype) -> None:
    """Matrices as `dtype`; biases and thresholds in float32 at least, as rounding them would move what is active."""
    wide = torch.promote_types(dtype, torch.float32)
    matrices = [transcoder.W_enc, *transcoder.W_dec, *([] if transcoder.W_skip is None else [transcoder.W_skip])]
    for matrix in matrices:
        matrix.data = matrix.data.to(device=device, dtype=dtype)
    for bias in (transcoder.b_enc, transcoder.b_dec, transcoder.threshold):
        bias.data = bias.data.to(device=device, dtype=wide)


def save(transcoder: CrossLayerTranscoder, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a transcoder folder; `dtype` is that of encoder and decoder matrices (biases stay float32)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    circuit_tracer.write(as_stored(transcoder), Path(folder), dtype, ignore)


def save_whole(stored: Stored, folder: Path) -> None:
    """Put a transcoder folder in place whole or not at all; one that is there is replaced. Nobody else may write it."""
    before = folder.with_name(f".{folder.name}-before")
    if before.exists() and not folder.exists():  # a kill came in between
        before.rename(folder)
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with _unfinished(folder) as unfinished:
            circuit_tracer.write(stored, unfinished, torch.float32, ignore)
            if folder.exists():  # a folder cannot be renamed onto one that is not empty
                folder.rename(before)
    finally:
        if before.exists() and not folder.exists():
            before.rename(folder)
        shutil.rmtree(before, ignore_errors=True)


def convert(
    stored: Stored, folder: str | Path, *, dtype: torch.dtype | None = None,
    on_layer: Callable[[int, int], None] = ignore,
) -> None:  # fmt: skip
    """Write a transcoder of any layout in the native one, a layer at a time; the folder appears whole or not at all."""
    folder = Path(folder)
    if folder.exists():
        raise TranscoderError(f"{folder} exists already; name a folder that does not, or delete it.")
    with _unfinished(folder) as unfinished:
        circuit_tracer.write(stored, unfinished, dtype or stored.dtype, on_layer)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder to write to, renamed into place at the end of the block."""
    with told_in_one_line(f"write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield unfinished
            for path in unfinished.iterdir():
                sync(path)
            unfinished.chmod(0o755)  # a temporary folder is its maker's alone
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def revision(source: str | Path) -> str:
    """The commit of a Hub folder, else ten hexadecimal digits that change with the weights in a folder.

    Of files over 64 MB evenly spaced samples are read: the whole of a large transcoder would take longer than a trace.
    """
    base, places = expand(hub.locate(source))
    commit = hub.commit(base)
    if commit is not None:
        return commit
    digest = hashlib.sha256()
    for path in _weight_files(places) or [base / "config.yaml"]:
        size = path.stat().st_size
        digest.update(path.name.encode())
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, size // N_BLOCKS)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:10]


def _weight_files(places: list[Path]) -> list[Path]:
    return sorted(path for place in places for path in place.rglob("*") if path.suffix in hub.FILES)


def _copy_encoders(transcoder: CrossLayerTranscoder, stored: Stored) -> None:
    with torch.no_grad():
        for layer in range(stored.config.n_layers):
            encoder = stored.encoder(layer)
            transcoder.W_enc[layer] = encoder.W_enc
            transcoder.b_enc[layer] = encoder.b_enc
            transcoder.b_dec[layer] = encoder.b_dec
            if encoder.threshold is not None:
                transcoder.threshold[layer] = encoder.threshold
            if transcoder.W_skip is not None and encoder.W_skip is not None:
                transcoder.W_skip[layer] = encoder.W_skip


def as_stored(transcoder: CrossLayerTranscoder) -> Stored:
    """A transcoder in memory, as writers take it."""
    has_threshold = transcoder.config.activation == "jumprelu"

    def encoder(layer: int) -> Encoder:
        return Encoder(
            transcoder.W_enc[layer], transcoder.b_enc[layer], transcoder.b_dec[layer],
            transcoder.threshold[layer] if has_threshold else None,
            None if transcoder.W_skip is None else transcoder.W_skip[layer],
        )  # fmt: skip

    return Stored("memory", transcoder.config, transcoder.W_enc.dtype, encoder, transcoder.decoder_rows)
