"""What a key changes of what arrives at libraries: Dagster, MLflow, the hub, transformers, PEFT, TRL.

Each function gives an observation: it takes the workshop and one side (before or after the change) and says
what is to be seen there.
"""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest

from sft_pipeline.config.load import Catalog, load_recipe
from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.stage import Build
from sft_pipeline_tests.config.every_key import Observation, Side, Workshop


class Arrived(Exception):
    """Ends a call where what was looked for has arrived."""


# Dagster and MLflow


def of_dagster(look: Callable[[Any], Any]) -> Observation:
    """Something of the definitions that Dagster loads for the two files."""

    def seen(_: Workshop, side: Side) -> Any:
        from sft_pipeline.definitions import build_definitions

        recipe, own = side.recipe, side.dataset
        other = own.model_copy(update={"name": "other"})
        return look(build_definitions(Catalog({own.name: own, "other": other}, {recipe.name: recipe})))

    return seen


def jobs(definitions: Any) -> list[str]:
    return [job.name for job in definitions.jobs]


def job_description(definitions: Any) -> str:
    return definitions.jobs[0].description.partition("\n\n")[2]


def sensor_description(definitions: Any) -> str:
    return definitions.sensors[0].description.partition("\n\n")[2]


def sensor_jobs(definitions: Any) -> list[str]:
    """The jobs that the sensor of the dataset starts where a snapshot arrives."""
    return [target.job_name for target in definitions.sensors[0].targets]


def schedules(definitions: Any) -> list[str]:
    return [schedule.cron_schedule for schedule in definitions.schedules or ()]


def owners(asset: str) -> Callable[[Any], list[str]]:
    def seen(definitions: Any) -> list[str]:
        return _spec(definitions, asset).owners

    return seen


def read_by(asset: str) -> Callable[[Any], list[str]]:
    """The assets that one depends on."""

    def seen(definitions: Any) -> list[str]:
        return [dep.asset_key.to_user_string() for dep in _spec(definitions, asset).deps]

    return seen


def _spec(definitions: Any, asset: str) -> Any:
    return next(s for s in definitions.resolve_all_asset_specs() if s.key.to_user_string() == asset)


def registered_description(shop: Workshop, side: Side) -> str:
    """What arrives at MLflow's registry when the exported model is registered."""
    from sft_pipeline.store import Store
    from sft_pipeline.tracking.registry import register

    arrived = {}

    class Client:
        def create_registered_model(self, name: str, description: str) -> None:
            arrived.update({"name": name, "description": description})
            raise Arrived

    with contextlib.suppress(Arrived):
        register(Client(), "run", shop.artifact(side, "exported_model"), side.branch, Store())
    return arrived["description"]


def launched_processes(shop: Workshop, side: Side) -> str:
    """The number of ranks on the command line of torchrun; 1 where the stage's child is no torchrun."""
    from sft_pipeline.launch import launcher
    from sft_pipeline.orchestration import assets

    commands: list[list[str]] = []

    def record(_build: Build, command: list[str], *_: Any) -> None:
        commands.append(command)
        raise Arrived

    session = types.SimpleNamespace(get_bootstrap_env_vars=dict)
    work = shop.root / "launch"
    build = Build(side.config("trained_checkpoints"), {}, work / "out", work, Reporter())
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Arrived):
        patch.setattr(launcher, "_supervise", record)
        patch.setattr(assets.dg, "open_pipes_session", lambda **_: contextlib.nullcontext(session))
        assets._isolate(None, STAGES["trained_checkpoints"], build, side.recipe)  # type: ignore[arg-type]
    [command] = commands
    return command[command.index("--nproc_per_node") + 1] if "--nproc_per_node" in command else "1"


# The model as it is loaded for the training


def of_model(look: Callable[[Any], Any]) -> Observation:
    """Something of the model that the training is given."""

    def seen(_: Workshop, side: Side) -> Any:
        from sft_pipeline.training.model import load_for_training

        config = side.config("trained_checkpoints")
        return look(load_for_training(config.model, config.training)[0])

    return seen


def class_name(model: Any) -> str:
    return type(model).__name__


