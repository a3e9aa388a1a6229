"""A vocabulary that is shared out among ranks: each holds the rows of the embedding and of the head for its own ids.

(Vocabulary parallelism of Megatron-LM, arXiv 1909.08053, section 3; there it ends in a loss, here in statistics.)
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.functional import embedding

from linocut.kernels.statistics import VocabPartials

from .ranks import Ranks

# Noise is made for groups of four ids.
_GROUP = 4


class VocabShare:
    """Rank r holds the ids [start, start + held) out of `vocab`, as `width` rows of a table or columns of logits.

    All ranks have the same width; what the last one has too many belongs to no id: zeros in a table, -inf in logits.
    A rank that is alone holds the vocabulary as it is.
    """

    def __init__(self, vocab: int, ranks: Ranks) -> None:
        self.vocab, self.ranks = vocab, ranks
        self.width = vocab if ranks.size == 1 else -(-vocab // (_GROUP * ranks.size)) * _GROUP
        self.start = min(ranks.rank * self.width, vocab)
        self.held = min(self.width, vocab - self.start)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Places of `ids` in this rank's share, 0 for those of another one, and which are its own (bool)."""
        places = ids - self.start
        inside = (places >= 0) & (places < self.held)
        return torch.where(inside, places, 0), inside

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of the embedding. ids: [...]; table: [width, hidden], this rank's. Returns [..., hidden]."""
        if self.ranks.size == 1:
            return embedding(ids, table)
        places, inside = self.own(ids)
        return self.ranks.sum(embedding(places, table).masked_fill_(~inside[..., None], 0.0))

    def scores(self, hidden: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        """Logits of a few ids. hidden: [rows, hidden]; ids: [rows, K]; table: [width, hidden]. Returns [rows, K]."""
        if self.ranks.size == 1:
            return torch.einsum("rd,rkd->rk", hidden, table[ids])
        places, inside = self.own(ids)
        found = torch.einsum("rd,rkd->rk", hidden, table[places])
        return self.ranks.sum(found.masked_fill_(~inside, 0.0))

    def fill(self, logits: Tensor) -> Tensor:
        """`logits` ([rows, width]), where those of no id are now -inf."""
        if self.held < self.width:
            logits[:, self.held :] = -torch.inf
        return logits

    def spread(self, ids: Tensor, values: Tensor) -> Tensor:
        """Logits [rows, width] of this rank that are `values` at `ids` (both [rows, K]) and -inf elsewhere."""
        places, inside = self.own(ids)
        # The last column takes those of other ranks.
        spread = values.new_full((ids.shape[0], self.width + 1), -torch.inf)
        return spread.scatter_(1, torch.where(inside, places, self.width), values)[:, : self.width]

    def whole(self, logits: Tensor) -> Tensor:
        """[rows, width] of each rank -> [rows, vocab] of all, in the same dtype."""
        if self.ranks.size == 1:
            return logits
        found = self.ranks.gather(logits)  # [ranks, rows, width]
        return found.transpose(0, 1).flatten(1)[:, : self.vocab]

    def join(self, partials: VocabPartials) -> VocabPartials:
        """Every rank's slices, in vocabulary order: numbers of each row travel, its logits stay where they are."""
        if self.ranks.size == 1:
            return partials
        given = {f.name: value for f in fields(partials) if (value := getattr(partials, f.name)) is not None}
        slices = partials.maximum.shape[0]
        # One message: ids fit 32 bits.
        words = [v.int() if v.dtype == torch.int64 else v.view(torch.int32) for v in given.values()]
        sent = torch.cat([word.reshape(slices, -1) for word in words], dim=1)
        found = self.ranks.gather(sent).flatten(0, 1)  # [slices of all ranks, numbers]
        joined = {}
        for (name, value), part in zip(given.items(), found.split([w[0].numel() for w in words], dim=1), strict=True):
            part = part.contiguous().view(-1, *value.shape[1:])
            joined[name] = part.long() if value.dtype == torch.int64 else part.view(torch.float32)
        return VocabPartials(**joined)

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` best logits of each row, best first, and their ids (int64): [rows, count] both."""
        values, ids = logits.topk(min(count, logits.shape[1]), dim=1)
        if self.ranks.size == 1:
            return values, ids
        values = self.ranks.gather(values).transpose(0, 1).flatten(1)
        ids = self.ranks.gather(ids + self.start).transpose(0, 1).flatten(1)
        values, best = values.topk(count, dim=1)
        return values, ids.gather(1, best)

    def log_total(self, logits: Tensor) -> Tensor:
        """[rows] float32: the log of the sum of exp(logit) over the whole vocabulary."""
        mine = logits.float().logsumexp(1)
        return mine if self.ranks.size == 1 else self.ranks.gather(mine).logsumexp(0)

    def softmax(self, logits: Tensor) -> Tensor:
        """[rows, width] float32: probabilities of this rank's ids; over all ranks they sum to one."""
        if self.ranks.size == 1:
            return torch.softmax(logits.float(), dim=-1)
        return torch.exp(logits.float() - self.log_total(logits)[:, None])
