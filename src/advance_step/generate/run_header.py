"""What a run was asked for, in a small file beside its output, so that another one is not continued as this one."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from advance_step import __version__

FORMAT = "advance-step generate, run 1"


@dataclass
class RunHeader:
    """The input, the model and the settings that the results of an output follow from.

    input, model: their names, for messages; input_fingerprint, model_fingerprint: what tells them from others.
    settings: options of the command by name, with their values.
    """

    input: str
    input_fingerprint: str
    model: str
    model_fingerprint: str
    settings: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "RunHeader":
        """The header in a file. ValueError for a file that is none."""
        try:
            entry = json.loads(path.read_bytes())
            if entry.pop("format") != FORMAT:
                raise ValueError("another format")
            entry.pop("version")
            return cls(**entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected what advance-step writes beside its output, got {error}") from error

    def write(self, path: Path) -> None:
        """Put it into a file, in place of the header that is there, whole at every moment."""
        unfinished = path.with_name(path.name + ".part")
        entry = {"format": FORMAT, "version": __version__, **asdict(self)}
        try:
            unfinished.write_text(json.dumps(entry, indent=1) + "\n")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def check_same(self, other: "RunHeader", output: Path) -> None:
        """ValueError where `other`, of the run that is to continue `output`, is not this one; says what differs."""
        if self.input_fingerprint != other.input_fingerprint:
            raise ValueError(f"--resume: {output} has the results of another --input ({self.input}), got {other.input}")
        if self.model_fingerprint != other.model_fingerprint:
            raise ValueError(f"--resume: {output} was made with another --model ({self.model}), got {other.model}")
        before, now = _options(self.settings), _options(other.settings)
        if differing := sorted(name for name in before | now if before.get(name) != now.get(name)):
            old, new = (" ".join(settings.get(n, f"no {n}") for n in differing) for settings in (before, now))
            raise ValueError(f"--resume: {output} was made with {old}, got {new}")


def _options(settings: dict[str, Any]) -> dict[str, str]:
    """Each option by its name, as it stands on the command line."""
    return {
        f"--{name.replace('_', '-')}": f"--{name.replace('_', '-')} {value}"
        for name, value in json.loads(json.dumps(settings)).items()
    }
