"""Running a program that a language model wrote, so that it can be asked whether its assertions hold.

The program gets a process of its own, with limits on time, memory, file sizes and processes, an empty folder, no
environment and no standard streams; root becomes `nobody` (where there is /proc). An audit hook refuses to start
processes, open sockets, write files, read /proc, call into C or signal others, and functions that raise no audit event
are taken away. That stops accidents such as endless loops, fork bombs and deleted files. It is no boundary against an
attacker: what shares a process with its guard gets around it, and files that anyone may read stay readable. Judge
unknown models in a container.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile

_MEMORY = 1 << 30  # bytes of the child's address space

# Runs first in the child. Its first input line is a word that only a program which ran to its end says.
_PROLOGUE = r"""
import _imp, _signal, os, posix, resource, sys

# They start processes or interpreters, map or write memory, or write files, and no audit event tells. The last three
# are loaded, without what is taken away below: a second copy would have it again.
MODULES = frozenset((
    "_posixsubprocess", "_xxsubinterpreters", "_interpreters", "_xxinterpchannels", "_interpchannels",
    "_interpqueues", "_testcapi", "_testlimitedcapi", "_testinternalcapi", "_testbuffer", "_testmultiphase",
    "_testsinglephase", "_testclinic", "_ctypes", "_ctypes_test", "_multiprocessing", "_posixshmem",
    "_remote_debugging", "_dbm", "_gdbm", "_curses", "readline", "posix", "_signal", "_imp",
))
FUNCTIONS = (
    "chroot initgroups login_tty memfd_create mkfifo mknod nice openpty pidfd_open posix_openpt sched_setaffinity "
    "sched_setparam sched_setscheduler setegid seteuid setgid setgroups setns setpgid setpriority setregid setresgid "
    "setresuid setreuid setsid setuid sync unshare pidfd_send_signal"
).split()
EVENTS = (
    "os.fork", "os.posix_spawn", "os.exec", "os.spawn", "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir",
    "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "pty.",
    "os.removexattr", "signal.pthread_kill", "subprocess.", "socket.", "ctypes.", "shutil.", "resource.", "fcntl.",
    "_thread.start_new_thread", "_thread.start_joinable_thread", "mmap.", "syslog.", "urllib.", "sqlite3.",
    "cpython.PyInterpreterState_New", "sys.remote_exec",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(name, value):
    try:
        what = getattr(resource, "RLIMIT_" + name)
        most = resource.getrlimit(what)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(what, (value, value))
    except (AttributeError, ValueError, OSError):
        pass


def drop_root(nobody=65534):
    if os.geteuid() or not os.path.isdir("/proc/self/fd"):
        return
    # The library may lie in a folder of root's: descriptors still lead there.
    held = {path: os.open(path, os.O_RDONLY) for path in sys.path if os.path.isdir(path)}
    for drop, value in ((os.setgroups, []), (os.setgid, nobody), (os.setuid, nobody)):
        try:
            drop(value)
        except OSError:
            pass
    for path, descriptor in held.items():
        if os.access(path, os.R_OK | os.X_OK):
            os.close(descriptor)
            continue
        open_path = f"/proc/self/fd/{descriptor}"
        sys.path[sys.path.index(path)] = open_path
        for module in list(sys.modules.values()):
            if hasattr(module, "__path__"):
                module.__path__ = [
                    open_path + part[len(path):] if part.startswith(path + "/") else part for part in module.__path__
                ]


def take_away():
    refused = type(sys)("_posixsubprocess")
    def fork_exec(*arguments):
        raise PermissionError("not here: fork_exec")
    refused.fork_exec = fork_exec
    sys.modules["_posixsubprocess"] = refused  # so that `import subprocess` works, which much of the library does
    known = (os.supports_dir_fd, os.supports_fd, os.supports_effective_ids, os.supports_follow_symlinks)
    for name in FUNCTIONS:
        for module in (os, posix, _signal):
            function = module.__dict__.pop(name, None)
            for functions in known:
                functions.discard(function)
    os.__all__ = [name for name in os.__all__ if hasattr(os, name)]
    create = _imp.create_builtin
    def create_builtin(spec):
        if str(spec.name).rpartition(".")[2] in MODULES:
            raise ImportError("not here: " + spec.name)
        return create(spec)
    _imp.create_builtin = create_builtin


def refuse(
    event, arguments, events=EVENTS, modules=MODULES, writing=WRITING, realpath=os.path.realpath, isdir=os.path.isdir
):
    if event.startswith(events):
        raise PermissionError("not here: " + event)
    if event == "import" and arguments[0].rpartition(".")[2] in modules:
        raise ImportError("not here: " + arguments[0])
    if event == "open":
        if isinstance(arguments[0], int) or (arguments[2] or 0) & writing:
            raise PermissionError("nothing is written here")
        path = os.fsdecode(arguments[0])
        # Other processes' secrets, and folders, from which a path that this hook cannot see could lead there.
        if (realpath(path) + "/").startswith("/proc/") or isdir(path):
            raise PermissionError("not here: " + path)


def main():
    word, _, program = sys.stdin.read().partition("\n")
    kept = [word.encode()]
    del word
    limits = {"CPU": int(sys.argv[1]), "AS": int(sys.argv[2]), "FSIZE": 0, "CORE": 0, "NOFILE": 32, "NPROC": 0}
    del sys.argv[1:]
    os.environ.clear()
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for name, value in limits.items():
        limit(name, value)
    drop_root()
    take_away()
    end, write = os._exit, os.write
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.addaudithook(refuse)
    try:
        # While the program runs, the word is in no variable of any frame: only among this expression's operands.
        write(verdict, (kept.pop(), exec(compile(program, "answer", "exec"), module.__dict__))[0])
    except BaseException:
        end(1)
    end(0)


main()
"""


def passes(program: str, *, seconds: float = 6.0) -> bool:
    """Whether `program` (Python source) runs to its end without an error.

    seconds: of processor time; after half as many more on the clock, and one, it is killed. It has a gigabyte of
    address space, and Python's standard library only.
    """
    word = secrets.token_hex(16).encode()
    command = [sys.executable, *("-P", "-s", "-S", "-B", "-X", "utf8", "-c"), _PROLOGUE]
    command += [str(max(1, round(seconds))), str(_MEMORY)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as source:
        os.chmod(folder, 0o555)
        source.write(word + b"\n" + program.encode(errors="surrogatepass"))
        source.seek(0)
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},  # so that an answer gets the same verdict twice; the child forgets it
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                ready = selector.select(1.5 * seconds + 1)
            # Once and little: what a program may write here instead of the word has no end.
            return bool(ready) and os.read(process.stdout.fileno(), 64) == word
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            process.stdout.close()
