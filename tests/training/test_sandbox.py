"""What a program in the sandbox cannot do, and what it can."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from linocut.training.sandbox import passes

INTERPRETERS = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
FORK_EXEC = "fork_exec([b'/bin/true'], (b'/bin/true',), True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w, True, "
FORK_EXEC += "False, -1, None, None, None, -1, None, True)"

linux = pytest.mark.skipif(sys.platform != "linux", reason="functions of Linux")


@linux
@pytest.mark.parametrize(
    "attempt",
    [
        f"import _posixsubprocess\nr, w = os.pipe()\n_posixsubprocess.{FORK_EXEC}",
        f"del sys.modules['_posixsubprocess']\nimport _posixsubprocess\nr, w = os.pipe()\n_posixsubprocess.{FORK_EXEC}",
        "import signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "import _signal\n_signal.pidfd_send_signal",
        "os.pidfd_open(os.getpid())",
        f"import {INTERPRETERS} as i\ni.create()",
        "import _testcapi",
        "import _ctypes",
        "del sys.modules['posix']\nimport posix",
        "import importlib.util as u\nu.module_from_spec(u.spec_from_loader('posix', __import__('_frozen_importlib')"
        ".BuiltinImporter)).mkfifo",
        "[f for f in os.supports_dir_fd if f.__name__ == 'mkfifo'][0]",
        "os.mkfifo('/tmp/linocut-sandbox-fifo')",
        "os.mknod('/tmp/linocut-sandbox-node')",
        "os.chroot('/')",
        "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(os.getppid()))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid()))",
        "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (64, 64))",
        "open(f'/proc/{os.getppid()}/environ', 'rb')",
        "open('/proc/self/mem', 'rb')",
        "os.chdir('/proc')\nopen(f'{os.getppid()}/environ', 'rb')",
        "os.open(f'proc/{os.getppid()}/environ', os.O_RDONLY, dir_fd=os.open('/', os.O_RDONLY))",
        "os.memfd_create('a')",
        "os.openpty()",
        "import _gdbm",
        "import _sqlite3\n_sqlite3.connect('a')",
    ],
)
def test_what_escaped_once_is_refused(attempt: str) -> None:
    body = attempt.replace("\n", "\n    ")
    refusals = "PermissionError, AttributeError, ImportError, IndexError"
    assert passes(f"import os, sys\ntry:\n    {body}\nexcept ({refusals}): pass\nelse: raise SystemExit", seconds=2)


@pytest.mark.parametrize(
    "forgery",
    [
        "import __main__, os\nos.write(__main__.verdict, __main__.word.encode())\nos._exit(0)",
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "import os\nwhile True:\n    for fd in range(3, 32):\n        try: os.write(fd, b'0' * 65536)\n"
        "        except OSError: pass",
    ],
)
def test_a_verdict_is_not_forged_easily(forgery: str) -> None:
    assert not passes(forgery, seconds=1)


def test_the_word_is_in_no_frame_and_no_object_that_the_collector_knows() -> None:
    assert passes("""
import gc, re, sys
def words(value, depth=0):
    if isinstance(value, bytes): value = value.decode("latin-1")
    if isinstance(value, str): return re.fullmatch("[0-9a-f]{32}", value.partition("\\n")[0]) is not None
    if isinstance(value, dict): value = list(value.values())
    return depth < 3 and isinstance(value, (list, tuple)) and any(words(v, depth + 1) for v in value)
assert words(["0" * 32])
frame, depth = sys._getframe(), 0
while frame.f_back:
    frame, depth = frame.f_back, depth + 1
    assert not words(list(frame.f_locals.items())) and not words(list(frame.f_globals.items()))
assert depth
assert not any(words(v) for v in gc.get_objects() if isinstance(v, (dict, list, tuple)) and "0" * 32 not in v)
""")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="not root")
@linux
def test_root_becomes_nobody() -> None:
    assert passes("import os\nassert os.getresuid() == (65534,) * 3 == os.getresgid() and os.getgroups() == []")


def test_a_program_starts_in_an_empty_folder_without_an_environment() -> None:
    here = Path.cwd()
    assert passes(f"import os\nassert os.listdir() == [] and not os.environ and os.getcwd() != {str(here)!r}")


@pytest.mark.parametrize(
    "program",
    [
        "import math, re, collections, heapq, itertools, functools, bisect, string, random, datetime, decimal, json",
        "import asyncio, subprocess, threading, unittest, concurrent.futures, statistics, copy, operator, cmath, array",
        "from os import *\nfrom typing import *\nimport logging, tempfile, shutil, zoneinfo, fractions, hashlib",
        "assert 'ä'.encode('latin-1').decode('cp1252') == 'ä'",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nassert A() == A(1)",
        "import pickle\nclass A: pass\nassert isinstance(pickle.loads(pickle.dumps(A())), A)",
        "import sys\nsys.setrecursionlimit(5000)\ndef f(n): return n and 1 + f(n - 1)\nassert f(3000) == 3000",
        "print('x' * 10**6)\nif __name__ == '__main__': pass\nelse: raise SystemExit",
        "import random, uuid, os\nrandom.random(), uuid.uuid4(), os.urandom(3)\nopen(os.devnull).read()",
        pytest.param("assert " + repr("x" * 300_000), id="longer than a pipe holds"),
    ],
)
def test_an_ordinary_program_passes(program: str) -> None:
    assert passes(program)


def test_verdicts_repeat() -> None:
    assert sum(passes(f"assert hash('linocut') % 3 == {rest}") for rest in range(3)) == 1
