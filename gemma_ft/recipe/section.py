"""What blocks of a recipe are made of: their base class, types of values that several have, and broken rules."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from gemma_ft.errors import UserError
from gemma_ft.system.paths import expanded


def rule(text: str, *, key: str | None = None, got: Any = None) -> PydanticCustomError:
    """A broken rule as a pydantic error: `{got}` shows the value, `key` names another key as the one at fault."""
    return PydanticCustomError("rule", "{text}", {"text": text.replace("{got}", repr(got)), "key": key or ""})


def _expanded(text: str) -> str:
    try:
        return expanded(text)
    except UserError as error:
        raise rule(str(error)) from error


Text = Annotated[str, Field(min_length=1, max_length=4096)]
EXPANDED = AfterValidator(_expanded)
Location = Annotated[Text, EXPANDED]  # a path, or a name on the hub
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Steps = Annotated[int, Field(ge=1, le=100_000_000)]
Rows = Annotated[int, Field(ge=0, le=10_000_000)]
Batch = Annotated[int, Field(ge=1, le=65_536)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A block of a recipe: frozen, no unknown key, no coercion, defaults checked like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)
