"""Writes one JSON Schema per kind of file for editors: `python -m sft_pipeline.config.schemas`."""

import json

from pydantic import BaseModel

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.project import PACKAGE_DIR


def schemas() -> dict[str, str]:
    """File name -> content."""
    models: dict[str, type[BaseModel]] = {"dataset.json": DatasetConfig, "recipe.json": RecipeConfig}
    return {
        name: json.dumps(model.model_json_schema(by_alias=True), indent=2) + "\n"
        for name, model in models.items()
    }


if __name__ == "__main__":
    for name, content in schemas().items():
        (PACKAGE_DIR / "schemas" / name).write_text(content, encoding="utf-8")
