"""How a reward model is used, as its card says it: the input has to end where the reward is read."""

from __future__ import annotations

from gemma_ft.families.family import Family

_SCORE = """\
chat = [{{"role": "user", "content": "Hello!"}}, {{"role": "assistant", "content": "Hello! What can I do for you?"}}]
text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()  # ends at {end}
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
print(model(**inputs).logits[0, 0].item())
```
"""
_TRANSFORMERS = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}", dtype="auto")
"""
_PEFT = """```python
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoPeftModelForSequenceClassification.from_pretrained("{name}", num_labels=1)
"""


def reward_use(name: str, family: Family, *, adapter: bool) -> str:
    """The section of a card, in Markdown."""
    end = family.chat.end_of_turn
    rule = (
        f"The input must end at `{end}`: there the reward is read, in training and here. A chat template writes a line "
        "end behind it, which is taken off. The reward of an answer says something beside that of another to the "
        "same question, and little alone."
    )
    ours = f"`gemma-ft score {name} --input rows.jsonl --output scores.jsonl`"
    if family.classifier is None:
        return f"{rule}\n\n{ours}; transformers has no class for sequence classification of a {family.label}."
    code = (_PEFT if adapter else _TRANSFORMERS) + _SCORE
    return f"{rule}\n\n{code.format(name=name, end=end)}\nOr {ours}."
