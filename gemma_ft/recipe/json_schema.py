"""The JSON Schema of a recipe file, for completion and checks in an editor."""

from typing import Any

from gemma_ft.recipe.objectives import KINDS
from gemma_ft.recipe.schema import Quantize, Recipe


def json_schema() -> dict[str, Any]:
    """The schema of `Recipe` plus what only a file may hold: `extends` and the shorthand `quantize: int8`.

    A file that extends another may leave out anything, so required keys are asked for at the top level only, and only
    where there is no `extends`.
    """
    schema = Recipe.model_json_schema()
    required = schema.pop("required")
    for section in schema["$defs"].values():
        section.pop("required", None)
        section.pop("description", None)  # docstrings speak to readers of the code
    schema["title"] = "gemma-ft recipe"
    schema.pop("description", None)
    schema["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    parent = {"type": "string", "description": "Parent recipe: beside this file, or a shipped one"}
    schema["properties"] = {"extends": parent, **schema["properties"]}
    kinds = Quantize.model_json_schema()["properties"]["kind"]["enum"]
    schema["properties"]["quantize"]["anyOf"].insert(0, {"enum": kinds})
    objective = schema["properties"]["objective"]
    objective["anyOf"] = [{"enum": list(KINDS)}, {"oneOf": objective.pop("oneOf")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
