"""What each process of a generating run is to do, and on which GPU."""

from __future__ import annotations

import os

from linocut.engine.errors import ConfigError

from .answers import next_shard_number
from .generate_messages import WorkerTask
from .generate_settings import GenerateSettings


def worker_tasks(settings: GenerateSettings, model: str) -> list[WorkerTask]:
    """A task for each process of each GPU, or of this machine. Raises ConfigError for more GPUs than there are."""
    device = settings.engine.get("device", "auto")
    devices = _devices(settings) if str(device) in ("auto", "cuda") else []
    places: list[str | None] = [name for name in devices for _ in range(settings.processes or 6)]
    if not places:
        places = [None] * (settings.processes or 1)
    single = len(places) == 1
    engine = dict(settings.engine)
    if devices:
        engine["device"] = "cuda"
    running = settings.max_running or (512 if devices else 64)
    first = next_shard_number(settings.out)
    return [
        WorkerTask(
            index=index,
            model=str(settings.model),
            out=settings.out,
            engine={**engine, "max_running": running},
            visible_device=None if single else place,
            share=0.88 / (settings.processes or 6),
            first_shard=first + index,
            stride=len(places),
            metadata=answer_metadata(settings, model),
            max_tokens=settings.max_tokens,
            prompt_limit=settings.prompt_limit,
            truncated_share=settings.truncated_share,
            shard_tokens=settings.shard_tokens,
            seed=settings.seed,
            exclude=settings.exclude,
            own_process=not single,
            diffusion=dict(settings.diffusion),
        )
        for index, place in enumerate(places)
    ]


def _devices(settings: GenerateSettings) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs to use; asks without starting CUDA in this process."""
    import torch

    count = torch.cuda.device_count()
    if settings.devices is not None and settings.devices > count:
        raise ConfigError(f"{settings.devices} devices were asked for, but torch sees {count}")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible or [str(index) for index in range(count)]
    return names[: settings.devices or count]


def answer_metadata(settings: GenerateSettings, model: str) -> dict[str, str]:
    """What a shard of answers says of how they were made."""
    return {
        "model": model,
        "temperature": str(settings.temperature),
        "sampled_share": str(settings.sampled_share),
        "max_tokens": str(settings.max_tokens),
        "seed": str(settings.seed),
    }
