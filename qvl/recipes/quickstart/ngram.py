"""What counting can do: n-gram models of bytes, the yardsticks of the small language model."""

import math
from collections import Counter


class ByteNgram:
    """Interpolated n-gram of bytes with Witten-Bell smoothing: each context trusts itself as far as it repeats itself."""

    def __init__(self, order: int, text: bytes) -> None:
        if order < 1:
            raise ValueError(f"order is {order}; expected 1 (single bytes) or more.")
        self.order = order
        self.follow: list[dict[bytes, Counter[int]]] = [{} for _ in range(order)]
        for length in range(order):
            table = self.follow[length]
            for at in range(length, len(text)):
                table.setdefault(text[at - length : at], Counter())[text[at]] += 1

    def probability(self, context: bytes, byte: int) -> float:
        p = 1 / 256
        for length in range(min(self.order, len(context) + 1)):
            counts = self.follow[length].get(context[len(context) - length :])
            if counts is None:
                break
            total, kinds = counts.total(), len(counts)
            p = (counts[byte] + kinds * p) / (total + kinds)
        return p

    def bits_per_byte(self, text: bytes) -> float:
        """Mean over the bytes of `text`, each given those before it."""
        reach = self.order - 1
        bits = (-math.log2(self.probability(text[max(0, i - reach) : i], byte)) for i, byte in enumerate(text))
        return math.fsum(bits) / len(text)
