"""The model card of an export, README.md: where the weights come from, what they can do, how to use them, under which
terms. It holds no path of the machine that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.build.contract import ONE_BOS, Contract
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import HUB_ID
from gemma_ft.export.card.license import License, is_tiny
from gemma_ft.export.card.reward_use import reward_use
from gemma_ft.export.card.run_record import RunRecord, figures_by_model, objects, public
from gemma_ft.export.form_names import FORMS, FormName
from gemma_ft.families.records import FAMILIES, TINY
from gemma_ft.recipe.load import names_of
from gemma_ft.recipe.schema import Recipe, Source
from gemma_ft.system.shipped import locate

# Fields of summary.json's data, and what a reader calls them.
COUNTS = (("rows", "rows"), ("tokens", "tokens"), ("trained_tokens", "trained tokens"), ("truncated", "rows cut"),
          ("dropped", "rows dropped"))  # fmt: skip

_TASKS = ("text-generation", "image-text-to-text")  # the hub's words for a text model, and for a multimodal one
_REWARD_TASK = "text-classification"
SYSTEM_TEXTS = {
    "fold": "goes before the first question, after it a blank line",
    "turn": "is a turn of its own",
    "error": "is refused",
    "drop": "is left out",
}


@dataclass(frozen=True)
class Card:
    """What a card tells of. name: a hub id, or the name of the folder; file: the GGUF file in it."""

    name: str
    form: FormName
    config: PreTrainedConfig
    contract: Contract | None
    terms: License
    record: RunRecord
    base: str | None  # as others may name it: a hub id, or the name of a folder
    file: str | None = None
    rounded_to: str | None = None  # the type that the weights were cast to after they were merged
    chats: ChatEncoder | None = None  # how it is asked, where that is known
    graft: bool = False  # it lies among the files of a multimodal original
    sealed: bool = True  # gemma_ft.json is beside it, where there is a contract
    reward: bool = False  # a reward model, which gives a number and no text

    def text(self) -> str:
        """The whole card, in Markdown with the hub's front matter."""
        title = self.name.rpartition("/")[2]
        front = yaml.safe_dump(self.front_matter(), sort_keys=False)
        sections = (
            ("Training data", self._data()),
            ("Results", self._results()),
            ("Merge certificate", self._certificate()),
            ("Use", self._use()),
            ("How chats must be served", self._contract()),
            ("Recipe", self._recipe()),
            ("Terms of use", self.terms.section),
        )
        parts = [f"---\n{front}---", f"# {title}", self._opening()]
        return "\n\n".join([*parts, *(f"## {name}\n\n{body}" for name, body in sections if body)]) + "\n"

    def front_matter(self) -> dict[str, Any]:
        """What the hub reads. A base or a data set is named there only when the hub has it."""
        found: dict[str, Any] = {}
        if self.base is not None and HUB_ID.fullmatch(self.base):
            found |= {"base_model": self.base, "base_model_relation": FORMS[self.form].relation}
        found |= {
            "library_name": FORMS[self.form].library,
            "pipeline_tag": _REWARD_TASK if self.reward else _TASKS[self.graft],
        }
        if self.terms.license is not None:
            found["license"] = self.terms.license[0]
        recipe = self.record.recipe
        sources = [*recipe.data.train, *(recipe.data.eval or ())] if recipe is not None else []
        on_hub = {name for name in (source.path.partition(":")[0] for source in sources) if _is_hub_data(name)}
        if on_hub:
            found["datasets"] = sorted(on_hub)
        composite = FAMILIES[self.config.model_type].composite if self.graft else None
        kind = composite.model_type if composite is not None else self.config.model_type
        how: list[str] = [recipe.strategy] if recipe is not None else []
        how += [recipe.objective.kind] if recipe is not None and recipe.objective.rows != "answers" else []
        tags = [kind, "gemma-ft", *how]
        return {**found, "tags": tags}

    def _opening(self) -> str:
        recipe, family = self.record.recipe, FAMILIES[self.config.model_type].label
        base = f"`{self.base}`" if self.base else "fresh weights"
        ways = {"full": "all weights trained", "lora": "LoRA", "qlora": "QLoRA"}
        how = ways[recipe.strategy] + _learned(recipe) if recipe is not None else None
        what = FORMS[self.form].what + (", a reward model" if self.reward else "")
        revision = self.contract.revision if self.contract is not None else None
        lines = [
            f"{what}: {family}, tuned from {base}{f' ({how})' if how else ''} with gemma-ft."
            if self.contract is not None
            else f"{what}: {family}, {base}, written by gemma-ft.",
            f"Base revision: `{revision}`." if revision else "",
            "Its text model was tuned; its vision tower and all other files are the base's, byte for byte."
            if self.graft
            else "",
            f"{TINY} shows and tests the toolkit; it knows nothing about the world." if is_tiny(self.config) else "",
        ]
        return " ".join(line for line in lines if line)

    def _data(self) -> str:
        if self.record.recipe is None:
            return ""
        data, counts = self.record.recipe.data, (self.record.summary or {}).get("data", {})
        told = ", ".join(f"{counts[key]:,} {name}" for key, name in COUNTS if counts.get(key))
        held_out = f"{data.eval_fraction:.1%} of it" if data.eval_fraction else "none"
        if data.eval is not None:
            held_out = _names(data.eval)
        trained_on = f"`{_names(data.train)}`{': ' + told if told else ''}"
        return _table(("", ""), [("trained on", trained_on), ("held out", f"`{held_out}`")])

    def _results(self) -> str:
        models = figures_by_model(self.record.evaluation)
        if models:
            metrics = list(dict.fromkeys(metric for scores in models.values() for metric in scores))
            rows = [
                (metric, *(_figure(scores.get(metric)) for scores in models.values()), _rows_of(metric, models))
                for metric in metrics
            ]
            source = objects(self.record.evaluation, "settings", only=str).get("data")
            where = f" of `{public(source, 'rows')}`" if source else ""
            note = f"On held-out rows{where}; in brackets the 95% confidence interval.\n\n"
            return note + _table(("", *models, "rows"), rows)
        before, after = ((self.record.summary or {}).get(key) or {} for key in ("eval_before", "eval_after"))
        rows = [(key, _figure(before.get(key)), _figure(value)) for key, value in after.items() if value is not None]
        return _table(("held-out", "before", "after"), rows) if rows else ""

    def _certificate(self) -> str:
        merge = self.record.merge
        if not merge or "policy" not in merge:  # a graft of a model that was tuned as a whole
            return ""
        certificate = objects(merge, "certificate", only=object)
        rows = [("policy", merge.get("policy")), ("dtype", merge.get("dtype")),
                ("tensors changed", f"{merge.get('changed')} of {merge.get('tensors')}")]  # fmt: skip
        merged = objects(certificate, "merged", only=object)
        rows += [(key.replace("_", " "), _figure(value)) for key, value in merged.items()]
        if certificate:
            limit = objects(certificate, "limit", only=object)
            rows += [("limit", f"{limit.get('measure')} <= {limit.get('at_most')}: {limit.get('why')}"),
                     ("passed", "yes" if certificate.get("passed") else "no"),
                     ("compared on", f"{certificate.get('prompts')} prompts of {certificate.get('rows')}")]  # fmt: skip
        opening = "How far the merged model is from the trained adapter on its base, as `merge.json` says in full."
        if self.rounded_to is not None:
            opening = (
                f"Of the merged folder that these weights were made from; they were cast to {self.rounded_to} since, "
                "which is not measured here. How far that folder is from the trained adapter on its base:"
            )
        return opening + "\n\n" + _table(("", ""), rows)

    def _contract(self) -> str:
        contract, chats = self.contract if self.sealed else None, self.chats
        if contract is None and chats is None:
            return ""
        bos, system, stop_ids, template = "", "", [], ""
        opening = "As its own chat template writes them."
        if chats is not None:
            bos = ONE_BOS if chats.format.bos else "none: a chat begins with its first turn"
            system, stop_ids, template = SYSTEM_TEXTS[chats.system_policy], chats.stop_ids, chats.format.name
        if contract is not None:
            opening = (
                "As trained, and as `gemma_ft.json` says; `gemma-ft chat` and `gemma-ft serve` refuse anything else."
                if not self.reward
                else "As trained, and as `gemma_ft.json` says; `gemma-ft score` refuses anything else."
            )
            bos, system = contract.bos, SYSTEM_TEXTS[contract.system]
            stop_ids = chats.stop_ids if chats is not None else contract.stop_ids
            template = f"SHA-256 `{contract.template_sha256[:16]}...`"
        rows = [("BOS", bos), ("an answer ends at", f"token ids {', '.join(map(str, stop_ids))}"),
                ("a system turn", system), ("chat template", template)]  # fmt: skip
        return f"{opening}\n\n{_table(('', ''), rows)}"

    def _use(self) -> str:
        if self.reward:
            return reward_use(self.name, FAMILIES[self.config.model_type], adapter=self.form == "adapter")
        return USES[self.form].format(name=self.name, base=self.base, file=self.file)

    def _recipe(self) -> str:
        recipe = self.record.recipe
        if recipe is None:
            return ""
        text = yaml.safe_dump(public(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
        return f"<details><summary>The whole recipe</summary>\n\n```yaml\n{text}```\n\n</details>"


_CHAT = """\
chat = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
USES: dict[FormName, str] = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
"""
    + _CHAT
    + "\nOr `gemma-ft chat {name}`, `gemma-ft serve {name}`, `vllm serve {name}`.",
    "adapter": """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoPeftModelForCausalLM.from_pretrained("{name}")
"""
    + _CHAT
    + "\nOr `gemma-ft chat {name}`, `gemma-ft serve {name}`.",
    "gguf": "With llama.cpp: `llama-cli -m {file}`. With Ollama: `ollama create my-gemma -f Modelfile`, "
    "then `ollama run my-gemma`.",
}


def _learned(recipe: Recipe) -> str:
    """What a run learned from, and which adapter it went on from, where it was not plain answers to a fresh one."""
    start = recipe.adapter.start if recipe.adapter is not None else None
    kind = f", {recipe.objective.kind} on preferences" if recipe.objective.rows != "answers" else ""
    return kind + (f", going on from the adapter `{Path(start).name}`" if start is not None else "")


def _names(sources: Sequence[Source]) -> str:
    """What sources of rows are called, without where they lie on this machine."""
    return names_of([source.model_copy(update={"path": public(source.path, "path")}) for source in sources])


def _is_hub_data(name: str) -> bool:
    """Whether a recipe's data source is a data set of the hub: no file of the project ends so, or lies here."""
    looks_so = HUB_ID.fullmatch(name) and not name.startswith("data/") and "." not in name.rpartition("/")[2]
    return bool(looks_so) and locate(name) is None


def _rows_of(metric: str, models: dict[str, dict[str, Any]]) -> str:
    """Over how many rows the models were measured."""
    counts = (objects(one, metric, only=object).get("rows") for one in models.values())
    return next((str(count) for count in counts if count), "")


def _figure(value: Any) -> str:
    """A number, or a score with its interval, for a person."""
    if isinstance(value, dict):
        low, high = value.get("low"), value.get("high")
        interval = f" [{_figure(low)}, {_figure(high)}]" if low is not None and high is not None else ""
        return f"{_figure(value.get('value'))}{interval}"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
