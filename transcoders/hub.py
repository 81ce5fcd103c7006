"""Transcoders on the Hugging Face Hub: hf://org/repo[/path][@revision] and org/repo[@revision] become local paths.

A revision may also be given as ?revision=…, as circuit-tracer's config.yaml has it. Files are kept in the Hub's own
cache, whose folders are named after the commit.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from transcoders.errors import TranscoderError

SCHEME = "hf://"
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""What the client's HTTP library raises, which was another one in other versions: a broken connection comes so."""
FILES = (".safetensors", ".npz", ".pt", ".ckpt")
WANTED = ("*.safetensors", "*.npz", "*.pt", "*.ckpt", "config.yaml", "config.json", "*/config.json", "*cfg.json")
"""Weights and settings; repositories may hold much more, such as dashboards of every feature."""
PATIENCE = 10.0
"""Seconds in which the Hub must begin to answer."""
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubPath:
    """A repository on the Hub, or something in it."""

    repo: str
    path: str = ""
    revision: str | None = None


def parse(text: str) -> HubPath | None:
    """What a Hub id names; None for what is no Hub id: a local path, or a word."""
    body, _, query = text.removeprefix(SCHEME).partition("?revision=")
    body, _, pinned = body.partition("@")
    parts = body.strip("/").split("/")
    if not text.startswith(SCHEME) and (len(parts) != 2 or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", body)):
        return None
    if len(parts) < 2:
        raise TranscoderError(
            f"{text!r} names no repository; write it as hf://org/repo, or hf://org/repo/path@revision."
        )
    return HubPath("/".join(parts[:2]), "/".join(parts[2:]), query or pinned or None)


def locate(source: str | Path, base: Path = Path()) -> Path:
    """A local path as it is (seen from `base`), or what a Hub id names, downloaded if it is not there yet."""
    if isinstance(source, Path) or (base / source).exists():
        return base / source
    place = parse(source)
    return base / source if place is None else _fetch(place)


def commit(path: Path) -> str | None:
    """The commit that a path in the Hub's cache is of."""
    found = re.search(r"models--[^/]+/snapshots/([0-9a-f]{40})(?:/|$)", path.absolute().as_posix())
    return found[1] if found else None


def is_out_of_reach(repo: str, revision: str) -> bool:
    """Whether the Hub cannot be asked for a repository, so that only its cache is left; a warning tells of it.

    transformers finds that out anew for each file that a repository may lack: two minutes where there is no network.
    """
    try:
        HfApi().model_info(repo, revision=revision, timeout=PATIENCE)
    except OfflineModeIsEnabled:  # as it was asked for
        return True
    except (HfHubHTTPError, HFValidationError):  # it says no, or would, and whoever downloads tells why
        return False
    except (HTTP_ERROR, OSError) as error:
        LOG.warning("the Hub cannot be reached (%s): looking for %s in its cache.", _reason(error), repo)
        return True
    return False


def _fetch(place: HubPath) -> Path:
    try:
        if place.path.endswith(FILES):
            return Path(hf_hub_download(place.repo, place.path, revision=place.revision))
        below = f"{place.path}/" if place.path else ""
        patterns = [f"{below}{name}" for name in WANTED]
        return Path(snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns)) / place.path
    except LocalEntryNotFoundError as error:
        raise TranscoderError(
            f"{place.repo} is not in the Hub's cache and cannot be downloaded: the Hub cannot be reached, or "
            "HF_HUB_OFFLINE is set. Go online once, or give a local folder."
        ) from error
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
        revision = f" at revision {place.revision}" if place.revision else ""
        raise TranscoderError(
            f"{place.repo}{revision} cannot be downloaded ({_reason(error)}); check its name, its revision and, if it "
            "is gated, that you are logged in (hf auth login)."
        ) from error
    except (HTTP_ERROR, OSError) as error:  # OSError: a file that came short, a full disk
        raise TranscoderError(
            f"{place.repo} cannot be downloaded ({_reason(error)}); run the same command again: what is there is kept."
        ) from error


def _reason(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
