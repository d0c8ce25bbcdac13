"""The exceptions a caller may see.

::

    KubetunerError                 base: catch this to catch all of ours
    ├── InputError                 what the user gave is wrong (exit code 2)
    │   └── ConfigError            ... in config.json or multidatabackend.json: lists every problem at once
    └── StepError                  the input was fine and the work failed (exit code 1)
        ├── DatasetError           too few usable samples, a source that cannot be read
        ├── ArtifactError          an artifact or shard is missing, damaged or of another version
        ├── TrainingError          a non-finite loss, a checkpoint that cannot be resumed
        └── PublishError           the hub refused or could not be reached

Messages say what was got, what was expected, where it stands (file, key, sample) and what to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def on_one_line(name: str) -> str:
    """A file's name for a message: line breaks and other signs that cannot be seen are written as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


class KubetunerError(Exception):
    """Base of all kubetuner errors; its text is one message for a person."""


class InputError(KubetunerError):
    """The input is wrong; nothing was started."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the configuration.

    Attributes:
        where: File, index and key, for example ``multidatabackend.json[2].crop``.
        message: What was got, what was expected and what to do.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class ConfigError(InputError):
    """The two JSON files do not describe a run; carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} {noun} in the configuration:\n{lines}")


class StepError(KubetunerError):
    """The input was accepted and the work failed."""


class DatasetError(StepError):
    """A dataset cannot be read, or too few of its samples are usable."""


class ArtifactError(StepError):
    """An artifact or shard is missing, damaged, or written by another schema version."""


class TrainingError(StepError):
    """Training cannot go on: non-finite loss, or a checkpoint that does not fit the run."""


class PublishError(StepError):
    """The hub refused the upload or could not be reached."""
