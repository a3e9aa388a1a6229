"""Answers on the device: documents one after another, packed whole into rows of one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linocut.engine.errors import ConfigError

DOCUMENTS_PER_ROW = 64  # at most; more would only lengthen the search for a position's document
_WINDOW = 16384  # documents packed together: large enough to fill rows, small enough to keep the order random

Ints = NDArray[np.int64]


@dataclass
class Documents:
    """Documents one after another. tokens: [T] int32; offsets, lengths, prompt_lengths: [D] int64.

    A document is a prompt followed by its answer. `lengths` may be shorter than what is stored.
    """

    tokens: Tensor
    offsets: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Documents:
        return Documents(*(t.to(device) for t in (self.tokens, self.offsets, self.lengths, self.prompt_lengths)))


class Rows(NamedTuple):
    """A batch of packed rows, [rows, length] each.

    tokens: int64. start, end: where the position's document begins and ends in the row, int64. response: bool, the
    token belongs to an answer. filled: bool, false for padding (a document of its own, one token long).
    """

    tokens: Tensor
    start: Tensor
    end: Tensor
    response: Tensor
    filled: Tensor

    @property
    def positions(self) -> Tensor:
        """RoPE positions: each document begins at 0."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) - self.start


def load_documents(folders: list[Path], length: int) -> Documents:
    """Read folders of answers (shard-*.safetensors), cut to `length`. Raises ConfigError.

    Documents with fewer than two answer tokens within `length` are left out: nothing in them can be predicted.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("shard-*.safetensors"))]
    if not paths:
        raise ConfigError(f"no shard-*.safetensors in {', '.join(map(str, folders))}")
    tokens, lengths, prompts = [], [], []
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tokens.append(file.get_tensor("tokens").to(torch.int32))
                lengths.append(file.get_tensor("lengths").to(torch.int64))
                prompts.append(file.get_tensor("prompt_lengths").to(torch.int64))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as answers: {error}") from None
        if int(lengths[-1].sum()) != len(tokens[-1]):
            raise ConfigError(f"{path} holds {len(tokens[-1])} tokens, its lengths say {int(lengths[-1].sum())}")
    stored, prompt = torch.cat(lengths), torch.cat(prompts)
    kept = stored.clamp(max=length)
    offsets = stored.cumsum(0) - stored
    usable = kept - prompt >= 2
    if not usable.any():
        raise ConfigError(f"no document has two answer tokens within {length} tokens")
    return Documents(torch.cat(tokens), offsets[usable], kept[usable], prompt[usable])


def split_held_out(documents: Documents, count: int, seed: int) -> tuple[Ints, Ints]:
    """Document numbers to train on and to hold out: always the same ones for the same documents and seed."""
    order = np.random.default_rng(seed).permutation(len(documents)).astype(np.int64)
    count = min(count, len(documents) // 4)
    return np.sort(order[count:]), np.sort(order[:count])


def pack_rows(lengths: Ints, documents: Ints, length: int, seed: int) -> Ints:
    """Assign whole documents to rows of `length` tokens, best fit after shuffling.

    lengths: of all documents; documents: the numbers to pack. Returns [rows, DOCUMENTS_PER_ROW], document numbers
    first and -1 behind them, in random order.
    """
    random = np.random.default_rng(seed)
    shuffled = random.permutation(documents)
    rows: list[list[int]] = []
    for begin in range(0, len(shuffled), _WINDOW):
        window = shuffled[begin : begin + _WINDOW]
        _pack_window(window[np.argsort(-lengths[window], kind="stable")], lengths, length, rows)
    packed = np.full((len(rows), DOCUMENTS_PER_ROW), -1, dtype=np.int64)
    for row, members in zip(packed, rows, strict=True):
        row[: len(members)] = members
    return packed[random.permutation(len(rows))]


def _pack_window(window: Ints, lengths: Ints, length: int, rows: list[list[int]]) -> None:
    """Best fit of `window`, longest first: each document goes to the fullest row of this window that has room."""
    space: dict[int, list[int]] = {}  # free tokens -> rows
    free: list[int] = []  # the keys of `space` whose list is not empty, sorted
    for document in window.tolist():
        size = int(lengths[document])
        at = bisect_left(free, size)
        if at == len(free):
            rows.append([document])
            row, left = len(rows) - 1, length - size
        else:
            room = free[at]
            row, left = space[room].pop(), room - size
            if not space[room]:
                free.pop(at)
            rows[row].append(document)
        if left and len(rows[row]) < DOCUMENTS_PER_ROW:
            if not space.setdefault(left, []):
                insort(free, left)
            space[left].append(row)


def gather_rows(documents: Documents, numbers: Tensor, length: int) -> Rows:
    """Lay the documents `numbers` [rows, DOCUMENTS_PER_ROW] (-1: none) out as packed rows, on their device."""
    present = numbers >= 0
    sizes = torch.where(present, documents.lengths[numbers.clamp(min=0)], 0)
    ends = sizes.cumsum(1)  # [rows, documents]
    column = torch.arange(length, device=numbers.device).expand(len(numbers), length).contiguous()
    slot = torch.searchsorted(ends, column, right=True)
    filled = slot < numbers.shape[1]
    slot = slot.clamp(max=numbers.shape[1] - 1)
    number = numbers.gather(1, slot).clamp(min=0)
    end = torch.where(filled, ends.gather(1, slot), column + 1)
    start = torch.where(filled, end - sizes.gather(1, slot), column)
    offset = column - start
    tokens = documents.tokens[documents.offsets[number] + offset].long()
    response = filled & (offset >= documents.prompt_lengths[number])
    return Rows(torch.where(filled, tokens, 0), start, end, response, filled)


class Epochs:
    """The packed rows of an endless run: every epoch packs anew, with a seed of its own.

    The order is a function of (seed, cursor) alone, so a run resumes by its cursor, with any number of processes.
    """

    def __init__(self, documents: Documents, numbers: Ints, length: int, seed: int, device: torch.device) -> None:
        self._lengths: Ints = documents.lengths.cpu().numpy()
        self._numbers, self._length, self._seed, self._device = numbers, length, seed, device
        self._epoch = -1
        self._rows = torch.empty(0)
        self._sizes: Ints = np.zeros(0, dtype=np.int64)
        self.tokens = 0  # of the rows last taken

    def take(self, epoch: int, cursor: int, count: int) -> tuple[Tensor, int, int]:
        """`count` rows at (epoch, cursor) and the epoch and cursor after them; an epoch's short rest is dropped."""
        self._load(epoch)
        if cursor + count > len(self._rows) and cursor > 0:
            epoch, cursor = epoch + 1, 0
            self._load(epoch)
        if count > len(self._rows):  # a small set: repeat it
            repeats = -(-count // len(self._rows))
            self.tokens = int(np.tile(self._sizes, repeats)[:count].sum())
            return self._rows.repeat(repeats, 1)[:count], epoch + 1, 0
        self.tokens = int(self._sizes[cursor : cursor + count].sum())
        return self._rows[cursor : cursor + count], epoch, cursor + count

    def _load(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        packed = pack_rows(self._lengths, self._numbers, self._length, self._seed * 1_000_003 + epoch)
        self._sizes = np.where(packed >= 0, self._lengths[packed], 0).sum(1)
        self._rows, self._epoch = torch.from_numpy(packed).to(self._device), epoch
