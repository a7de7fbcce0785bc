"""What ways of dividing a model among ranks cost, by formula."""


def ring_bytes(rows: int, seq_len: int, width: int, layers: int, ranks: int, itemsize: int = 4) -> int:
    """Bytes a rank sends for one micro-batch."""
    return layers * rows * (seq_len // ranks) * width * (ranks - 1) * (4 * itemsize + 8)
