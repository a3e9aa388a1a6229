"""The CPU's kernels in C (`c/`), compiled on the machine that runs them: float32, x86 with AVX2 or AVX-512, Linux.

They share torch's OpenMP and its threads. Where there is no compiler, or it fails, the torch functions serve.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "c"
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off")
# The instructions that torch calls by these names, so that a library fits any machine which has them.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "native_linear": (None, (_P, _L, _L, _P, _I, _L, _L, _P, _P, _L, _I)),
    "native_low_rank": (_I, (_P, _L, _L, _P, _I, _P, _I, _L, _L, _L, _P, _L)),
    "native_packed_bytes": (_L, (_I, _L, _L)),
    "native_pack": (_I, (_I, _P, _L, _L, _P)),
    "native_int8_linear": (_I, (_P, _L, _L, _P, _P, _P, _P, _L, _P, _L)),
    "native_layers": (_I, (_P,) * 5),
    "native_vocabulary": (None, (_P, _P, _L, _L, _F, _P, _P, _P)),
    "native_top": (None, (_P, _L, _L, _L, _P, _P)),
    "native_draft": (_I, (*(_P,) * 4, *(_L,) * 3, *(_P,) * 3)),
    "native_rms_norm": (None, (_P, _P, _L, _L, _P, _F, _P, _P)),
    "native_silu_and_mul": (None, (_P, _L, _L, _P)),
    "native_rope": (None, (*(_P, _L) * 3, _P, _L, _P, _P, *(_L,) * 4, _P, _P, _P)),
    "native_attention": (_I, (_P, _P, _P, *(_L,) * 4, _P, _L, _P, _L, _L, _P, _P, _P, _L, _F, _P)),
}

log = logging.getLogger("linocut.kernels")

_library: ctypes.CDLL | None = None
_tried = False


def load_native(cache: Path) -> bool:
    """Whether this process has the kernels; the first call compiles them into the folder `cache`, or finds them there.

    Takes a second on the first start of a machine. `CC` names another compiler.
    """
    global _library, _tried
    if not _tried:
        _tried = True
        if instructions() in _INSTRUCTIONS and (gomp := _openmp()) is not None:
            try:
                # What the kernels need of OpenMP is torch's own.
                ctypes.CDLL(gomp, mode=ctypes.RTLD_GLOBAL)
                _library = _typed(ctypes.CDLL(str(_compiled(cache))))
            except (OSError, subprocess.SubprocessError, AttributeError) as error:
                log.info("no native kernels, torch's serve: %s", error)
    return _library is not None


def instructions() -> str:
    """What torch uses of this CPU ("AVX2", "AVX512"; ATEN_CPU_CAPABILITY bounds it), and so do the kernels."""
    return torch.backends.cpu.get_cpu_capability()


def multiplies_integers() -> bool:
    """Whether the kernels have products of 8-bit integers here: with AVX-512 these are written for VNNI."""
    return instructions() == "AVX2" or (instructions() == "AVX512" and bool(torch.cpu._is_vnni_supported()))


def library() -> ctypes.CDLL:
    """Of a process where `load_native` was true."""
    assert _library is not None, "load_native first"
    return _library


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can read these as they are, but for what each of them asks of shapes."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def _openmp() -> str | None:
    """The OpenMP library that torch has loaded, as far as it speaks GCC's language; its own before another one."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = {line.split()[-1] for line in lines if "/libgomp" in line}
    own = str(Path(torch.__file__).parent)
    return max(found, key=lambda path: path.startswith(own), default=None)


def _compiled(cache: Path) -> Path:
    """The shared library, named after what it is made of. Raises OSError or SubprocessError."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    sources = sorted(SOURCES.glob("*.c"))
    texts = b"".join(path.read_bytes() for path in [*sorted(SOURCES.glob("*.h")), *sources])
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    flags = [*_FLAGS, *_INSTRUCTIONS[instructions()]]
    digest = hashlib.sha256(texts + version + " ".join(flags).encode()).hexdigest()
    made = cache / f"native-{digest[:16]}.so"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that of several processes each finds a whole file or none.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            objects = [Path(folder) / f"{path.stem}.o" for path in sources]
            for path, target in zip(sources, objects, strict=True):
                _run([compiler, *flags, "-c", str(path), "-o", str(target)])
            # Without -fopenmp, which would name another OpenMP library than torch's.
            _run([compiler, "-shared", *map(str, objects), "-o", f"{folder}/native.so", "-lm"])
            os.replace(f"{folder}/native.so", made)
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
