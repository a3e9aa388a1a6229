"""The processes of a generating run: start them, talk to them, end them; and where each of them begins."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from linocut.engine.errors import LinocutError, ModelError

from .generate_messages import Flag, Jobs, Reports, WorkerReport, WorkerTask
from .generate_worker import Worker

log = logging.getLogger("linocut.training")

# After the end is called, workers write what they have; one that takes longer than this is ended.
GRACE = 60.0


@dataclass
class Workers:
    """jobs, reports: queues to and from the workers. stop: the flag that ends them early."""

    jobs: Any
    reports: Any
    stop: Any
    processes: dict[int, Any] = field(default_factory=dict)

    def is_dead(self, worker: int) -> bool:
        process = self.processes.get(worker)
        return process is not None and not process.is_alive()


def workers(tasks: list[WorkerTask]) -> contextlib.AbstractContextManager[Workers]:
    """Start a worker for each task. When the context ends, so do they.

    A single one is a thread of this process: nothing to overlap, and nothing to import twice.
    """
    return _thread(tasks[0]) if len(tasks) == 1 else _processes(tasks)


@contextlib.contextmanager
def _thread(task: WorkerTask) -> Iterator[Workers]:
    started = Workers(queue.Queue(maxsize=4), queue.Queue(), threading.Event())
    thread = threading.Thread(target=run_worker, args=(task, started.jobs, started.reports, started.stop), daemon=True)
    thread.start()
    try:
        yield started
    finally:
        started.stop.set()
        thread.join(GRACE)


@contextlib.contextmanager
def _processes(tasks: list[WorkerTask]) -> Iterator[Workers]:
    # Spawned, not forked: CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    started = Workers(context.Queue(maxsize=2 * len(tasks)), context.Queue(), context.Event())
    try:
        for task in tasks:
            arguments = (task, started.jobs, started.reports, started.stop)
            process = context.Process(target=run_worker, args=arguments, daemon=True)
            process.start()
            started.processes[task.index] = process
        yield started
    finally:
        started.stop.set()
        # Prompts still in the pipe are for nobody.
        started.jobs.cancel_join_thread()
        for process in started.processes.values():
            process.join(GRACE)
            if process.is_alive():
                process.terminate()


def run_worker(task: WorkerTask, jobs: Jobs, reports: Reports, stop: Flag) -> None:
    """Entry point. Answers jobs until the queue says None or `stop` is set; what is unfinished then is cut.

    Never raises: failures are reported.
    """
    terminated = _settle(task) if task.own_process else []
    try:
        worker = Worker(task, jobs, reports, _Stop(stop, terminated))
        worker.report("ready")
        worker.run()
        if terminated and not stop.is_set():
            raise ModelError("the process was told to end")
        worker.report("done")
    except Exception as error:
        text = str(error) if isinstance(error, LinocutError) else f"{type(error).__name__}: {error}"
        log.debug("worker %d failed", task.index, exc_info=True)
        reports.put(WorkerReport(task.index, "failed", text))


@dataclass(frozen=True)
class _Stop:
    """The parent's flag, or a SIGTERM to this process alone.

    The handler does not set the parent's flag: that takes a lock which the interrupted code may hold.
    """

    flag: Flag
    terminated: list[int]

    def is_set(self) -> bool:
        return bool(self.terminated) or self.flag.is_set()


def _settle(task: WorkerTask) -> list[int]:
    """Settings of a process of its own, before CUDA is first touched. Returns a list that a SIGTERM fills."""
    terminated: list[int] = []

    def terminate(number: int, frame: object) -> None:
        # What there is is written. A second one, which the parent sends to a process that hangs, ends it.
        terminated.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, terminate)

    # Ctrl-C reaches the whole process group; the parent decides, and the answers made so far are written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if task.visible_device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.visible_device
        # Several processes tokenise on these cores, and the device does the rest.
        os.environ.setdefault("RAYON_NUM_THREADS", "2")
        import torch

        torch.set_num_threads(1)
    return terminated
