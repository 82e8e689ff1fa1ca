"""The folder of a run: a checkpoint after every epoch, a result at the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from fairseq_asam.files import whole, write_json


class RunFolder:
    """The folder *path* of the run with *options*, ready for JSON.

    Raises:
        ValueError: *path* is no folder. On reading: it holds a run with other options, or a broken file.
    """

    def __init__(self, path: Path, options: dict[str, Any]):
        self.path, self.options = Path(path), options
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"'{path}' is no folder: choose another for the run")
        self.result_file, self.checkpoint_file = self.path / "result.json", self.path / "checkpoint.pt"

    def result(self) -> dict[str, Any] | None:
        """Return the result of the run, or ``None`` if it is not finished."""
        if not self.result_file.exists():
            return None
        try:
            result = json.loads(self.result_file.read_text())
            self._check_same(self.result_file, result["options"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ValueError(f"{self.result_file} is no result of a run: choose another output") from None
        return result

    def checkpoint(self) -> dict[str, Any] | None:
        """Return the last checkpoint, on the CPU, or ``None`` if there is none yet."""
        if not self.checkpoint_file.exists():
            return None
        try:
            checkpoint = torch.load(self.checkpoint_file, map_location="cpu", weights_only=True)
            options = checkpoint["options"]
        except Exception as error:
            raise ValueError(
                f"{self.checkpoint_file} cannot be read as a checkpoint ({type(error).__name__}): "
                "delete it to train anew, or choose another folder"
            ) from None
        self._check_same(self.checkpoint_file, options)
        return checkpoint

    def save_result(self, result: dict[str, Any]) -> None:
        """Write result.json. Numbers that are not finite become null."""
        write_json(self.result_file, _finite(result))

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write checkpoint.pt, whole or not at all."""
        with whole(self.checkpoint_file) as file:
            torch.save({**checkpoint, "options": self.options}, file)

    def _check_same(self, file: Path, options: dict[str, Any]) -> None:
        other = [
            f"{name} {options.get(name)}, not {value}"
            for name, value in self.options.items()
            if options.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{file} is of a run with other options ({'; '.join(other)}): choose another output"
            )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
