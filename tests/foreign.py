"""The tiny Gemma as other tools leave it: another chat template, tokens of its own, more stop ids, no contract."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from gemma_ft.build.contract import contract_of
from gemma_ft.build.pretrained import load_model
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer

TINY = Path(__file__).resolve().parents[1] / "data" / "gemma-tiny"
TOKENS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
IM_END, EOT = 2049, 2052
MODEL_TURN = "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML with BOS, stripped": "{{ bos_token }}" + CHATML.replace("message['content']", "message['content'] | trim"),
    "ChatML with a default": "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are \"kind\" and **brief**.<|im_end|>\n' }}{% endif %}" + CHATML,
    "Llama 3's headers": "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>'"
    " + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # As google/gemma-2-2b-it writes them: no system turn.
    "Gemma's turns, system refused": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}" + MODEL_TURN,
    "Gemma's turns, system folded with a blank": "{{ bos_token }}{% set first = '' %}{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim + ' ' %}"
    "{% set turns = messages[1:] %}{% endif %}{% for m in turns %}{{ '<start_of_turn>'"
    " + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '')"
    " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}" + MODEL_TURN,
    "Gemma's turns, a system turn": "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>'"
    " + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}" + MODEL_TURN,
    "Gemma's turns, system left out": "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content']"
    " + '<end_of_turn>\n' }}{% endfor %}" + MODEL_TURN,
}  # fmt: skip


def foreign_tokenizer(template: Any = CHATML, eos: str = "<eos>") -> Any:
    """The tiny tokenizer with TOKENS (2048 and up) and another chat template."""
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in TOKENS])
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    return tokenizer


def save_foreign(folder: Path, template: str = CHATML, *, eos: str = "<|im_end|>", stop_ids: Any = (1, IM_END)) -> Path:
    """The tiny Gemma with five more rows and the tokenizer of `foreign_tokenizer`; stop_ids None: no
    generation_config.json.
    """
    folder.mkdir(parents=True)
    weights = load_file(TINY / "model.safetensors")
    name = "model.embed_tokens.weight"
    rows = 0.05 * torch.randn(len(TOKENS), weights[name].shape[1], generator=torch.Generator().manual_seed(0))
    weights[name] = torch.cat((weights[name], rows.to(weights[name].dtype)))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(weights[name])}), encoding="utf-8")
    if stop_ids is not None:
        generation = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": list(stop_ids), "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    foreign_tokenizer(template, eos).save_pretrained(str(folder))
    copyfile(TINY / "tokenizer.model", folder / "tokenizer.model")
    return folder


def save_foreign_adapter(folder: Path, base: Path, template: str | None = None, *, contract: bool = False) -> Path:
    """A LoRA adapter on a base by stock PEFT, with a tokenizer of its own where it has a template, or as our training
    leaves one (system turns are left out).
    """
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_model(base, dtype=torch.float32), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    if template is not None:
        foreign_tokenizer(template).save_pretrained(str(folder))
    if contract:
        tokenizer = load_tokenizer(str(base))
        save_tokenizer(tokenizer, folder, system_policy="drop")
        contract_of(ChatEncoder(tokenizer, "drop"), base=str(base)).write(folder)
    return folder
