import pytest

from kubetuner.config.load import load
from kubetuner.errors import ConfigError

CONFIG = {"model_type": "full", "model_family": "sdxl"}
SIZES = {"path": "x.parquet", "width_column": "w", "height_column": "h"}


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
        ({"crop_style": "face"}, "crop_style", "the plan places every crop by the sizes in the headers alone"),
        ({"crop_aspect": "widest"}, "crop_aspect", "'preserve' or 'closest' or 'random'"),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1.0]}, "crop_aspect", "set crop to true"),
        ({"crop": True, "crop_aspect": "closest"}, "crop_aspect_buckets", "is missing"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": []}, "crop_aspect_buckets", "needs a list"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0]}, "crop_aspect_buckets", "above 0"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [True]}, "crop_aspect_buckets", "above 0"),
        (
            {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1.0, {"aspect": 1, "weight": 1}]},
            "crop_aspect_buckets",
            "not a mixture",
        ),
        (
            {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [{"aspect": 1, "weight": 0.5}]},
            "crop_aspect_buckets",
            "add up to 0.5",
        ),
        ({"crop": True, "crop_aspect_buckets": [1.0]}, "crop_aspect_buckets", "would not be used"),
        ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, "minimum_aspect_ratio", "no picture fits"),
        ({"crop": True, "minimum_aspect_ratio": 1.5}, "minimum_aspect_ratio", "leaves out every picture"),
        ({"crop": True, "maximum_aspect_ratio": 0.5}, "maximum_aspect_ratio", "leaves out every picture"),
        ({"type": "webshart"}, "type", "make parquet files of them"),
        ({"type": "memory"}, "type", "nothing outlives the process"),
        ({"webshart": {}}, "webshart", "belongs to type webshart"),
        ({"metadata_backend": "webshart"}, "metadata_backend", "goes with type webshart"),
        ({"caption_strategy": "webshart"}, "caption_strategy", "goes with type webshart"),
        ({"default": True}, "default", "Only an entry with dataset_type text_embeds can be the default one"),
        ({"delete_unwanted_images": True}, "delete_unwanted_images", "never deletes a picture of yours"),
        ({"delete_problematic_images": True}, "delete_problematic_images", "left out and named with the reason"),
        ({"text_cache_ondemand": True}, "text_cache_ondemand", "Captions are encoded once, before training"),
        ({"text_cache_disable": True}, "text_cache_disable", "Remove the key or set it to false."),
        ({"data_files": "x/*.parquet"}, "data_files", "by split and by instance_data_dir"),
        ({"dataset_config": "small"}, "dataset_config", "a configuration usually is a folder of its name"),
        ({"caption_file_extensions": [".caption"]}, "caption_file_extensions", "rename others"),
        ({"video": {}}, "video", "learn from pictures alone"),
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
        ({"dataset_type": "video"}, "dataset_type", "learn from pictures alone"),
        ({"dataset_type": "audio"}, "dataset_type", "learn from pictures alone"),
        ({"dataset_type": "caption"}, "dataset_type", "named by caption_strategy"),
        ({"dataset_type": "conditioning_image_embeds"}, "dataset_type", "no family of kubetuner takes"),
        (
            {"image_embeds": "texts"},
            "image_embeds",
            "names 'texts', but no enabled entry with dataset_type image_embeds",
        ),
        (
            {"caption_strategy": "parquet"},
            "parquet",
            'is missing; caption_strategy parquet needs an object such as {"path"',
        ),
        ({"caption_strategy": "parquet", "parquet": "x"}, "parquet", "is a str"),
        ({"caption_strategy": "parquet", "parquet": {}}, "parquet.path", "is ''; expected a .parquet file"),
        ({"caption_strategy": "parquet", "parquet": {"path": 5}}, "parquet.path", "expected a string"),
        ({"caption_strategy": "parquet", "parquet": {"path": "x.csv"}}, "parquet.path", "expected a .parquet file"),
        ({"caption_strategy": "parquet", "parquet": {"path": "gs://b/x.parquet"}}, "parquet.path", "type is local"),
        (
            {"caption_strategy": "parquet", "parquet": {"path": "x.parquet", "pth": "y"}},
            "parquet.pth",
            "did you mean 'path'?",
        ),
        (
            {"type": "csv", "csv_file": "a.csv", "caption_strategy": "parquet", "parquet": {"path": "x.parquet"}},
            "caption_strategy",
            "set it to csv",
        ),
        (
            {"type": "aws", "aws_bucket_name": "b", "caption_strategy": "parquet", "parquet": {"path": "/x.parquet"}},
            "parquet.path",
            "without a leading slash",
        ),
        ({"metadata_backend": "parquet"}, "parquet", "is missing; metadata_backend parquet needs an object"),
        ({"metadata_backend": "parquet", "parquet": {"path": "x.parquet"}}, "parquet", "tells neither captions"),
        (
            {"metadata_backend": "parquet", "parquet": {**SIZES, "caption_column": "text"}},
            "parquet.caption_column",
            "would not be used with caption_strategy filename",
        ),
        (
            {"caption_strategy": "parquet", "parquet": {"path": "x.parquet", "width_column": "w"}},
            "parquet.width_column",
            "name both or none",
        ),
        (
            {"type": "csv", "csv_file": "a.csv", "metadata_backend": "parquet", "parquet": SIZES},
            "metadata_backend",
            "sizes of type csv are in its own columns; remove it",
        ),
        ({"parquet": {"path": "x.parquet"}}, "parquet", "set caption_strategy or metadata_backend to parquet"),
        ({"skip_file_discovery": "vae latents"}, "skip_file_discovery", "names latents; expected words of vae, aspect"),
        ({"preserve_data_backend_cache": "true"}, "preserve_data_backend_cache", "true or false"),
        ({"max_num_samples": 0}, "max_num_samples", "at least 1"),
        ({"start_epoch": 2, "end_epoch": 1}, "end_epoch", "before start_epoch 2"),
        ({"start_step": 5, "end_step": 4}, "end_step", "before start_step 5"),
        ({"start_step": 5, "dataset_type": "eval"}, "start_step", "no meaning"),
        ({"is_regularisation_data": True, "dataset_type": "eval"}, "is_regularisation_data", "no meaning"),
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
        ({"text_embeds": "none"}, "text_embeds", "no enabled entry"),
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


