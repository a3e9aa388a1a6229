"""Parameters of all rows as two matrices, so that a step gathers two tensors and not one for each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..params import ParameterValue
from .description import ParameterInfo


@dataclass(frozen=True)
class Column:
    """Where a parameter stands. codes: of a choice of texts, its value -> its number."""

    kind: str
    index: int
    codes: dict[ParameterValue, int]


class Columns:
    """Names of all parameters of all strategies. Those of one name must be of one kind with the same texts."""

    def __init__(self, parameters: list[ParameterInfo]) -> None:
        self.of: dict[str, Column] = {}
        self.numbers = self.integers = 0
        for parameter in parameters:
            texts = [choice for choice in parameter.choices if isinstance(choice, str)]
            codes: dict[ParameterValue, int] = {text: code for code, text in enumerate(texts)}
            known = self.of.get(parameter.name)
            if known is not None:
                assert (known.kind, known.codes) == (parameter.kind, codes), f"two meanings of {parameter.name}"
                continue
            number = parameter.kind == "number"
            self.of[parameter.name] = Column(parameter.kind, self.numbers if number else self.integers, codes)
            if number:
                self.numbers += 1
            else:
                self.integers += 1

    def encode(self, rows: list[Mapping[str, ParameterValue]]) -> tuple[Tensor, Tensor]:
        """[rows, numbers] float32 and [rows, integers] int32. What a row lacks is 0, or -1 of numbers and texts."""
        absent = [0] * self.integers
        for column in self.of.values():
            if column.codes:
                absent[column.index] = -1
        numbers = [[-1.0] * self.numbers for _ in rows]
        integers = [list(absent) for _ in rows]
        for index, values in enumerate(rows):
            for name, value in values.items():
                column = self.of[name]
                if column.kind == "number":
                    numbers[index][column.index] = float(value)
                else:
                    integers[index][column.index] = column.codes[value] if column.codes else int(value)
        shape = (len(rows), self.numbers), (len(rows), self.integers)
        return torch.tensor(numbers).view(shape[0]), torch.tensor(integers, dtype=torch.int32).view(shape[1])


@dataclass
class Parameters(Mapping[str, Tensor]):
    """The matrices of `rows` rows; a name gives its column, [rows] float32, int32 or bool."""

    columns: Columns
    numbers: Tensor
    integers: Tensor

    def __getitem__(self, name: str) -> Tensor:
        column = self.columns.of[name]
        if column.kind == "number":
            return self.numbers[:, column.index]
        values = self.integers[:, column.index]
        return values != 0 if column.kind == "boolean" else values

    def __iter__(self) -> object:  # type: ignore[override]
        return iter(self.columns.of)

    def __len__(self) -> int:
        return len(self.columns.of)

    def of(self, slots: Tensor) -> Parameters:
        return Parameters(self.columns, self.numbers[slots], self.integers[slots])
