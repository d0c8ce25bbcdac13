"""The fine-tuning pipeline: plan, download, cache latents and embeddings, train, evaluate, publish."""

# mypy: disable-error-code="untyped-decorator, type-arg"
import os
from typing import NamedTuple

from kfp import dsl

from components.cache_text_embeds import cache_text_embeds
from components.cache_vae import cache_vae
from components.download_dataset import download_dataset
from components.evaluate import evaluate
from components.plan import plan
from components.push_to_hub import push_to_hub
from components.split import split
from components.train import train
from components.train.component import IMAGE as TRAIN_IMAGE
from kubetuner.config.trainjob import TRAINJOB_VARIABLE, trainjob_settings

ACCELERATOR = "nvidia.com/gpu"
# Fixed when the pipeline is compiled: kfp 2.17 loses a limit that is a pipeline parameter inside ParallelFor.
GPUS = os.environ.get("KUBETUNER_GPUS", "1")


def train_here_or_on_nodes(planned: dsl.PipelineTask, trained: dsl.PipelineTask) -> None:
    """Give the train step its GPUs, or, with ``KUBETUNER_TRAINJOB``, the volume that it shares with the nodes."""
    settings = trainjob_settings()
    if settings is None:
        trained.set_accelerator_type(ACCELERATOR).set_accelerator_limit(GPUS)
        return
    from kfp import kubernetes

    gpus = int(GPUS) if settings.gpus is None else settings.gpus
    settings = settings.model_copy(update={"image": settings.image or TRAIN_IMAGE, "gpus": gpus})
    for task in (planned, trained):
        task.set_env_variable(TRAINJOB_VARIABLE, settings.to_json())
    kubernetes.mount_pvc(trained, pvc_name=settings.workspace_pvc, mount_path=settings.mount)


class Finetuned(NamedTuple):
    """What the pipeline leaves behind."""

    model: dsl.Model
    evaluation: dsl.Artifact
    published: dsl.Artifact


@dsl.pipeline(name="kubetuner-finetune", description="Fine-tune a diffusion model from SimpleTuner's two JSON files.")
def finetune(config: dict, data_backend_config: list, num_shards: int = 1) -> Finetuned:
    """Fine-tune a diffusion model.

    Args:
        config: Contents of config.json.
        data_backend_config: Contents of multidatabackend.json.
        num_shards: Pods that share the work of each cache step.
    """
    planned = plan(config=config, data_backend_config=data_backend_config)
    planned.set_caching_options(False)
    sections = planned.outputs
    downloaded = download_dataset(section=sections["download"]).outputs
    with dsl.ParallelFor(split(section=sections["cache_vae"], num_shards=num_shards).output) as part:
        vae = cache_vae(part=part, dataset=downloaded["dataset"])
        vae.set_accelerator_type(ACCELERATOR).set_accelerator_limit(GPUS)
    with dsl.ParallelFor(split(section=sections["cache_text_embeds"], num_shards=num_shards).output) as part:
        text = cache_text_embeds(part=part, dataset=downloaded["dataset"])
        text.set_accelerator_type(ACCELERATOR).set_accelerator_limit(GPUS)
    trained = train(
        section=sections["train"],
        latents=dsl.Collected(vae.outputs["latents"]),
        text_embeds=dsl.Collected(text.outputs["text_embeds"]),
        pictures=downloaded["pictures"],
    )
    train_here_or_on_nodes(planned, trained)
    judged = evaluate(
        section=sections["evaluate"],
        model=trained.outputs["model"],
        latents=dsl.Collected(vae.outputs["latents"]),
        text_embeds=dsl.Collected(text.outputs["text_embeds"]),
        pictures=downloaded["pictures"],
    )
    judged.set_accelerator_type(ACCELERATOR).set_accelerator_limit(GPUS)
    pushed = push_to_hub(
        section=sections["push"], model=trained.outputs["model"], evaluation=judged.outputs["evaluation"]
    )
    pushed.set_caching_options(False)
    return Finetuned(
        model=trained.outputs["model"],
        evaluation=judged.outputs["evaluation"],
        published=pushed.outputs["published"],
    )