def test_aspect_ratios_reach_the_geometry() -> None:
    listed = image(crop=True, crop_aspect="closest", crop_aspect_buckets=[0.5, 1, 1.5], minimum_aspect_ratio=0.6)
    weighted = [{"aspect": 1.0, "weight": 0.7}, {"aspect": 1.5, "weight": 0.3}]
    drawn = image(id="b", crop=True, crop_aspect="random", crop_aspect_buckets=weighted, maximum_aspect_ratio=2)
    first, second = (entry.geometry for entry in load(CONFIG, [listed, drawn]).sections.cache_vae.datasets)
    assert first.crop_aspect_buckets == ((0.5, 1.0), (1.0, 1.0), (1.5, 1.0))
    assert (first.crop_aspect, first.minimum_aspect_ratio, first.maximum_aspect_ratio) == ("closest", 0.6, None)
    assert second.crop_aspect_buckets == ((1.0, 0.7), (1.5, 0.3))
    assert (second.crop_aspect, second.minimum_aspect_ratio, second.maximum_aspect_ratio) == ("random", None, 2.0)


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"crop": True, "minimum_aspect_ratio": 0.5}, "minimum_aspect_ratio"),
        ({"crop": False, "crop_aspect": "square"}, "crop_aspect"),
        ({"maximum_image_size": 2048, "target_downsample_size": 1024}, "maximum_image_size"),
        ({"skip_file_discovery": "vae, aspect metadata"}, "skip_file_discovery"),
        ({"preserve_data_backend_cache": True}, "preserve_data_backend_cache"),
        ({"hash_filenames": False}, "hash_filenames"),
        ({"write_batch_size": 64}, "write_batch_size"),
        ({"disable_validation": True}, "disable_validation"),
        ({"compress_cache": True}, "compress_cache"),
        ({"scan_for_errors": True}, "scan_for_errors"),
        ({"override_dataset_config": True}, "override_dataset_config"),
        ({"is_regularisation_data": True}, "is_regularisation_data"),
    ],
)
def test_what_has_no_effect_is_noted(entry, key) -> None:
    run = load(CONFIG, [image(**entry)])
    (note,) = run.notes
    assert note.startswith(f"multidatabackend.json[0].`{key}`: ")
    plain = {name: value for name, value in entry.items() if ("size" in name and "batch" not in name) or name == "crop"}
    assert run.sections.train == load(CONFIG, [image(**plain)]).sections.train


@pytest.mark.parametrize(
    "key",
    ["default", "delete_unwanted_images", "delete_problematic_images", "text_cache_ondemand", "text_cache_disable"],
)
def test_asking_for_nothing_is_accepted(key) -> None:
    for value in (False, None):
        run = load(CONFIG, [image(**{key: value})])
        assert run.notes == ()
        assert run.sections == load(CONFIG, [image()]).sections


