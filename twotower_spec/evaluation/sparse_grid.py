"""Times of which not every batch size has the same numbers."""

from __future__ import annotations

from twotower_spec.evaluation.uncertainty import Draws, Grid


class SparseGrid(Grid):
    """As `Grid`, but a batch size without times on both sides of the second number is passed over.

    Batches that ran empty have been seen at some sizes with some numbers of drafts alone.
    """

    def at(self, batch_size: float, x: float) -> Draws:
        """See `Grid.at`."""
        reaching = {size: row for size, row in self.rows.items() if min(row) <= x <= max(row)}
        if not reaching or not min(reaching) <= batch_size <= max(reaching):
            return super().at(batch_size, x)  # says what is missing
        places = {(size, place): draws for size, row in reaching.items() for place, draws in row.items()}
        return Grid(self.what, self.axis, places).at(batch_size, x)
