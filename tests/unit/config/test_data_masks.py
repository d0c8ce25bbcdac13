"""Entries of masks in the data file."""

import pytest

from kubetuner.config.load import load
from kubetuner.errors import ConfigError

CONFIG = {"model_type": "full", "model_family": "sdxl"}


def image(**more):
    return {"id": "a", "instance_data_dir": "pictures", "conditioning_data": "m", **more}


def masks(**more):
    return {
        "id": "m",
        "dataset_type": "conditioning",
        "conditioning_type": "mask",
        "instance_data_dir": "masks",
        **more,
    }


def problems_of(*entries, **config):
    with pytest.raises(ConfigError) as caught:
        load(CONFIG | config, list(entries))
    return {problem.where.removeprefix("multidatabackend.json"): problem.message for problem in caught.value.problems}


def test_masks_belong_to_the_pictures_that_name_them() -> None:
    entries = [image(), masks(), image(id="b", conditioning_data=["m"]), image(id="c", conditioning_data=None)]
    run = load(CONFIG | {"masked_loss_probability": 0.25}, entries)
    (found,) = run.sections.download.masks
    assert (found.of, found.kind, found.source.instance_data_dir) == (("a", "b"), "mask", "masks")
    assert [source.id for source in run.sections.download.datasets] == ["a", "b", "c"]
    assert run.sections.train.masked_loss_probability == 0.25
    assert [dataset.id for dataset in run.sections.train.datasets] == ["a", "b", "c"]
    assert [dataset.id for dataset in run.sections.cache_vae.datasets] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "storage",
    [
        {"type": "gcs", "instance_data_dir": "gs://bucket/masks"},
        {"type": "aws", "aws_bucket_name": "bucket"},
        {"type": "csv", "csv_file": "masks.csv"},
        {"type": "huggingface", "dataset_name": "me/masks"},
    ],
)
def test_masks_come_from_every_kind_of_source(storage) -> None:
    run = load(CONFIG | {"caption_strategy": "textfile"}, [image(), masks(**storage)])
    assert run.sections.download.masks[0].source.type == storage["type"]


def test_what_pictures_decide_is_noted() -> None:
    repeated = {"crop": True, "crop_aspect": "square", "resolution": 512, "repeats": 3, "caption_strategy": "textfile"}
    run = load(CONFIG | {"conditioning_multidataset_sampling": "random"}, [image(), masks(**repeated)])
    notes = "\n".join(run.notes)
    for name in repeated:
        assert f"multidatabackend.json[1].`{name}`: " in notes
    assert "config.json.`conditioning_multidataset_sampling`: a dataset of pictures has one dataset of masks" in notes


@pytest.mark.parametrize(
    ("entries", "where", "message"),
    [
        ([image()], "[0].conditioning_data", "names 'm', but no enabled entry with dataset_type conditioning"),
        ([image(), masks(disabled=True)], "[0].conditioning_data", "no enabled entry with dataset_type conditioning"),
        ([image(conditioning_data=["m", "n"]), masks()], "[0].conditioning_data", "a picture has one mask"),
        ([image(conditioning_data=None), masks()], "[1]", "is in no dataset's conditioning_data"),
        ([image(), masks(conditioning_type=None)], "[1].conditioning_type", "is missing; expected 'mask'"),
        ([image(), masks(conditioning_type="controlnet")], "[1].conditioning_type", "no family of kubetuner takes"),
        ([image(conditioning_type="mask"), masks()], "[0].conditioning_type", "entry with dataset_type conditioning"),
        ([image(conditioning=[{"type": "random_masks"}]), masks()], "[0].conditioning", "not made on the fly"),
        ([image(), masks(max_num_samples=3)], "[1].max_num_samples", "chosen by their pictures"),
        ([image(), masks(type="webshart")], "[1].type", "make parquet files of them"),
        ([image(), masks(id="a")], "[1].id", "ids must differ"),
        (
            [image(conditioning_data=None), image(id="e", dataset_type="eval"), masks()],
            "[1].conditioning_data",
            "the evaluation loss never applies masks",
        ),
    ],
)
def test_mistakes_are_named(entries, where, message) -> None:
    assert message in problems_of(*entries)[where]


def test_a_faulty_entry_of_masks_is_told_once() -> None:
    assert list(problems_of(image(), masks(instance_data_dir=None))) == ["[1].instance_data_dir"]


def test_settings_of_the_run() -> None:
    assert (
        "has no effect without masks"
        in problems_of({**image(), "conditioning_data": None}, masked_loss_probability=0.5)[
            "config.json.masked_loss_probability"
        ]
    )
    several = problems_of(image(), masks(), conditioning_multidataset_sampling="combined")
    assert "a loss has one mask" in several["config.json.conditioning_multidataset_sampling"]