@pytest.mark.parametrize("words", ["", " ", None])
def test_skipping_nothing_needs_no_note(words) -> None:
    assert load(CONFIG, [image(skip_file_discovery=words)]).notes == ()


def test_text_entries_and_the_run_may_ask_to_skip_too() -> None:
    config = {**CONFIG, "skip_file_discovery": "vae", "preserve_data_backend_cache": True}
    notes = load(config, [image(), texts(skip_file_discovery="text", preserve_data_backend_cache=True)]).notes
    places = [note.partition("`: ")[0] for note in notes]
    assert places == [
        "config.json.`skip_file_discovery",
        "config.json.`preserve_data_backend_cache",
        "multidatabackend.json[1].`preserve_data_backend_cache",
        "multidatabackend.json[1].`skip_file_discovery",
    ]
    assert list(problems_of(image(), texts(skip_file_discovery="everything"))) == ["[1].skip_file_discovery"]


STEPS = {**CONFIG, "max_train_steps": 100}


def test_sampling_keys_reach_their_sections() -> None:
    entry = image(
        repeats=3, probability=0.5, start_step=2, max_num_samples=10, disable_multiline_split=True,
        caption_strategy="textfile",
    )  # fmt: skip
    sections = load(STEPS, [entry, image(id="b", end_step=60)]).sections
    first, second = sections.train.datasets
    assert (first.repeats, first.probability, first.start_step, first.end_step) == (3, 0.5, 2, None)
    assert (second.repeats, second.probability, second.start_step, second.end_step) == (0, 1.0, 0, 60)
    source = sections.download.datasets[0]
    assert (source.max_num_samples, source.disable_multiline_split) == (10, True)


@pytest.mark.parametrize(
    ("config", "entries", "where", "message"),
    [
        (CONFIG, [image(), image(id="b", start_step=9)], "[1].start_step", "needs max_train_steps"),
        (STEPS, [image(end_step=60)], "[0].end_step", "steps 61 to 100 of 100 without any dataset"),
        (STEPS, [image(start_step=2)], "[0].start_step", "steps 1 to 1 of 100"),
        (STEPS, [image(end_step=10), image(id="b", start_step=12)], "[0].end_step", "steps 11 to 11 of 100"),
    ],
)
def test_schedules_must_cover_the_run(config, entries, where, message) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config, entries)
    (problem,) = caught.value.problems
    assert problem.where == f"multidatabackend.json{where}"
    assert message in problem.message


def test_a_dataset_that_the_run_does_not_reach_is_noted() -> None:
    (note,) = load(STEPS, [image(), image(id="b", start_step=101)]).notes
    assert (
        note == "multidatabackend.json[1].`start_step`: the run ends after step 100, so the dataset is never drawn from"
    )


def test_schedules_that_cover_the_run_are_accepted() -> None:
    entries = [image(end_step=60), image(id="b", start_step=1, end_step=30), image(id="c", start_step=61)]
    assert [one.start_step for one in load(STEPS, entries).sections.train.datasets] == [0, 1, 61]


def test_regularisation_needs_something_to_learn_beside_it() -> None:
    config = {"model_type": "lora", "model_family": "sdxl"}
    with pytest.raises(ConfigError, match="only regularisation data"):
        load(config, [image(is_regularisation_data=True)])
    datasets = load(config, [image(is_regularization_data=True), image(id="b")]).sections.train.datasets
    assert [one.is_regularisation_data for one in datasets] == [True, False]
    assert load(CONFIG, [image(is_regularisation_data=True)]).sections.train.datasets[0].is_regularisation_data is False


def test_captions_in_a_parquet_file() -> None:
    block = {
        "path": "captions.parquet", "filename_column": "key", "caption_column": ["long", "short"],
        "fallback_caption_column": "tags", "identifier_includes_extension": True, "width_column": "w",
        "height_column": "h",
    }  # fmt: skip
    run = load(CONFIG, [image(caption_strategy="parquet", metadata_backend="parquet", parquet=block)])
    source = run.data.pictures[0].source
    assert source.caption_strategy == "parquet"
    table = source.metadata_table
    assert table is not None
    assert (table.path, table.filename_column, table.caption_columns) == ("captions.parquet", "key", ("long", "short"))
    assert (table.fallback_caption_column, table.identifier_includes_extension) == ("tags", True)
    assert (table.width_column, table.height_column) == ("w", "h")
    plain = load(CONFIG, [image(caption_strategy="parquet", parquet={"path": "c.parquet"})])
    assert plain.data.pictures[0].source.metadata_table.caption_columns == ("description",)


