"""A Gemma that gives a number: transformers' sequence classification with one label, read at the end of each answer.

Letters: B sequences, T tokens, D hidden, A answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma3TextConfig, VaultGemmaConfig
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from gemma_ft.errors import UserError
from gemma_ft.families.family import REWARD_HEAD
from gemma_ft.model.config import GemmaNumerics, read_config
from gemma_ft.model.config_file import names_reward_model
from gemma_ft.model.gemma import GemmaModel, GemmaPreTrainedModel, face_of
from gemma_ft.model.loading import HUB_KEYS, load_whole

HEAD_WEIGHT = f"{REWARD_HEAD}.weight"


@dataclass
class RewardOutput(SequenceClassifierOutputWithPast):
    """transformers' output, its `logits` [A, 1] also as `rewards` [A]."""

    @property
    def rewards(self) -> Tensor:
        """One number for each answer."""
        assert self.logits is not None
        return self.logits[:, 0]


class RewardHead(nn.Linear):
    """Final hidden states [..., D] -> rewards [..., 1], in float32 or wider whatever autocast says; nothing is capped.
    A fresh one is zero: every reward is then 0.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def reset_parameters(self) -> None:
        """torch's hook at construction."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(self.weight.dtype), self.weight)


class GemmaForSequenceClassification(GemmaPreTrainedModel):
    """Gemma as a reward model. `GemmaForSequenceClassification(config)` takes the config of any family, and gives the
    class whose name transformers expects under `architectures` in config.json. The head stays in float32 under any
    dtype that is loaded.
    """

    _keep_in_fp32_modules_strict = {REWARD_HEAD}  # noqa: RUF012 (transformers' own attribute)
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        *GemmaPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",  # of the folder that it begins with
    ]

    def __new__(cls, config: PreTrainedConfig | None = None, *_: Any, **__: Any) -> GemmaForSequenceClassification:
        return super().__new__(face_of(config, cls, _FACES))

    def __init__(self, config: PreTrainedConfig) -> None:
        config.num_labels = self.num_labels = 1
        super().__init__(config)
        self.model = GemmaModel(config)
        self.score = RewardHead(config.hidden_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """A reward model from the folder or hub id of one, or of a language model: its head is then zero.

        Raises: UserError as GemmaForCausalLM.from_pretrained; for a classifier of several labels.
        """
        if not isinstance(config, PreTrainedConfig):
            hub = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
            config = read_config(config or name_or_path, **hub)
        GemmaNumerics.from_config(config)
        known = names_reward_model(config.architectures)
        check_one_label(config, name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        loader = super(GemmaForSequenceClassification, face_of(config, cls, _FACES)).from_pretrained
        fresh = () if known else (HEAD_WEIGHT,)
        model, info = load_whole(loader, name_or_path, *args, config=config, fresh=fresh, **kwargs)
        model.score.to(
            torch.promote_types(model.score.weight.dtype, torch.float32)
        )  # a fresh one has the others' dtype
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RewardHead):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = False,
        document_ids: Tensor | None = None,
        answer_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> RewardOutput:
        """Token ids [B, T] -> rewards as `logits`: [A, 1] of the answers that `answer_ids` [B, T] number (-1: part of
        none), each read at its last token; without them [B, 1], read at the last real token of each sequence by
        `attention_mask`, at either side of which the padding may be. attention_mask, position_ids, document_ids: as
        GemmaForCausalLM.forward has them. `labels` are of tokens, and no loss is made of them here.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if answer_ids is None:
            answer_ids = _sequence_ids(hidden, attention_mask)
        return RewardOutput(None, self.rewards(hidden, answer_ids)[:, None])

    def rewards(self, hidden: Tensor, answer_ids: Tensor) -> Tensor:
        """Final hidden states [B, T, D] and the number of each token's answer [B, T] (-1: none) -> the reward of each
        answer [A], at its last token: by position, whatever ids stand there or behind it. No answer: [0].
        """
        last = last_places(answer_ids)
        states = hidden.flatten(0, 1)[last.to(hidden.device)]  # [A, D]
        found: Tensor = self.score(states)[:, 0]
        return found


class Gemma2ForSequenceClassification(GemmaForSequenceClassification):
    """The same class under the name that config.json of such a Gemma 2 carries."""

    config_class = Gemma2Config


class Gemma3TextForSequenceClassification(GemmaForSequenceClassification):
    """The same class under the name that config.json of such a Gemma 3 text model carries."""

    config_class = Gemma3TextConfig


class VaultGemmaForSequenceClassification(GemmaForSequenceClassification):
    """The same class of a VaultGemma, for which transformers has none."""

    config_class = VaultGemmaConfig


def last_places(answer_ids: Tensor) -> Tensor:
    """Numbers of answers [B, T], -1 where there is none -> the place of the last token of each in the flat batch, int64
    [A]. Every number from 0 to the largest is there.
    """
    flat = answer_ids.flatten()
    (places,) = torch.nonzero(flat >= 0, as_tuple=True)
    if not len(places):
        return places
    last = torch.full((int(flat.max()) + 1,), -1, dtype=torch.int64, device=flat.device)
    last.scatter_reduce_(0, flat[places], places, "amax")
    assert bool((last >= 0).all()), "an answer without a token"
    return last


def check_one_label(config: PreTrainedConfig, name: Any) -> None:
    """Give the config of a language model one label. Raises: UserError for a classifier that has another number."""
    if names_reward_model(config.architectures) and config.num_labels != 1:
        raise UserError(
            f"{name}: a classifier of {config.num_labels} labels; a reward model gives one number (num_labels 1)"
        )
    config.num_labels = 1


def _sequence_ids(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The number of each sequence at its real tokens, [B, T]."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None].expand(hidden.shape[:2])
    if attention_mask is None:
        return rows
    return torch.where(attention_mask.to(hidden.device)[:, -hidden.shape[1] :] > 0, rows, -1)


_FACES = {
    face.config_class.model_type: face
    for face in (
        GemmaForSequenceClassification,
        Gemma2ForSequenceClassification,
        Gemma3TextForSequenceClassification,
        VaultGemmaForSequenceClassification,
    )
}


def reward_architecture(model_type: str) -> str:
    """What the config.json of a reward model of a family says under `architectures`."""
    return _FACES[model_type].__name__
