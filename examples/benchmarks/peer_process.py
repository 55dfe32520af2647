"""A peer as a process that answers requests, line by line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvfx.errors import InputError

SCRIPT = Path(__file__).with_name("peer.py")
# what kvfx needs to be found must not be seen in the environment of a peer
HIDDEN = ("PYTHONPATH", "PYTHONHOME")


class PeerProcess:
    """peer.py under its own Python, with the workload at `workload`; what it prints besides
    answers goes to `log`. `versions` and `threads` are those that it reports.
    """

    def __init__(
        self, python: Path, workload: Path, log: Path, tell: Callable[[str], None]
    ) -> None:
        self.tell, self.log = tell, log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                (str(python), str(SCRIPT), str(workload)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={name: value for name, value in os.environ.items() if name not in HIDDEN},
            )
        started = self._answer()
        self.versions: dict[str, str] = started["versions"]
        self.threads: int = started["threads"]

    def ask(self, verb: str, **request: object) -> Mapping[str, Any]:
        """What the peer answers; raises an InputError with its reason where it cannot."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, **request}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> Mapping[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "done" in answer:
                return answer["done"]
            if "failed" in answer:
                raise InputError(f"the peer cannot do that: {answer['failed']}")
            self.tell(answer["tell"])
        self.close()
        raise InputError(f"the peer ended with code {self.process.returncode}: read {self.log}")
