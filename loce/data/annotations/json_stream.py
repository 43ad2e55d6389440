"""Incremental JSON reader: the members of an object and the elements of an array, with a small part in memory.

For files that are one object whose large members are arrays, as annotation files are, or one array, as results are.
Python's own parser reads whole pieces of an array; where a value does not end within what is held, more is read and it
is tried again.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

BLOCK = 1 << 22  # bytes read at a time
_SPACE = re.compile(r"[ \t\n\r]*")
_LITERAL = 16  # characters; more than the parser looks at before it calls a literal, a number or an escape wrong


class JsonStream:
    """The value in `file`. What is wrong is a json.JSONDecodeError or a UnicodeDecodeError: `place` says where.

    offset: bytes read.
    """

    def __init__(self, file: BinaryIO, block: int = BLOCK) -> None:
        self.offset = 0
        self._file, self._decoder, self._block = file, json.JSONDecoder(), block
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0  # what is held, and how much of it is done
        self._characters, self._lines = 0, 0  # of what was held before
        self._single = 0  # up to this character of the file elements are read one by one
        self._ended = False

    def members(self) -> Iterator[tuple[str, Any]]:
        """(key, value) in file order; of an array `elements`, which have to be used up before the next member."""
        self._pass("{", "Expecting value")
        if self.peek() == "}":
            self._at += 1
        else:
            following = ","
            while following == ",":
                if self.peek() != '"':
                    raise self._error("Expecting property name enclosed in double quotes")
                key = self.value()
                self._pass(":", "Expecting ':' delimiter")
                yield key, self.elements() if self.peek() == "[" else self.value()
                following = self._pass(",}", "Expecting ',' delimiter")
        self.end()

    def elements(self) -> Iterator[list[Any]]:
        """The elements of the array that begins here, in order, as many at a time as are held."""
        self._pass("[", "Expecting value")
        if self.peek() == "]":
            self._at += 1
            return
        following = ","
        while following == ",":
            self.peek()
            yield self._held_objects() or [self.value()]
            following = self._pass(",]", "Expecting ',' delimiter")

    def end(self) -> None:
        """Raises where something follows."""
        if self.peek():
            raise self._error("Extra data")

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos + _LITERAL >= len(self._text) or "Unterminated" in error.msg
                if self._ended or not cut:
                    raise
            else:
                # A number may go on, also after "1.", "1e" or "1e+".
                if end + 2 < len(self._text) or self._ended or self._text[end - 1] in '}]"':
                    self._at = end
                    return value
            self._read_on()

    def place(self, error: json.JSONDecodeError) -> tuple[int, int, int]:
        """(line from 1, character from 0, characters until the end but for spaces) of an error in what is held."""
        line = self._lines + error.doc.count("\n", 0, error.pos) + 1
        character = self._characters + error.pos
        total = self._characters + len(self._text.rstrip())
        while not self._ended:
            self._at = len(self._text)
            self._read_on()
            if self._text.strip():
                total = self._characters + len(self._text.rstrip())
        return line, character, max(0, total - character)

    def _held_objects(self) -> list[Any]:
        """The held elements up to the last one, or to the array's end, parsed at once; [] where there is no such part.

            held      {"a": 1}, {"a": 2}, {"a"      the block ends within the third element
            parsed    [{"a": 1}, {"a": 2}]          the text before the last "}, {", between two brackets
            left      , {"a"                        the next block is appended to it
        Where the array ends in the held text, its own bracket ends the parsing.
        """
        cut = self._last_border()
        if self._characters + cut <= max(self._single, self._characters + self._at):
            return []
        try:
            found, end = self._decoder.raw_decode(f"[{self._text[self._at : cut]}]")
        except json.JSONDecodeError:  # cut inside an element, or an error: `value` finds its place
            self._single = self._characters + cut
            return []
        self._at += end - 2  # of the two brackets one is put before, the other is still to be passed
        return list(found)

    def _last_border(self) -> int:
        """Where the text before the last "}, {" ends, 0 where there is none."""
        start = len(self._text)
        while (start := self._text.rfind("{", self._at + 1, start)) > 0:
            before = self._text[max(self._at, start - 64) : start].rstrip()
            if before.endswith(",") and before[:-1].rstrip().endswith("}"):
                return self._text.rindex(",", self._at, start)
        return 0

    def _pass(self, wanted: str, message: str) -> str:
        """Go past the next character, which must be one of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            raise self._error(message)
        self._at += 1
        return found

    def _error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._at)

    def _read_on(self) -> None:
        """Forget what is done and read a block; of a value that is larger than one, as much again as is held."""
        self._characters, self._lines = self._characters + self._at, self._lines + self._text.count("\n", 0, self._at)
        held = self._text[self._at :]
        block = self._file.read(max(self._block, len(held)))
        kept = len(self._utf8.getstate()[0])
        try:
            self._text, self._at = held + self._utf8.decode(block, final=not block), 0
        except UnicodeDecodeError as error:
            error.start += self.offset - kept  # in the file, not in the block
            raise
        self.offset += len(block)
        self._ended = not block
