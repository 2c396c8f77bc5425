"""A long text cut into windows that overlap, each token counted in exactly one of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a text, of which those before `new` were counted in the window before: context."""

    start: int
    new: int
    end: int


def windows(tokens: int, *, size: int, stride: int) -> list[Window]:
    """Windows of at most `size` tokens that begin every `stride` tokens: together their new tokens are all tokens, once
    each, in order. Past the first window each new token has at least `size` - `stride` tokens before it.

    With `stride` = `size` they are plain chunks; a last chunk of one token takes one from the chunk before, for BOS and
    EOS alone would teach, and ask of, a model to end at once.
    """
    assert 1 <= stride <= size, "a window moves by at least one token and leaves none out"
    found: list[Window] = []
    start = done = 0
    while done < tokens:
        found.append(Window(start, done, min(start + size, tokens)))
        start, done = start + stride, found[-1].end
    if len(found) > 1 and size > 1 and found[-1].start == found[-1].new == tokens - 1:
        before = found[-2]
        found[-2:] = [Window(before.start, before.new, tokens - 2), Window(tokens - 2, tokens - 2, tokens)]
    return found
