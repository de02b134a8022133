"""Operations of the TwoTower drafter, one folder each: `reference.py` says what is computed, callers use `op.py`."""
