"""`gemma-ft schema`: the JSON Schema of recipes, for editors."""


def schema() -> int:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from gemma_ft.recipe.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
