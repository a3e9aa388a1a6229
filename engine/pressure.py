"""How large forwards may be on a device that has run out of memory. Imports no torch."""

from __future__ import annotations

# Positions of a forward that are always allowed: with fewer a prompt would be filled in forever.
LEAST_POSITIONS = 64
# Forwards that fitted after which twice the size is tried again: what took the memory may be gone.
PROBATION = 200


class MemoryPressure:
    """Bounds the size of forwards: halved when one does not fit, doubled again after many that did.

    budget: the bound, at first what the operator allows, in whatever unit the core counts its forwards in; `least` is
    never forbidden. A single row may exceed the bound, or it would never run. failures: forwards that did not fit.
    """

    def __init__(self, budget: int, least: int) -> None:
        self._most = budget
        self._least = min(least, budget)
        self._good = 0
        self._failed_last = False
        self.budget = budget
        self.failures = 0

    def succeed(self) -> bool:
        """A forward fitted. True if larger ones may be tried from now on."""
        self._failed_last = False
        if self.budget == self._most:
            return False
        self._good += 1
        if self._good < PROBATION:
            return False
        self.budget = min(2 * self.budget, self._most)
        self._good = 0
        return True

    def fail(self, size: int) -> bool:
        """A forward of `size` did not fit. False if that was a second try of the least there is: its row has to go."""
        again, self._failed_last = self._failed_last, True
        self.failures += 1
        self._good = 0
        if again and (size > self.budget or self.budget == self._least):
            # Whether the other rows fit is another question.
            self.budget = self._most
            return False
        self.budget = max(min(size, self.budget) // 2, self._least)
        return True
