"""Asks measuring processes (``cllm.training.plan.probe`` and ``link_probe``): one, or several in step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from cllm.core.errors import UserError
from cllm.core.threads import spin_briefly
from cllm.training.parallel.cores import cores_of_processes

PROBE = "cllm.training.plan.probe"
WAITING = "waiting"
"""What a probe says before each measurement; it then waits for a line."""


def ask(
    request: dict[str, Any], processes: int = 1, *, program: str = PROBE
) -> list[dict[str, Any]]:
    """The answers of ``processes`` probes, on cores of their own like workers, that measure the same at the
    same time. Each is told its ``number`` and its ``cores`` besides.

    Raises ``UserError`` where one fails.
    """
    cores = cores_of_processes(request["threads"], processes) if processes > 1 else []
    with ExitStack() as stack:
        probes = [stack.enter_context(_probe(program)) for _ in range(processes)]
        for number, probe in enumerate(probes):
            own = {"number": number, "cores": cores[number] if cores else []}
            probe.tell(json.dumps(request | own))
        lines = [probe.hear() for probe in probes]
        while all(line == WAITING for line in lines):
            for probe in probes:
                probe.tell("go")
            lines = [probe.hear() for probe in probes]
        return [json.loads(line) for line in lines]


class _Probe:
    """A measuring process; ``errors`` is where it complains."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.process, self._errors = process, errors

    def tell(self, line: str) -> None:
        """Give it a line; that it is gone is seen when it is heard."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def hear(self) -> str:
        """Its next line. Raises ``UserError`` with its last complaint if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"this machine could not be measured: {last[0]}")
        return line.rstrip("\n")


@contextmanager
def _probe(program: str) -> Iterator[_Probe]:
    """A probe that does not outlive the question."""
    env = dict(os.environ)
    spin_briefly(env)  # as in training
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(
            [sys.executable, "-m", program],
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            text=True,
            env=env,
        )
        try:
            yield _Probe(process, errors)
        finally:
            process.kill()
            process.communicate()
