"""Programs of users: the generations of huggingface_hub, and one running process of one of them.

The newest generation is that of the environment the tests run in. Each older one has an environment of its own below
`.venv-clients`, which `make test` builds from `tests/clients/<name>.txt`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

_ROOT = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("hf_client.py")
NOWHERE = "http://127.0.0.1:9"
"""An endpoint where nobody answers: who asks it anything fails."""


@dataclass(frozen=True)
class Generation:
    """A version of huggingface_hub."""

    version: str
    environment: str = ""
    """Folder of its environment below `.venv-clients`; empty for the one of the tests."""
    keeps_listings: bool = True
    """Whether it keeps the listing of a commit, and looks whether a snapshot is complete."""
    suffix: str = ".0a1b2c3d.incomplete"
    """How the name of a file that is not complete ends in its cache."""

    @property
    def python(self) -> str:
        """Its interpreter; fails the test where there is none."""
        if not self.environment:
            return sys.executable
        path = Path(".venv-clients") / self.environment / "bin" / "python"
        if not (_ROOT / path).exists():
            pytest.fail(f"{path}, which has huggingface_hub {self.version}, is missing: run 'make test'", pytrace=False)
        return str(_ROOT / path)


OLDEST = Generation("0.36", "hub-0.36", keeps_listings=False, suffix=".incomplete")
NEWEST = Generation("2.4")
GENERATIONS = (OLDEST, Generation("1.33", "hub-1.33"), NEWEST)


def environment_of(endpoint: str, hf_home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a user's programs see: an endpoint, and a cache of their own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(hf_home), "TQDM_DISABLE": "1", **(more or {})}


class Program:
    """A user's program that does one thing after another until the block ends."""

    def __init__(self, generation: Generation, environment: Mapping[str, str]) -> None:
        command = [generation.python, str(_SCRIPT)]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed at the end of the block
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def begin(self, *command: str | int) -> None:
        """Have it do something; `end` waits for the result."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def end(self) -> Any:  # noqa: ANN401  # JSON
        """The result of what was begun, or `{"error": class, "said": text}`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program ended:\n{self.said}"
        return json.loads(line)

    def ask(self, *command: str | int) -> Any:  # noqa: ANN401  # JSON
        """Have it do something, and wait."""
        self.begin(*command)
        return self.end()

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        self._said.seek(0)
        return self._said.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        # With the end of its input it leaves by itself; after a failure nobody waits for what it still does.
        if exc is not None:
            self.process.kill()
        self.process.__exit__(kind, exc, trace)
        self._said.close()
