"""An answer parted while it comes equals the answer read when it is whole, however it was cut."""

from hypothesis import given
from hypothesis import strategies as st

from qvl.prompt.answer import parse_answer
from qvl.serve.split import CallArguments, CallStart, Delta, Splitter, Thought, Words, marks_of
from real_tokenizer import real_tokenizer

TOKENIZER = real_tokenizer()
MARKS = marks_of(TOKENIZER)
IDS = {mark: id for id, mark in MARKS.items()}
PIECES = [
    *IDS,
    *("\n", "\n\n", " ", "hello", "ü", "</think", '{"name": "f", "arguments": {"a": "}{\\""}}', "no JSON"),
    '\n{"name": "g", "arguments": {"x": [1, {"b": 2}]}}\n',
    '{"arguments": {}, "name": "h"}',
]


def joined(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    names = [d.name for d in deltas if isinstance(d, CallStart)]
    arguments = [
        "".join(d.text for d in deltas if isinstance(d, CallArguments) and d.index == i) for i in range(len(names))
    ]
    thought, words = ("".join(d.text for d in deltas if isinstance(d, kind)) for kind in (Thought, Words))
    return thought, words, list(zip(names, arguments, strict=True))


def split(
    tokens: list[int], *, in_thought: bool, cuts: list[int]
) -> tuple[tuple[str, str, list[tuple[str, str]]], Splitter]:
    """`cuts`: how many letters are held back after each token, as a possible stop string would be."""
    splitter = Splitter(MARKS, in_thought=in_thought)
    stream, held, deltas = TOKENIZER.stream(), "", []
    for number, token in enumerate(tokens):
        held += stream.push(token)
        keep = min(len(held), cuts[number % len(cuts)])
        deltas += splitter.push(token, held[: len(held) - keep])
        held = held[len(held) - keep :]
    deltas += splitter.push(-1, held + stream.end())
    deltas += splitter.end()
    return joined(deltas), splitter


def test_calls_beyond_those_wanted_are_left_out() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    splitter = Splitter(MARKS, most_calls=1)
    deltas: list[Delta] = []
    for piece in ("<tool_call>", '\n{"name": "f", "arguments": {"a": 1}}\n', "</tool_call>", "\n") * 2:
        for id in [IDS[piece]] if piece in IDS else TOKENIZER.encode_text(piece):
            deltas += splitter.push(id, piece if piece in IDS else TOKENIZER.decode([id]))
    assert joined(deltas + splitter.end())[2] == [("f", '{"a": 1}')], call


@given(
    st.lists(st.sampled_from(PIECES), max_size=9),
    st.booleans(),
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
)
def test_it_agrees_with_the_whole_answer(pieces: list[str], in_thought: bool, cuts: list[int]) -> None:
    tokens = [id for piece in pieces for id in ([IDS[piece]] if piece in IDS else TOKENIZER.encode_text(piece))]
    got, splitter = split(tokens, in_thought=in_thought, cuts=cuts)
    again, _ = split(tokens, in_thought=in_thought, cuts=[0])
    assert got == again
    whole = parse_answer(tokens, tokenizer=TOKENIZER, starts_in_thought=in_thought).message
    calls = [(call.name, str(call.arguments)) for call in whole.tool_calls]
    if not splitter.problems:
        assert got == (whole.thinking or "", whole.text, calls)


def test_a_call_that_breaks_off_stays_a_call_and_says_so() -> None:
    tokens = [IDS["<tool_call>"], *TOKENIZER.encode_text('\n{"name": "f", "arguments": {"a": 1')]
    (thought, words, calls), splitter = split(tokens, in_thought=False, cuts=[0])
    assert (thought, words, calls) == ("", "", [("f", '{"a": 1')])
    assert splitter.problems == ["The answer ends inside a tool call."] and splitter.is_cut
    assert not split([*tokens, IDS["</tool_call>"]], in_thought=False, cuts=[0])[1].is_cut


def test_a_call_that_is_left_out_cuts_nothing() -> None:
    whole = [IDS["<tool_call>"], *TOKENIZER.encode_text('{"name": "f", "arguments": {}}'), IDS["</tool_call>"]]
    broken = [IDS["<tool_call>"], *TOKENIZER.encode_text('{"name": "g", "arguments": {"a": 1')]
    for most, is_cut in ((1, False), (2, True), (None, True)):
        splitter = Splitter(MARKS, most_calls=most)
        for token in whole + broken:
            splitter.push(token, TOKENIZER.decode([token]))
        splitter.end()
        assert splitter.is_cut is is_cut


def test_marks_spelled_in_letters_are_words() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call></think>'
    (thought, words, calls), _ = split(TOKENIZER.encode_text(text), in_thought=False, cuts=[0])
    assert (thought, words, calls) == ("", text, [])


def test_without_tools_a_call_is_text() -> None:
    splitter = Splitter(MARKS, reads_calls=False)
    tokens = [IDS["<tool_call>"], *TOKENIZER.encode_text("x"), IDS["</tool_call>"]]
    deltas = [d for token in tokens for d in splitter.push(token, TOKENIZER.decode([token]))] + splitter.end()
    assert joined(deltas) == ("", "<tool_call>x</tool_call>", [])