def width(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[1]


def frozen_dtype(model: Any) -> str:
    return str(model.get_input_embeddings().weight.dtype)


def attention(model: Any) -> str:
    return model.config._attn_implementation


def embeddings_trained(model: Any) -> bool:
    return model.get_input_embeddings().weight.requires_grad


def adapted(model: Any) -> set[str]:
    """The names of the modules that have an adapter."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}


def of_adapter(look: Callable[[Any], Any]) -> Observation:
    """Something of the adapter on the first layer's query projection."""

    def found(model: Any) -> Any:
        return look(next(m for n, m in model.named_modules() if n.endswith("q_proj")))

    return of_model(found)


def rank(adapter: Any) -> int:
    return adapter.lora_A["default"].weight.shape[0]


def scale(adapter: Any) -> float:
    return adapter.scaling["default"]


def dropout(adapter: Any) -> float:
    return getattr(adapter.lora_dropout["default"], "p", 0.0)


def has_magnitudes(adapter: Any) -> bool:
    """DoRA's own vector of magnitudes."""
    return len(adapter.lora_magnitude_vector) == 1


def vocabulary_of_the_trainers_tokenizer(_: Workshop, side: Side) -> int:
    from sft_pipeline.training.base import load_tokenizer

    return len(load_tokenizer(side.config("trained_checkpoints").model))


def revision_asked_of_the_hub(_: Workshop, side: Side) -> set[str]:
    from sft_pipeline.training.base import base_folder

    asked = set()

    def record(**call: Any) -> str:
        asked.add(call["revision"])
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", record)
        with pytest.raises(InputError, match="cannot be loaded"):
            base_folder(side.config("trained_checkpoints").model)
    return asked


def trust_in_remote_code(_: Workshop, side: Side) -> dict[str, bool]:
    """What transformers is told where it loads configuration, tokenizer and weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sft_pipeline.training.base import load_tokenizer
    from sft_pipeline.training.model import load_for_training

    arrived: dict[str, bool] = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):

            def record(*args: Any, _kind: Any = kind, _own: Any = kind.from_pretrained, **call: Any) -> Any:
                arrived[_kind.__name__] = call["trust_remote_code"]
                return _own(*args, **call)

            patch.setattr(kind, "from_pretrained", record)
        config = side.config("trained_checkpoints")
        load_tokenizer(config.model)
        load_for_training(config.model, config.training)
    return arrived


# The trainer, and the model that generates


def argument(*names: str) -> Observation:
    """Fields of the configuration that arrives at TRL's trainer where the stage trains."""

    def seen(shop: Workshop, side: Side) -> Any:
        from trl import SFTTrainer

        arrived = []

        def record(*_: Any, args: Any, **__: Any) -> None:
            arrived.append(args)
            raise Arrived

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Arrived):
            patch.setattr(SFTTrainer, "__init__", record)
            _build(shop, side, "trained_checkpoints")
        found = tuple(getattr(arrived[0], name) for name in names)
        return found if len(names) > 1 else found[0]

    return seen


def noise_on_embeddings(shop: Workshop, side: Side) -> float | None:
    """The alpha of the noise that arrives at the embeddings of the model that is trained."""
    from torch import nn

    from sft_pipeline.training.neftune import EmbeddingNoise

    arrived = []
    own = nn.Embedding.register_forward_hook

    def record(module: Any, hook: Any, **more: Any) -> Any:
        arrived.extend([hook.alpha] if isinstance(hook, EmbeddingNoise) else [])
        return own(module, hook, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Embedding, "register_forward_hook", record)
        _build(shop, side, "trained_checkpoints")
    return arrived[0] if arrived else None


def _build(shop: Workshop, side: Side, name: str) -> None:
    """Calls a stage's build on its inputs, whether or not there is an artifact of it."""
    branch, stage = side.branch, STAGES[name]
    inputs = {upstream: shop.artifact(side, upstream) for upstream in stage.inputs}
    out = shop.fresh()
    stage.load_build()(Build(stage.config(branch), inputs, out, out / "work", Reporter()))


def inherited(name: str) -> Observation:
    """A field of TRL's configuration, of the recipe as it is loaded from its file."""

    def seen(shop: Workshop, side: Side) -> Any:
        loaded = load_recipe(shop.write_recipe("child", side.recipe_document), folders=[shop.root])
        document = loaded.model_dump(mode="json", by_alias=True)
        return argument(name)(shop, Side(side.dataset_document, document))

    return seen


def most_tokens_of_a_reply(shop: Workshop, side: Side) -> int:
    """Forward passes of the longest generation, as the model is called in a new evaluation."""
    return len(max(_generations(shop, side), key=len))


def most_prompts_at_once(shop: Workshop, side: Side) -> int:
    return max(call for calls in _generations(shop, side) for call in calls)


def _generations(shop: Workshop, side: Side) -> list[list[int]]:
    """Of each batch that is generated in an evaluation, the rows of every call of the model."""
    from transformers import LlamaForCausalLM

    shop.artifact(side, "trained_checkpoints")  # whose calls are not counted
    found: list[list[int]] = []
    caches: list[Any] = []
    own = LlamaForCausalLM.forward

    @functools.wraps(own)  # whose signature is looked at
    def record(model: Any, *args: Any, **call: Any) -> Any:
        if (cache := call.get("past_key_values")) is not None:
            if not caches or cache is not caches[-1]:
                caches.append(cache)
                found.append([])
            found[-1].append(len(call["input_ids"]))
        return own(model, *args, **call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", record)
        _build(shop, side, "evaluation")
    return found
