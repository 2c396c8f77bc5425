"""Hypothesis strategies: texts with everything awkward in them, conversations, documents."""

from hypothesis import strategies as st

from gemma_ft.data.conversation import Conversation, PlainText, Turn

AWKWARD = (
    "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<0x0A>", "<unused0>", "model\n",
    "user\n", "\n", "\n\n\n", "  ", "\t", "<b>", "</table>", "\r\n", "é", "漢字", "🙂", "a\u0301", "\u200b", "\u2028",
)  # fmt: skip
# No NUL and no halves of surrogate pairs (refused when read), no U+2581 (SentencePiece's sign for a space).
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x00\u2581")
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(characters, max_size=8)), max_size=6).map("".join)
# Text that spells no control token, for comparison with tokenizers that would take it for one.
clean_texts = st.lists(
    st.one_of(st.sampled_from(["\n", "\n\n\n", "  ", "<b>", "</table>", "é", "漢", "x < y", "model", "user"]),
              st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\u2581<>"), max_size=8)),
    max_size=6,
).map("".join)  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn, content: st.SearchStrategy[str] = texts, system: bool = True) -> Conversation:
    turns = [Turn("system", draw(content))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(content)), Turn("assistant", draw(content))]
    return Conversation("x:1", tuple(turns))


documents = st.builds(PlainText, st.just("d:1"), texts)
