"""The native Gemma with transformers' face: one implementation for all families, chosen by the config.

Its weight names, config.json and `architectures` are transformers' own, so folders move freely between the two.
Letters: B batch, T tokens, S keys (cached ones included), D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig, VaultGemmaConfig
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from gemma_ft.errors import UserError
from gemma_ft.families.records import family_of
from gemma_ft.model.added_rows import AddedRows
from gemma_ft.model.attention import resolve_attention
from gemma_ft.model.config import GemmaNumerics, read_config
from gemma_ft.model.decode import decoded
from gemma_ft.model.kv_cache import KVPass
from gemma_ft.model.layered_head import layered_head_loss
from gemma_ft.model.layers import GemmaDecoderLayer, GemmaRMSNorm, GemmaScaledEmbedding, layer_angles, wide_dtype
from gemma_ft.model.linear import linear
from gemma_ft.model.lm_head import HeadLoss, TokenWeights, fused_head_loss, softcapped
from gemma_ft.model.loading import HUB_KEYS, load_whole, other_parts, refuse_untied
from gemma_ft.model.masks import documents_of, masks_of, masks_of_pass
from gemma_ft.model.output import CACHE, GemmaCausalLMOutput
from gemma_ft.model.shared_tokens import SharedTokens
from gemma_ft.model.static_pass import StaticPass

NO_ATTENTIONS = (
    "output_attentions: attention weights are not kept here; transformers' own class gives them, from the same folder "
    "and with attn_implementation='eager'"
)

Face = TypeVar("Face", bound="GemmaPreTrainedModel")


class GemmaPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of a model before it builds, loads, shards or saves it."""

    config_class = GemmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GemmaDecoderLayer"]  # noqa: RUF012 (transformers' own attribute)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    # a buffer in some older folders; what lies beside a text model
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", *other_parts()]  # noqa: RUF012
    _supports_sdpa = True  # whether it may run is decided by `resolve_attention`, which knows about the cap

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *_: Any, **__: Any) -> str:
        """transformers' hook at construction and in `set_attn_implementation`: our resolver decides, and refuses."""
        numerics = GemmaNumerics.from_config(self.config)
        return resolve_attention(attn_implementation, numerics.attn_softcap, windows=numerics.windowed).name

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GemmaRMSNorm):
            init.zeros_(module.weight)  # Gemma stores weight - 1
        else:
            super()._init_weights(module)


