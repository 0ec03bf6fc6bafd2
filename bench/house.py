"""Servers to measure: processes of the real command with keys in a directory of their own, and what /proc says of them.

Knows of the wire only addresses and keys. Invariant: when a House is left its processes have ended.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from specedge.net.auth import SECRET, authorize, generate

TICKS = os.sysconf("SC_CLK_TCK")
COMMAND = [sys.executable, "-c", "from specedge.cli import server; server()", "serve", "--demo", "--device", "cpu"]


class Process:
    """`specedge-server serve --demo` with `options`, on `core` alone if one is named."""

    def __init__(self, *options: object, core: int | None = None) -> None:
        pin = [] if core is None else ["taskset", "-c", str(core)]
        self._process = subprocess.Popen([*pin, *COMMAND, *map(str, options)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().split()
        if ready[:1] != ["ready"]:
            raise RuntimeError(f"the server did not start: status {self._process.wait()}")
        self.address = ready[1]

    @property
    def endpoint(self) -> str:
        return self.address.partition("/?")[0].replace("specedge", "tcp")

    @property
    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def resident_mb(self) -> float:
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def terminate(self) -> int:
        """SIGTERM, and the exit status in the end."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class House:
    """A directory with the key of a server and of edges, and servers that use it."""

    def __enter__(self) -> "House":
        self._stack = contextlib.ExitStack()
        self.home = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        generate(self.home / SECRET)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def key(self, name: str, **limits: str) -> Path:
        """The file of a key that is authorised."""
        path = self.home / name
        authorize(self.home, generate(path), name=name, **limits)
        return path

    def serve(self, *options: object, keys: bool = True, core: int | None = None) -> Process:
        process = Process(*(("--keys", self.home) if keys else ()), *options, core=core)
        self._stack.callback(process.kill)
        return process
