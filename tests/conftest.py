"""What must stand before torch, Triton and Ray are imported, and the golden folders."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Two engines on one machine must not spin for each other's cores; tiny models gain nothing from more threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 4)))
# Ray listens on all addresses: nobody else may use a cluster of the tests, nor is anybody told of it.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
# Triton reads this when it is imported, which transformers may do before the kernels' tests are collected.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# No wall clock decides a test, and a run tells the same each time. `--hypothesis-profile=explore` looks further.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=_SLOW)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tiny checkpoints, and what the original code of each family computes with them (README.md there)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def ray_files() -> Iterator[None]:
    """All that Ray writes is removed, and is not what `ray` finds on this machine meanwhile."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        yield
