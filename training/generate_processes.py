"""The processes of a generating run: start them, talk to them, end them."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .generate_messages import WorkerTask
from .generate_worker import run_worker

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