class GemmaModel(GemmaPreTrainedModel):
    """Token ids [B, T] -> final hidden states [B, T, D]."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.numerics = GemmaNumerics.from_config(config)
        self.embed_tokens = GemmaScaledEmbedding(config.vocab_size, config.hidden_size)
        self.added_rows: AddedRows | None = None  # of tokens that the base does not know
        self.layers = nn.ModuleList(
            GemmaDecoderLayer(config, self.numerics, index) for index in range(config.num_hidden_layers)
        )
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | KVPass | StaticPass | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | KVPass | StaticPass | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        """See `GemmaForCausalLM.forward`; returns the states after the final norm."""
        self._check(input_ids, inputs_embeds, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        shared = SharedTokens.of(more)
        if shared is not None:
            input_ids, position_ids = shared.distinct(input_ids), shared.distinct(position_ids)  # [1, M]
        x = self._embedded(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D], or [1, M, D]
        cache = past_key_values if cache is None else cache
        # A checkpointed layer runs twice in training and would write its keys to the cache twice.
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        windows = self.numerics.window_tokens
        if isinstance(cache, KVPass | StaticPass):
            position_ids = cache.position_ids
            masks = masks_of_pass(cache, windows)
        else:
            seen = cache.get_seq_length() if cache is not None else 0
            if document_ids is None and attention_mask is None and position_ids is not None and seen == 0:
                document_ids = documents_of(position_ids)
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
            masks = masks_of(x, windows, attention_mask, document_ids, cache, seen, shared)
        angles = layer_angles(position_ids, self.numerics.layers, wide_dtype(x))
        if isinstance(cache, KVPass) and cache.single and not output_hidden_states:
            last = decoded(self, x, angles, cache)
            if last is not None:
                return BaseModelOutputWithPast(self.norm(last), cache)

        states: list[Tensor] = []  # kept only when asked for: they would hold every layer's output in memory
        for layer, turned, window in zip(self.layers, angles, windows, strict=True):
            if output_hidden_states:
                states.append(x)
            x = layer(x, turned, masks[window], cache)
        x = self.norm(x) if shared is None else shared.spread(self.norm(x))
        return BaseModelOutputWithPast(x, cache, (*states, x) if output_hidden_states else None)

    def _check(self, input_ids: Any, inputs_embeds: Any, output_attentions: bool | None) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if output_attentions or self.config.output_attentions:
            raise UserError(NO_ATTENTIONS)

    def _embedded(self, input_ids: Any) -> Tensor:
        added = self.added_rows
        x: Tensor = self.embed_tokens(input_ids) if added is None else added.embed(input_ids, self.embed_tokens)
        return x


class GemmaForCausalLM(GemmaPreTrainedModel, GenerationMixin):
    """Gemma with its tied LM head. `GemmaForCausalLM(config)` takes the config of any family; a Gemma2Config gives a
    `Gemma2ForCausalLM`, whose name is what transformers expects under `architectures` in config.json.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __new__(cls, config: PreTrainedConfig | None = None, *_: Any, **__: Any) -> GemmaForCausalLM:
        return super().__new__(face_of(config, cls, FACES))

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = GemmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """A model from a folder or hub id, as transformers' own method, whichever family its config.json names.

        Raises: UserError when a weight is missing, unexpected, untied or of another shape: nothing is silently left at
        random; and for weights stored in float16, where that is not asked for by name. Quantized weights stay as they
        were stored, so that the model can be asked and then trained.
        """
        if not isinstance(config, PreTrainedConfig):
            hub = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
            config = read_config(config or name_or_path, **hub)
        GemmaNumerics.from_config(config)
        wants_info = kwargs.pop("output_loading_info", False)
        loader = super(GemmaForCausalLM, face_of(config, cls, FACES)).from_pretrained
        model, info = load_whole(loader, name_or_path, *args, config=config, **kwargs)
        if model.lm_head.weight is not model.model.embed_tokens.weight:
            refuse_untied(name_or_path)
        return (model, info) if wants_info else model

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """transformers' hook in `generate` with a static cache: the mask [B, S] as it is, for `forward` makes its
        own.
        """
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_weights: TokenWeights = None,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> GemmaCausalLMOutput:
        """Token ids [B, T] -> logits [B, T, V] in float32 or wider, and the loss when labels are given.

        attention_mask [B, T or S]: 1 real, 0 padding. position_ids [B, T]. document_ids [B, T]: tokens see their own
        document only (packed rows); without it, and without an attention_mask, positions that restart mark the
        documents. labels [B, T] with -100 for what is not trained: the loss is summed over labelled tokens and divided
        by `num_items_in_batch` (default: the labelled tokens of this call), so that it does not depend on how a batch
        is cut. loss_weights [B, T]: each token's loss is multiplied by its weight; the default divisor is then the
        weights of labelled tokens, so that a weight of 2 is the same as having the token twice; a function gives them
        instead for the labels' log-probabilities [B, T]. skip_logits: True
        leaves `.logits` None and never builds them; the default is True in training mode with labels. logits_to_keep:
        only the last so many positions (0: all), or the positions of an index tensor. cache: `past_key_values` by the
        name that it has from transformers 5.24 on. distinct_places, distinct_firsts, distinct_repeats: where tokens of
        several sequences are the same in all that they see, the fields of `SharedTokens`; they are then computed once.

        Raises: UserError for output_attentions, and for an attention_mask that is none of [B, S].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = head = logits = None
        if labels is not None:
            head, loss = self._loss(hidden, labels, num_items_in_batch, loss_weights)
        if head is None or not (self.training if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.head_logits(hidden[:, kept])
        return GemmaCausalLMOutput.of(loss, logits, getattr(outputs, CACHE), outputs.hidden_states, head)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., D] -> logits [..., V], capped, in float32 or wider."""
        logits, added = linear(self.lm_head, hidden), self.model.added_rows
        if added is not None:
            logits = torch.cat((logits, nn.functional.linear(hidden, added.rows.to(hidden.dtype))), dim=-1)
        return softcapped(logits, self.model.numerics.final_softcap)

    def head_loss(self, hidden: Tensor, labels: Tensor, loss_weights: TokenWeights = None) -> HeadLoss:
        """Final hidden states [B, T, D], labels and loss weights [B, T] -> `fused_head_loss` of this model's head, or
        `layered_head_loss` where something is put around the head.
        """
        if type(self.lm_head) is not nn.Linear:
            return layered_head_loss(self.head_logits, hidden, labels, words=self.vocab_size, loss_weights=loss_weights)
        added = self.model.added_rows
        return fused_head_loss(
            hidden,
            self.lm_head.weight,
            labels,
            softcap=self.model.numerics.final_softcap,
            loss_weights=loss_weights,
            added=None if added is None else added.rows,
        )

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None,
        loss_weights: TokenWeights,
    ) -> tuple[HeadLoss, Tensor]:
        head = self.head_loss(hidden, labels, loss_weights)
        divisor = torch.as_tensor(head.weight_sum if num_items_in_batch is None else num_items_in_batch)
        divisor = divisor.to(head.loss_sum)
        return head, head.loss_sum / torch.where(divisor > 0, divisor, 1)  # nothing labelled: 0


class Gemma2ForCausalLM(GemmaForCausalLM):
    """The same class under the name that config.json of a Gemma 2 carries."""

    config_class = Gemma2Config


class Gemma3ForCausalLM(GemmaForCausalLM):
    """The same class under the name that config.json of a Gemma 3 text model carries."""

    config_class = Gemma3TextConfig


class VaultGemmaForCausalLM(GemmaForCausalLM):
    """The same class under the name that config.json of a VaultGemma carries."""

    config_class = VaultGemmaConfig


FACES = {
    face.config_class.model_type: face
    for face in (GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, VaultGemmaForCausalLM)
}


def face_of(config: PreTrainedConfig | None, asked: type[Face], faces: dict[str, type[Face]]) -> type[Face]:
    """The class of `faces` (by model_type, the one for any family first) that fits `config`: what is saved then names
    the right architecture. `asked` where `config` is no Gemma's.

    Raises: UserError where `asked` is another family's.
    """
    family = family_of(getattr(config, "model_type", ""))
    face = asked if family is None else faces[family.model_type]
    if not issubclass(face, asked):
        whole = next(iter(faces.values())).__name__
        raise UserError(f"config.json: a {face.__name__}, not a {asked.__name__}; use {whole} for any Gemma")
    return face
