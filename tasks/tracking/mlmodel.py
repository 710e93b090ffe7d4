"""The MLmodel of a model folder: what MLflow loads and serves, with signature, input example and requirements."""

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import yaml

PIPELINES: Mapping[str, tuple[str, Sequence[tuple[str | None, str]]]] = {
    "text-generation": ("TextGenerationPipeline", [(None, "string")]),
    "text-classification": ("TextClassificationPipeline", [("label", "string"), ("score", "double")]),
}
"""Pipeline of transformers -> its class and the columns that it returns."""


def describe_model(folder: Path, task: str, example: str) -> None:
    """Write an MLmodel beside the Hugging Face folder `folder/model`: MLflow loads `folder`, all else `folder/model`.

    `mlflow.transformers.save_model` writes the same, but loads torch for it and copies the weights.

    Args:
        task: of a transformers pipeline, one of `PIPELINES`.
        example: a text that the model may be asked.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.models.utils import _save_example
    from mlflow.types import ColSpec, Schema

    model = folder / "model"
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    components = folder / "components" / "tokenizer"
    components.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(file, components / file.name)
    pipeline, outputs = PIPELINES[task]
    described = Model(
        signature=ModelSignature(
            inputs=Schema([ColSpec("string")]), outputs=Schema([ColSpec(kind, name) for name, kind in outputs])
        ),
        model_size_bytes=sum(file.stat().st_size for file in model.iterdir()),
    )
    described.add_flavor(
        "python_function",
        loader_module="mlflow.transformers",
        python_version=platform.python_version(),
        env={"virtualenv": "python_env.yaml"},
    )
    described.add_flavor(
        "transformers",
        transformers_version=metadata.version("transformers"),
        task=task,
        instance_type=pipeline,
        pipeline_model_type=config["architectures"][0],
        model_binary="model",
        source_model_name=folder.name,
        components=["tokenizer"],
        tokenizer_type=tokenizer.get("tokenizer_class", "PreTrainedTokenizerFast"),
        torch_dtype=None,
        code=None,
    )
    _save_example(described, [example], str(folder))
    described.save(str(folder / "MLmodel"))
    requirements = [f"{name}=={metadata.version(name)}" for name in ("mlflow", "transformers", "accelerate")]
    requirements.append(f"torch=={metadata.version('torch').partition('+')[0]}")
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment))
