import pytest

from kubetuner.config.load import load
from kubetuner.errors import ConfigError

CONFIG = {"model_type": "full", "model_family": "sdxl"}


def image(**more):
    return {"id": "a", "instance_data_dir": "pictures", **more}


def problems_of(*entries):
    with pytest.raises(ConfigError) as caught:
        load(CONFIG, list(entries))
    return {problem.where.removeprefix("multidatabackend.json"): problem.message for problem in caught.value.problems}


def texts(**more):
    return {"id": "t", "dataset_type": "text_embeds", **more}


@pytest.mark.parametrize(
    ("entry", "key", "message"),
    [
        ({"crop": "False"}, "crop", "true or false"),
        ({"crop_style": "middle"}, "crop_style", "'random' or 'center' or 'centre' or 'corner'"),
        ({"crop_style": "face"}, "crop_style", "not available yet"),
        ({"crop_aspect": "closest"}, "crop_aspect", "not available yet"),
        ({"type": "webshart"}, "type", "not available yet"),
        ({"type": "gcs"}, "instance_data_dir", "expected gs://bucket/prefix"),
        ({"instance_data_dir": "gs://b/x"}, "instance_data_dir", "set type to gcs"),
        ({"instance_data_dir": "s3://b/x"}, "instance_data_dir", "set type to aws"),
        ({"type": "aws"}, "aws_bucket_name", "missing"),
        ({"type": "aws", "aws_bucket_name": "b", "instance_data_dir": "/x"}, "instance_data_dir", "inside the bucket"),
        ({"aws_bucket_name": "b"}, "aws_bucket_name", "no effect with type local"),
        ({"aws_secret_access_key": "hunter2"}, "aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
        ({"type": "csv"}, "csv_file", "expected a .csv, .tsv, .parquet file"),
        ({"type": "csv", "csv_file": 5}, "csv_file", "expected a string"),
        ({"type": "csv", "csv_file": "a.csv", "caption_strategy": "csv"}, "csv_caption_column", "missing"),
        (
            {"type": "csv", "csv_file": "a.csv", "csv_caption_column": "c", "caption_strategy": "filename"},
            "csv_caption_column",
            "would not be used",
        ),
        ({"type": "csv", "csv_file": "a.csv", "caption_strategy": "textfile"}, "caption_strategy", "no files beside"),
        ({"caption_strategy": "csv"}, "caption_strategy", "needs type csv"),
        ({"type": "huggingface"}, "dataset_name", "expected namespace/name"),
        ({"type": "huggingface", "dataset_name": "a/b", "filter_func": {}}, "filter_func", "not available yet"),
        (
            {"type": "huggingface", "dataset_name": "a/b", "caption_strategy": "huggingface"},
            "caption_column",
            "missing",
        ),
        ({"type": "huggingface", "huggingface": 3, "dataset_name": "a/b"}, "huggingface", "expected an object"),
        (
            {"type": "huggingface", "huggingface": {"dataset_name": "a/c"}, "dataset_name": "a/b"},
            "huggingface.dataset_name",
            "given twice",
        ),
        ({"dataset_type": "conditioning"}, "dataset_type", "not available yet"),
        ({"caption_strategy": "parquet"}, "caption_strategy", "not available yet"),
        ({"metadata_backend": "parquet"}, "metadata_backend", "not available yet"),
        ({"parquet": {"path": "x"}}, "parquet", "not available yet"),
        ({"skip_file_discovery": "vae"}, "skip_file_discovery", "not available yet"),
        ({"instance_promt": "x"}, "instance_promt", "did you mean 'instance_prompt'"),
        ({"instance_prompt": "x"}, "instance_prompt", "would not be used"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt", "needs a prompt"),
        ({"disable_vae_cache": True}, "disable_vae_cache", "vae_cache_disable"),
        ({"repeats": -1}, "repeats", "at least 0"),
        ({"repeats": 2, "dataset_type": "eval"}, "repeats", "no meaning"),
        ({"resolution": 1.5}, "resolution", "whole number of pixels"),
        ({"resolution": 1}, "resolution", "looks like megapixels"),
        ({"resolution": 1024, "resolution_type": "area"}, "resolution", "looks like pixels"),
        ({"resolution_type": "area"}, "resolution", "megapixels"),
        ({"resolution": 1, "resolution_type": "pixel"}, "resolution", "looks like megapixels"),
        ({"minimum_image_size": 0.25}, "minimum_image_size", "whole number of pixels"),
        ({"minimum_image_size": 512, "resolution_type": "area", "resolution": 1}, "minimum_image_size", "pixels"),
        ({"maximum_image_size": 1024}, "maximum_image_size", "needs target_downsample_size"),
        ({"target_downsample_size": 1024}, "target_downsample_size", "needs maximum_image_size"),
        (
            {"resolution": 1024, "maximum_image_size": 2048, "target_downsample_size": 512},
            "target_downsample_size",
            "smaller than resolution",
        ),
        ({"aspect_bucket_alignment": 12}, "aspect_bucket_alignment", "expected one of"),
        ({"text_embeds": "none"}, "text_embeds", "no entry"),
        ({"id": "a/b"}, "id", "without slashes"),
        ({"id": None}, "id", "null"),
        ({"instance_data_dir": ""}, "instance_data_dir", "missing"),
    ],
)
def test_refused(entry, key, message) -> None:
    found = problems_of(image(**entry))
    assert list(found) == [f"[0].{key}"]
    assert message in found[f"[0].{key}"]


@pytest.mark.parametrize(
    ("entries", "where"),
    [
        ([image(), image()], "[1].id"),
        ([image(cache_dir_vae="c/x"), image(id="b", cache_dir_vae="c/./x")], "[1].cache_dir_vae"),
        ([image(cache_dir_vae="c"), texts(cache_dir="c")], "[1].cache_dir"),
        ([image(), texts(default=True), texts(id="u", default=True)], "[2].default"),
        ([texts()], ""),
        ([image(disabled=True)], ""),
        (["text"], "[0]"),
        ([image(), {"instance_data_dir": "x"}], "[1].id"),
    ],
)
def test_entries_together(entries, where) -> None:
    assert list(problems_of(*entries)) == [where]


def source_of(**entry):
    return load(CONFIG, [entry]).data.pictures[0].source


def test_sources() -> None:
    assert source_of(id="a", type="gcs", instance_data_dir="gs://bucket").instance_data_dir == "gs://bucket"
    table = source_of(id="a", type="csv", csv_file="a.csv", csv_caption_column="text", csv_cache_dir="x")
    assert (table.caption_strategy, table.table.file, table.table.url_column) == ("csv", "a.csv", "url")
    columns = {"dataset_name": "me/rings", "revision": "v1", "caption_column": "text", "num_proc": 4}
    for entry in (columns, {"huggingface": columns}):
        found = source_of(id="a", type="huggingface", metadata_backend="huggingface", **entry)
        assert (found.caption_strategy, found.hub.name, found.hub.revision) == ("huggingface", "me/rings", "v1")
    bucket = source_of(id="a", type="aws", aws_bucket_name="b", aws_endpoint_url="http://x", aws_region_name="auto")
    assert bucket.bucket.model_dump() == {"name": "b", "endpoint_url": "http://x", "region": "auto"}


def test_a_secret_is_not_repeated() -> None:
    found = problems_of(image(type="aws", aws_bucket_name="b", instance_data_dir="", aws_access_key_id="hunter2"))
    assert list(found) == ["[0].aws_access_key_id"]
    assert "hunter2" not in str(found)


def test_accepted_spellings(monkeypatch) -> None:
    monkeypatch.setenv("KT_DATA", "/mnt/data")
    run = load(
        {**CONFIG, "output_dir": "out", "resolution": 512},
        [
            image(crop_style="centre", metadata_backend="json", repeats=2.0, instance_data_dir="{env:KT_DATA}/{id}"),
            image(
                id="b", dataset_type="eval", cache_dir_vae="{output_dir}/{model_family}", is_regularization_data=False
            ),
            image(id="gone", disable=True, type="aws", nonsense=1, huggingface=2),
        ],
    )
    first, second = run.data.pictures
    assert first.geometry.geometry.crop_style == "center"
    assert first.geometry.geometry.resolution == 512
    assert first.sampling.repeats == 2
    assert first.source.instance_data_dir == "/mnt/data/a"
    assert second.source.dataset_type == "eval"
    assert run.sections.evaluate.eval_datasets == ("b",)
    assert [one.id for one in run.sections.train.datasets] == ["a"]
