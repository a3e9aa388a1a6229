"""Running a program that a language model wrote, so that it can be asked whether its assertions hold.

The program gets a process of its own, with limits on time, memory, file sizes and processes, an empty folder, no
environment and no standard streams; an audit hook refuses to start processes, open sockets, write files, call into C or
signal others. That stops accidents such as endless loops, fork bombs and deleted files. It is no boundary against an
attacker: judge unknown models in a container.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile

# Runs first in the child. Its first input line is a word that only a program which ran to its end says.
_PROLOGUE = """
import os, resource, sys
word, _, program = sys.stdin.read().partition("\\n")
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
def limit(what, value):
    value = value if resource.getrlimit(what)[1] == resource.RLIM_INFINITY else min(value, resource.getrlimit(what)[1])
    resource.setrlimit(what, (value, value))
for what, value in (("CPU", seconds), ("AS", memory), ("FSIZE", 0), ("CORE", 0), ("NOFILE", 32), ("NPROC", 0)):
    try:
        limit(getattr(resource, "RLIMIT_" + what), value)
    except (AttributeError, ValueError, OSError):
        pass
verdict = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
names = (
    "os.fork", "os.posix_spawn", "os.exec", "os.spawn", "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir",
    "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "pty.",
    "os.removexattr", "signal.pthread_kill", "subprocess.", "socket.", "ctypes.", "shutil.", "resource.", "fcntl.",
    "_thread.start_new_thread", "_thread.start_joinable_thread", "mmap.", "syslog.", "urllib.", "sqlite3.",
)
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def refuse(event, arguments, names=names, writing=writing):
    if event.startswith(names):
        raise PermissionError("not here: " + event)
    if event == "open" and (isinstance(arguments[0], int) or (arguments[2] or 0) & writing):
        raise PermissionError("nothing is written here")
def run(program):
    exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
end, write = os._exit, os.write
sys.addaudithook(refuse)
try:
    run(program)
except BaseException:
    end(1)
write(verdict, word.encode())
end(0)
"""


def passes(program: str, *, seconds: float = 6.0, memory: int = 1 << 30) -> bool:
    """Whether `program` (Python source) runs to its end without an error.

    seconds: of processor time; after half as many more on the clock, and one, it is killed. memory: bytes of address
    space. The program is Python's standard library only.
    """
    word = secrets.token_hex(16)
    command = [sys.executable, "-I", "-S", "-B", "-c", _PROLOGUE, str(max(1, round(seconds))), str(memory)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            source = f"{word}\n{program}".encode(errors="surrogatepass")
            said, _ = process.communicate(source, timeout=1.5 * seconds + 1)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
    return process.returncode == 0 and said == word.encode()
