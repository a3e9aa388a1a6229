"""What trains, as a run begins."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from linocut.engine.errors import ConfigError

from .adapter import DRAFT_PREFIX, load_adapter, new_adapter, new_draft_head, new_mask_embedding
from .backbone import DecoderWeights, load_decoder
from .network import FULL_PREFIX
from .settings import AdaptSettings


def initial_tensors(settings: AdaptSettings, decoder: DecoderWeights) -> dict[str, dict[str, Tensor]]:
    """What trains, by group and name, as the run begins. Raises ConfigError if init_adapter does not fit."""
    s, generator = settings, torch.Generator().manual_seed(settings.seed)
    tensors = new_mask_embedding(decoder)
    if s.mode == "full":
        source = load_decoder(Path(s.base), torch.float32, torch.device("cpu"))
        tensors |= {f"{FULL_PREFIX}{name}": tensor for name, tensor in source.named().items()}
    else:
        tensors |= new_adapter(decoder.backbone, s.rank, generator)
    if s.draft_head:
        tensors |= new_draft_head(decoder.backbone.hidden, generator)
    if s.init_adapter is not None:
        for name, tensor in load_adapter(Path(s.init_adapter), s.scale).items():
            if name.startswith(DRAFT_PREFIX) and not s.draft_head:
                continue
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ConfigError(f"init_adapter's {name} {tuple(tensor.shape)} does not fit these settings")
            tensors[name] = tensor
    draft = {name: tensor for name, tensor in tensors.items() if name.startswith(DRAFT_PREFIX)}
    return {"main": {n: t for n, t in tensors.items() if n not in draft}, "draft": draft}
