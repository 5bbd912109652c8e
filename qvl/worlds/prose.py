"""Made-up prose: plain English sentences from a small grammar, hay for needles where no real text is given."""

from numpy.random import Generator

WHO = (
    "the miller", "a traveller", "the old clerk", "her brother", "the captain", "a neighbour", "the teacher", "one of the children",
    "the gardener", "a quiet stranger", "the baker's son", "my aunt", "the night porter", "a young painter", "the mayor", "nobody",
)  # fmt: skip
DID = (
    "walked past", "looked for", "remembered", "wrote about", "asked after", "waited near", "spoke of", "returned to",
    "kept away from", "dreamed of", "drew a map of", "had heard of", "paid for", "forgot", "measured", "took care of",
)  # fmt: skip
WHAT = (
    "the harbour", "an empty house", "the narrow bridge", "three letters", "the last train", "a field of barley", "the long winter",
    "the market", "some broken tools", "the school by the river", "an unpaid bill", "the road to the coast", "a song", "the clock tower",
    "the missing page", "two sacks of flour",
)  # fmt: skip
WHEN = (
    "before dawn", "on the second day", "when the rain stopped", "every evening", "in the spring", "after the meeting",
    "without a word", "for the third time", "as the bells rang", "a week later", "until it grew dark", "against all advice",
)  # fmt: skip
LINKS = ("and", "but", "while", "because", "so")


def sentence(random: Generator) -> str:
    """Six to about twenty words; no colours, no tags."""
    who, did, what, when = (words[random.integers(len(words))] for words in (WHO, DID, WHAT, WHEN))
    text = f"{who} {did} {what} {when}"
    if random.integers(3) == 0:
        link, who, did, what = (words[random.integers(len(words))] for words in (LINKS, WHO, DID, WHAT))
        text = f"{text}, {link} {who} {did} {what}"
    return text[0].upper() + text[1:] + "."
