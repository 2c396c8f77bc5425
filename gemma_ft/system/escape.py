"""Text of a model -> text that a terminal only shows: nothing in it moves the cursor, colours, asks or hides.

Source: ECMA-48 sections 5.3 to 5.6 (control functions, control sequences, control strings); UAX 9 section 2 (the
explicit directions with which text can be shown in another order than it has).
"""

from __future__ import annotations

ESC, BEL, CAN, SUB = "\x1b", "\x07", "\x18", "\x1a"
KEPT = "\n\t"
STRING_OPENERS = "]PX^_"  # after ESC: OSC, DCS, SOS, PM, APC; a text follows that the terminal keeps to itself
C1_STRINGS = "\x9d\x90\x98\x9e\x9f"  # the same as single characters
C1_SEQUENCE, C1_END = "\x9b", "\x9c"  # CSI, ST
DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class EscapeStripper:
    """Takes terminal control out of text that comes in pieces; a sequence may be cut anywhere between them.

    Line breaks and tabs stay; other control characters, escape sequences with all that belongs to them, and characters
    that force a direction of writing go. A sequence ends at a line break at the latest: one that is never closed
    swallows no more than its line.
    """

    def __init__(self) -> None:
        self._state = self._text

    def feed(self, piece: str) -> str:
        """What of `piece` may be shown."""
        return "".join(filter(self._shown, piece))

    def _shown(self, sign: str) -> bool:
        if sign in "\n" + CAN + SUB:  # these end whatever is open
            self._state = self._text
            return sign == "\n"
        if sign == ESC:
            self._state = self._in_string_escape if self._state == self._in_string else self._after_escape
            return False
        return self._state(sign)

    def _text(self, sign: str) -> bool:
        if sign == C1_SEQUENCE:
            self._state = self._in_sequence
        elif sign in C1_STRINGS:
            self._state = self._in_string
        control = sign < " " or "\x7f" <= sign < "\xa0"
        return sign in KEPT or not (control or sign in DIRECTIONS)

    def _after_escape(self, sign: str) -> bool:
        """After ESC: the opening of a sequence or string, intermediate signs (0x20-0x2F), or the one final sign."""
        if sign == "[":
            self._state = self._in_sequence
        elif sign in STRING_OPENERS:
            self._state = self._in_string
        elif not " " <= sign <= "/":
            return self._ended(sign, final=" " <= sign <= "~")
        return False

    def _in_sequence(self, sign: str) -> bool:
        """After CSI: parameters and intermediates (0x20-0x3F), then one final sign (0x40-0x7E)."""
        return False if " " <= sign <= "?" else self._ended(sign, final="@" <= sign <= "~")

    def _in_string(self, sign: str) -> bool:
        if sign in (BEL, C1_END):
            self._state = self._text
        return False

    def _in_string_escape(self, sign: str) -> bool:
        """After ESC in a string: a backslash closes it, anything else opens a sequence of its own."""
        if sign == "\\":
            self._state = self._text
            return False
        return self._after_escape_anew(sign)

    def _after_escape_anew(self, sign: str) -> bool:
        self._state = self._after_escape
        return self._after_escape(sign)

    def _ended(self, sign: str, *, final: bool) -> bool:
        """Back to text; a sign that cannot end a sequence broke it off and is text itself."""
        self._state = self._text
        return False if final else self._text(sign)


def printable(text: str) -> str:
    """A whole text as `EscapeStripper` lets it through."""
    return EscapeStripper().feed(text)
