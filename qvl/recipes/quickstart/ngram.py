"""What counting can do: n-gram models of bytes, the yardsticks of the small language model."""

import math
from collections import Counter, defaultdict


class KneserNey:
    """Interpolated n-gram of bytes with absolute discounting; shorter contexts count in how many surroundings a byte was met, not how
    often (Kneser and Ney 1995, in Chen and Goodman's interpolated form)."""

    def __init__(self, order: int, text: bytes, *, discount: float = 0.75) -> None:
        if order < 2 or not 0 < discount < 1:
            raise ValueError(
                f"order is {order} and discount {discount}; expected an order of 2 or more, a discount between 0 and 1."
            )
        self.order, self.discount = order, discount
        grams = Counter(text[at : at + order] for at in range(len(text) - order + 1))
        self.follow: list[dict[bytes, Counter[int]]] = []
        for length in reversed(range(1, order + 1)):
            table: dict[bytes, Counter[int]] = defaultdict(Counter)
            for gram, count in grams.items():
                table[gram[:-1]][gram[-1]] += count
            self.follow.insert(0, table)
            # One for each kind of byte that a shorter run was met behind.
            grams = Counter(gram[1:] for gram in grams) if length > 1 else Counter()

    def probability(self, context: bytes, byte: int) -> float:
        p = 1 / 256
        for length in range(min(self.order, len(context) + 1)):
            counts = self.follow[length].get(context[len(context) - length :])
            if counts is None:
                break
            total = counts.total()
            p = max(counts[byte] - self.discount, 0) / total + self.discount * len(counts) / total * p
        return p

    def bits_per_byte(self, text: bytes) -> float:
        """Mean over the bytes of `text`, each given those before it."""
        reach = self.order - 1
        bits = (-math.log2(self.probability(text[max(0, i - reach) : i], byte)) for i, byte in enumerate(text))
        return math.fsum(bits) / len(text)