def test_a_parquet_file_may_tell_sizes_alone() -> None:
    source = load(CONFIG, [image(metadata_backend="parquet", parquet=SIZES)]).data.pictures[0].source
    assert source.caption_strategy == "filename"
    assert source.metadata_table is not None
    assert source.metadata_table.caption_columns == ()


def test_max_upscale_threshold_may_be_the_runs() -> None:
    run = load(CONFIG | {"max_upscale_threshold": 0.5}, [image(), image(id="b", max_upscale_threshold=0)])
    found = [entry.geometry.geometry.max_upscale_threshold for entry in run.data.pictures]
    assert found == [0.5, 0.0]


def test_latents_that_are_drawn_anew_need_no_clearing() -> None:
    clearing = {"vae_cache_clear_each_epoch": True}
    moments = CONFIG | {"vae_cache_moments": True}
    run = load(moments | clearing, [image(crop_style="center")])
    assert any("[0].`vae_cache_clear_each_epoch`: with vae_cache_moments" in note for note in run.notes)
    assert not load(moments, [image(vae_cache_clear_each_epoch=False)]).notes
    found = problems_of(image(**clearing, crop_style="center"))
    assert "or vae_cache_moments in config.json to true" in found["[0].vae_cache_clear_each_epoch"]
    with pytest.raises(ConfigError, match="crop_style random is drawn once"):
        load(moments, [image(**clearing)])
    with pytest.raises(ConfigError, match="crop_aspect random is drawn once"):
        load(
            moments,
            [image(**clearing, crop=True, crop_style="center", crop_aspect="random", crop_aspect_buckets=[1.0])],
        )


def test_when_latents_are_made_is_the_entrys_or_else_the_runs() -> None:
    entries = [
        image(id="a"),
        image(id="b", vae_cache_disable=True),
        image(id="c", vae_cache_ondemand=False),
        image(id="d", vae_cache_disable=True, vae_cache_clear_each_epoch=True, crop_style="center"),
    ]
    run = load(CONFIG | {"vae_cache_ondemand": True, "vae_cache_moments": True}, entries)
    found = [entry.vae_cache for entry in run.sections.cache_vae.datasets]
    assert found == ["ondemand", "disabled", "ahead", "disabled"]
    notes = "\n".join(run.notes)
    assert "[1].`vae_cache_moments`: with vae_cache_disable every use draws another sample anyway" in notes
    assert "[3].`vae_cache_clear_each_epoch`: with vae_cache_disable pictures are encoded at every use" in notes
    whole = load(CONFIG | {"vae_cache_disable": True}, [image(id="a"), image(id="b", vae_cache_disable=False)])
    assert [entry.vae_cache for entry in whole.sections.cache_vae.datasets] == ["disabled", "ahead"]
    assert not whole.notes


@pytest.mark.parametrize(
    ("run", "entries", "found", "noted"),
    [
        (None, (None, None), 4, 0),
        (8, (None, None), 8, 0),
        (None, (8, None), 8, 0),
        (8, (2, 4), 2, 1),
        (1, (2, 4), 1, 2),
    ],
)
def test_pictures_are_encoded_in_the_smallest_batches_asked_for(
    run: int | None, entries: tuple[int | None, ...], found: int, noted: int
) -> None:
    config = CONFIG if run is None else CONFIG | {"vae_batch_size": run}
    data = [
        image(id=str(index)) if size is None else image(id=str(index), vae_batch_size=size)
        for index, size in enumerate(entries or (None,))
    ]
    read = load(config, data)
    assert read.sections.cache_vae.vae_batch_size == found
    notes = [note for note in read.notes if "vae_batch_size" in note]
    assert len(notes) == noted
    assert all(f"pictures of all datasets are encoded {found} at once" in note for note in notes)


def test_where_caches_lie_is_noted_and_changes_nothing() -> None:
    bucket = {"type": "aws", "aws_bucket_name": "caches"}
    latents = {"id": "latents", "dataset_type": "image_embeds", "cache_dir": "vae", **bucket}
    plain, apart = (
        load(CONFIG, data) for data in ([image()], [image(image_embeds="latents"), latents, texts(**bucket)])
    )
    assert apart.sections == plain.sections
    notes = "\n".join(apart.notes)
    assert all(f"[{index}].`aws_bucket_name`: caches are artifacts" in notes for index in (1, 2))
    assert "[1].`cache_dir`: caches are artifacts" in notes
