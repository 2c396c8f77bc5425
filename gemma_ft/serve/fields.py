"""Fields that clients send and this server does not do, each with what asks for nothing: of OpenAI's API, and of vLLM's
and llama.cpp's, whose words clients send to any server.

A tuple holds values: these ask for nothing, every other value is refused. A type: whatever its value of that type, the
field changes no text here. `float` is any number, `object` anything.

Source: openai 3.57's types of request parameters; vLLM's vllm/entrypoints/openai/*/protocol.py; llama.cpp's
tools/server/server-schema.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_ft.data.conversation import kind_of

Harmless = tuple[Any, ...] | type
Table = Mapping[str, Harmless]

OPENAI: Table = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
    "metadata": dict,
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({}, []),  # llama.cpp's form is a list
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": bool,  # of tools, which are refused
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
VLLM: Table = {
    "session_id": str,
    "cache_salt": str,  # no two requests share a cache here
    "include_reasoning": bool,  # there is none to leave out
    "return_mm_kwargs": bool,
    "spaces_between_special_tokens": bool,  # none is in an answer
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "watermarking": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "documents": ([],),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}),
    "enable_thinking": (False,),
    "thinking": ({"type": "disabled"},),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
    "priority": (0,),
    "stream_interval": (1,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "routed_experts_prompt_start": (0,),
    **dict.fromkeys(
        ("prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "truncate_prompt_tokens", "truncation_side",
         "chat_template", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
         "guided_decoding_backend", "guided_whitespace_pattern", "structural_tag", "thinking_token_budget",
         "repetition_detection", "request_id", "kv_transfer_params", "ec_transfer_params", "prompt_embeds"),
        (),
    ),
}  # fmt: skip
LLAMA_CPP: Table = {
    "cache_prompt": bool,
    "n_keep": float,  # of a context that is shifted; it never is
    "n_discard": float,
    "reasoning_format": str,
    "parse_tool_calls": bool,
    "sse_ping_interval": (-1,),
    # what follows the next line is how a sampler works that is off
    **dict.fromkeys(("repeat_last_n", "dry_base", "dry_allowed_length", "dry_penalty_last_n"), float),
    **dict.fromkeys(("xtc_threshold", "dynatemp_exponent", "mirostat_tau", "mirostat_eta", "adaptive_decay"), float),
    "dry_sequence_breakers": list,
    "repeat_penalty": (1,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "adaptive_target": (-1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1,),
    "min_keep": (0,),
    "samplers": ("", []),
    "grammar": ("",),
    "json_schema": (),
    "lora": ([],),
    "n_predict": (-1,),
    "n_cmpl": (1,),
    "n_indent": (0,),
    "n_cache_reuse": (0,),
    "n_probs": (0,),
    "id_slot": (-1,),
    "t_max_predict_ms": (-1, 0),
    "response_fields": ([],),
    "image_data": ([],),
    **dict.fromkeys(("verbose", "timings_per_token", "return_tokens", "return_progress"), (False,)),
    **dict.fromkeys(("post_sampling_probs", "backend_sampling", "thinking_forced_open", "penalize_nl"), (False,)),
}
IN_CHATS: Table = {**LLAMA_CPP, **VLLM, **OPENAI, "add_special_tokens": (False,)}  # on top of the template's
IN_COMPLETIONS: Table = {**LLAMA_CPP, **VLLM, **OPENAI, "add_special_tokens": (True,)}
IN_STREAM_OPTIONS: Table = {"include_obfuscation": bool, "continuous_usage_stats": (False,)}
IN_MESSAGES: Table = {
    "cache_control": dict,
    # what clients note of a message, and of an answer that they send back
    **dict.fromkeys(("id", "timestamp", "created_at", "finish_reason", "usage", "provider_specific_fields"), object),
    "name": ("",),
    "tool_calls": ([],),
    "tool_call_id": ("",),
    "function_call": (),
    "annotations": ([],),
    "refusal": ("",),
    "audio": (),
    "images": ([],),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "thinking_blocks": ([],),
    "prefix": (False,),
    "partial": (False,),
}
IN_TEXT_PARTS: Table = {
    "id": object,
    "cache_control": dict,
    "prompt_cache_breakpoint": dict,
    "annotations": ([],),
    "citations": ([],),
    "logprobs": ([],),
}

# fields that are done here: the values by which vLLM, llama.cpp and LM Studio mean what an absent field means
AS_ABSENT: Mapping[str, tuple[Any, ...]] = {
    "max_tokens": (-1,),
    "max_completion_tokens": (-1,),
    "seed": (-1,),
    "top_k": (-1,),
}


def refusal(value: Any, harmless: Harmless) -> str | None:
    """Why a field that is not done cannot be taken with this value, not null; None where it asks for nothing."""
    if harmless is object:
        return None
    if isinstance(harmless, type):
        of_type = isinstance(value, int | float) if harmless is float else isinstance(value, harmless)
        right = of_type and (harmless is bool) == isinstance(value, bool)
        return None if right else f"expected {kind_of(harmless())}, got {kind_of(value)}"
    return None if is_among(value, harmless) else "not supported by this server; leave it out"


def is_among(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether a value is one of these; true and false are no numbers, a null in an object is as absent."""
    if isinstance(value, dict):
        value = {key: one for key, one in value.items() if one is not None}
    return any(isinstance(value, bool) == isinstance(one, bool) and bool(value == one) for one in others)
