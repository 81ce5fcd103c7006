"""Settings that publishers leave beside their weights, as JSON or YAML."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transcoders.errors import TranscoderError


@dataclass(frozen=True)
class Settings:
    """The contents of a settings file; a file that is not there says nothing."""

    path: Path
    values: dict[str, Any]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or the default where the file leaves it out."""
        return self.values.get(name, default)

    def need(self, name: str) -> Any:
        """A setting without which the weights mean nothing."""
        if self.values.get(name) is None:
            raise TranscoderError(f"{self.path} does not say {name}; copy or download the whole transcoder again.")
        return self.values[name]


def read_settings(path: Path) -> Settings:
    """A .json or .yaml file."""
    if not path.is_file():
        return Settings(path, {})
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise TranscoderError(f"{path} cannot be read ({reason}); copy or download it again.") from error
    if not isinstance(values, dict):
        raise TranscoderError(f"{path} holds no settings by name; copy or download it again.")
    return Settings(path, values)
