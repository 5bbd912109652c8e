"""An answer parted into thought, words and tool calls while it comes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from qvl.engine.text import overlap
from qvl.prompt.answer import CALL_HEAD, MARKS, read_call
from qvl.prompt.message import ToolCall
from qvl.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Thought:
    text: str


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class CallStart:
    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str


Delta = Thought | Words | CallStart | CallArguments


def marks_of(tokenizer: Tokenizer) -> dict[int, str]:
    """The ids that open and close thoughts and calls."""
    return {tokenizer.control_id(mark): mark for mark in MARKS if tokenizer.has_control(mark)}


@dataclass
class Splitter:
    """One answer. The joined deltas are the message, however the text was cut on its way; a reply in one piece is joined from them too.

    Agrees with qvl.prompt.answer.parse_answer but for a call that breaks off after its arguments began: these are out already, so it
    stays a call, with `problems` saying so.
    """

    marks: Mapping[int, str]
    in_thought: bool = False
    reads_calls: bool = True
    most_calls: int | None = None
    """What comes beyond is left out (parallel_tool_calls false)."""
    problems: list[str] = field(default_factory=list)
    num_calls: int = 0
    is_cut: bool = False
    """The answer ended inside a call that is out already and not left out, whose arguments are no JSON therefore."""
    _awaited: list[str] = field(default_factory=list)
    _text: str = ""
    """Came, and not yet known to be all before the awaited mark."""
    _is_start: bool = True
    """Nothing but blanks so far: a thought may still open itself."""
    _has_opened: bool = False
    _after_thought: bool = False
    _held: str = ""
    """Line breaks or blanks that may be the template's own."""
    _call: "_Call | None" = None

    def push(self, token: int, text: str) -> list[Delta]:
        """`text` is what became safe to show with this token; a mark's name comes in it, at once or later."""
        if token in self.marks:
            self._awaited.append(self.marks[token])
        self._text += text
        return self._wanted(self._pieces())

    def end(self) -> list[Delta]:
        deltas = list(self._plain(self._text))
        self._text = ""
        if self._call is not None:
            call, self._call = self._call, None
            self.problems.append("The answer ends inside a tool call.")
            self.is_cut = call.is_out and self._keeps(call.index)
            if not call.is_out:
                deltas += self._words("<tool_call>" + call.body)
        if self.in_thought:
            deltas += self._thought_end()
        elif not (self._is_start and self.num_calls):
            deltas.append(Words(self._held))
            self._held = ""
        return self._wanted(delta for delta in deltas if isinstance(delta, CallStart) or delta.text)

    def _wanted(self, deltas: Iterable[Delta]) -> list[Delta]:
        return [d for d in deltas if not isinstance(d, CallStart | CallArguments) or self._keeps(d.index)]

    def _keeps(self, call: int) -> bool:
        return self.most_calls is None or call < self.most_calls

    def _pieces(self) -> Iterator[Delta]:
        while self._awaited:
            mark = self._awaited[0]
            at = self._text.find(mark)
            if at < 0:
                break
            before, self._text = self._text[:at], self._text[at + len(mark) :]
            self._awaited.pop(0)
            yield from self._plain(before)
            yield from self._mark(mark)
        keep = max((overlap(self._text, mark) for mark in self._awaited[:1]), default=0)
        cut = len(self._text) - keep
        text, self._text = self._text[:cut], self._text[cut:]
        yield from self._plain(text)

    def _plain(self, text: str) -> Iterator[Delta]:
        if not text:
            return
        if self._call is not None:
            yield from self._call.push(text, self)
        elif self.in_thought:
            yield from self._thought(text)
        else:
            yield from self._words(text)

    def _thought(self, text: str) -> Iterator[Delta]:
        # Line breaks at both ends of a thought are the template's.
        text = self._held + text
        if self._is_start and not text.strip():
            self._held = text
            return
        text = text.lstrip("\n") if self._is_start else text
        self._is_start = False
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        if shown:
            yield Thought(shown)

    def _thought_end(self) -> list[Delta]:
        text = self._held.strip("\n") if self._is_start else ""
        self._held = ""
        return [Thought(text)] if text else []

    def _words(self, text: str) -> Iterator[Delta]:
        if self._after_thought:
            text = text.lstrip("\n")
            self._after_thought = not text
        text = self._held + text
        # Blanks alone are no words where a call follows; one line break before a call is the template's.
        if self._is_start and not text.strip():
            self._held = text
            return
        self._is_start = False
        shown = text.removesuffix("\n")
        self._held = text[len(shown) :]
        if shown:
            yield Words(shown)

    def _mark(self, mark: str) -> Iterator[Delta]:
        if self._call is not None:
            if mark == "</tool_call>":
                call, self._call = self._call, None
                yield from call.close(self)
            else:
                yield from self._call.push(mark, self)
        elif mark == "<think>" and self._is_start and not self._has_opened and not self.num_calls:
            self.in_thought = self._has_opened = True
            self._held = ""
        elif self.in_thought and mark == "</think>":
            yield from self._thought_end()
            self.in_thought, self._after_thought, self._is_start, self._has_opened = False, True, True, True
        elif self.in_thought:
            yield from self._thought(mark)
        elif mark == "<tool_call>" and self.reads_calls:
            self._call = _Call()
        else:
            yield from self._words(mark)


@dataclass
class _Call:
    """From <tool_call> on. Its name and arguments go out as soon as its head can be read."""

    body: str = ""
    is_out: bool = False
    index: int = 0
    _sent: int = 0
    _depth: int = 0
    _in_string: bool = False
    _is_escaped: bool = False
    _is_whole: bool = False

    def push(self, text: str, owner: Splitter) -> Iterator[Delta]:
        self.body += text
        if not self.is_out:
            head = CALL_HEAD.match(self.body)
            if head is None or not self.body[head.end() :].startswith("{") or not (name := _name(head[1])):
                return
            yield from self._open(name, owner)
            self._sent = head.end()
        yield from self._arguments()

    def close(self, owner: Splitter) -> Iterator[Delta]:
        call = read_call(self.body)
        if self.is_out:
            if not isinstance(call, ToolCall):
                owner.problems.append(call)
            return
        if isinstance(call, ToolCall):
            assert isinstance(call.arguments, str)
            yield from self._open(call.name, owner)
            yield CallArguments(self.index, call.arguments)
            return
        owner.problems.append(call)
        yield from owner._words("<tool_call>" + self.body + "</tool_call>")

    def _open(self, name: str, owner: Splitter) -> Iterator[Delta]:
        self.is_out, self.index = True, owner.num_calls
        owner.num_calls += 1
        owner._held = owner._held.removesuffix("\n")
        yield CallStart(self.index, name)

    def _arguments(self) -> Iterator[Delta]:
        """As much of the arguments as came: up to the brace that closes them."""
        start = self._sent
        while self._sent < len(self.body) and not self._is_whole:
            letter = self.body[self._sent]
            self._sent += 1
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                self._is_whole = self._depth == 0
        if self._sent > start:
            yield CallArguments(self.index, self.body[start : self._sent])


def _name(text: str) -> str | None:
    call = read_call(f'{{"name": {text}, "arguments": {{}}}}')
    return call.name if isinstance(call, ToolCall) else None
