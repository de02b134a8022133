"""Operations of the TwoTower drafter. Each folder is one op: `reference.py` says what it computes, `op.py` is what callers use."""
