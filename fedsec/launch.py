"""Cells in processes other than the sweep's own: what each sets up, how the sweep waits for them.

Hydra's launchers start them, on this machine or on others; nothing of what `__main__` set up is
there. Loads at once.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fedsec import cells

COMMAND = "FEDSEC_COMMAND"  # the process that was given the command; its workers inherit this


def worker() -> bool:
    """Whether a launcher started this process, on this machine or another, for a command's cells.

    The cells of all other processes print where these do.
    """
    said = os.environ.get(COMMAND)
    return said is not None and said != here()


def here() -> str:
    """This process, among those of all nodes."""
    return f"{os.uname().nodename}:{os.getpid()}"


@contextmanager
def job(folder: Path) -> Iterator[None]:
    """Around a cell. In a worker what it prints goes to its log, below what it printed before."""
    with ExitStack() as stack:
        if worker():
            spread()
            with suppress(OSError):  # a full disk: where the launcher lets it print
                path = cells.log(folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(open(path, "a", buffering=1, errors="replace"))
                stack.enter_context(redirect_stdout(log))
                stack.enter_context(redirect_stderr(log))
        yield


@cache
def spread() -> None:
    """In one of joblib's workers: see one of several GPUs, each worker the next. Before torch."""
    from multiprocessing import current_process

    number = re.fullmatch(r"LokyProcess-(\d+)", current_process().name)
    gpus = _gpus()
    if number and len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[(int(number[1]) - 1) % len(gpus)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES lists them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [each.strip() for each in said.split(",") if each.strip()]
    return [str(k) for k, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


@dataclass(frozen=True)
class Launcher:
    """What a sweep started its cells with."""

    name: str  # joblib, submitit_local, slurm
    submitted: str = ""  # submitit's folder for a job, with %j for its number
    since: float = field(default_factory=time.time)

    def wait(self) -> None:
        """Wait for all jobs that submitit started: its launcher ends at the first lost one."""
        if not self.submitted:
            return
        for path in sorted(Path(self.submitted.partition("%j")[0]).glob("*/*_submitted.pkl")):
            if path.stat().st_mtime >= self.since:
                _wait_for(path.parent.name, self)


def _wait_for(job: str, launcher: Launcher) -> None:
    if launcher.name == "slurm":
        from submitit import SlurmJob

        SlurmJob(launcher.submitted, job).wait()
    while launcher.name != "slurm" and _child(int(job)):
        time.sleep(0.2)


def _child(process: int) -> bool:
    """Whether it is a child of this process that has not ended."""
    try:
        return os.waitpid(process, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False
