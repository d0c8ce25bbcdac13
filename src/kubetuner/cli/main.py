"""The command and its exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted.

Only click and the standard library are imported here, so that help is instant.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from kubetuner import __version__
from kubetuner.errors import InputError, KubetunerError

CONFIG = click.option(
    "--config",
    "config_file",
    required=True,
    type=click.Path(path_type=Path),
    help="config.json, with SimpleTuner's keys.",
)
DATA = click.option(
    "--data",
    "data_file",
    type=click.Path(path_type=Path),
    help="multidatabackend.json; by default the file that data_backend_config names.",
)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of config.json; may be given often."
)
# Clients of the hub and of S3 that say every request, or where credentials came from.
CHATTY = ("httpx", "botocore", "boto3")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kubetuner")
def cli() -> None:
    """Fine-tune diffusion models on Kubeflow or on this machine, from SimpleTuner's two JSON files."""


@cli.command()
@CONFIG
@DATA
@SET
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for everything the run makes; by default output_dir's."
)
def run(config_file: Path, data_file: Path | None, overrides: tuple[str, ...], out: Path | None) -> None:
    """Run the whole pipeline on this machine. Run it again and finished steps come from the cache."""
    from kubetuner.cli.run import run_pipeline

    run_pipeline(config_file, data_file, overrides, out)


@cli.command()
@CONFIG
@DATA
@SET
def validate(config_file: Path, data_file: Path | None, overrides: tuple[str, ...]) -> None:
    """Check both files and show the plan. Lists every problem, not only the first."""
    from kubetuner.cli.inputs import read_inputs
    from kubetuner.steps.plan import make_plan

    inputs = read_inputs(config_file, data_file, overrides)
    click.echo(make_plan(inputs.config, inputs.data, cwd=Path.cwd(), predict_memory=True).markdown)


@cli.command()
@click.argument("name")
@click.option(
    "--section",
    "section_file",
    type=click.Path(path_type=Path),
    help="The step's section as JSON, or the file of all sections.",
)
@click.option(
    "--in", "inputs", multiple=True, metavar="NAME=FOLDER", help="An input artifact; repeat a name for several shards."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the artifact to make.")
@click.option("--shard", default=0, show_default=True, help="Which part of a cache step's work, from 0.")
@click.option("--num-shards", default=1, show_default=True, help="How many parts there are.")
def step(name: str, section_file: Path | None, inputs: tuple[str, ...], out: Path, shard: int, num_shards: int) -> None:
    """Run one step, as Argo or a shell script would.

    NAME is plan, download_dataset, cache_vae, cache_text_embeds, train, evaluate or push_to_hub. `plan` takes
    --in config=FILE and --in data=FILE instead of a section and writes sections.json.
    """
    from kubetuner.cli.step import run_step

    run_step(name, section_file, inputs, out, shard=shard, num_shards=num_shards)


@cli.command("compile")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File to write; pipelines/compiled/finetune.yaml by default."
)
def compile_(out: Path | None) -> None:
    """Compile the pipeline to the YAML that Kubeflow takes."""
    from kubetuner.cli.checkout import add_checkout_to_path

    root = add_checkout_to_path()
    from pipelines.compile import compile_pipeline

    target = out or root / "pipelines" / "compiled" / "finetune.yaml"
    compile_pipeline(target)
    click.echo(f"wrote {target}")


@cli.group()
def cache() -> None:
    """Look after the store of encoded samples."""


STORE = click.option(
    "--store",
    "address",
    help="The store, such as runs/demo/store or gs://bucket/prefix; $KUBETUNER_STORE by default.",
)


@cache.command()
@STORE
def ls(address: str | None) -> None:
    """Show what there is: shards, samples, bytes and age."""
    from kubetuner.cli.cache import list_store

    list_store(address)


@cache.command()
@STORE
def verify(address: str | None) -> None:
    """Check every checksum. Damaged shards are named, and encoded again by the next run that needs them."""
    from kubetuner.cli.cache import verify_store

    verify_store(address)


@cache.command()
@STORE
@click.option(
    "--keep",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder with artifacts (at any depth) whose samples stay, however old; may be given often.",
)
@click.option("--unused-days", default=14.0, show_default=True, help="Only what no run has used for so long; from 1.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
def gc(address: str | None, keep: tuple[Path, ...], unused_days: float, dry_run: bool) -> None:
    """Remove samples that no run uses any more, and what killed runs left."""
    from kubetuner.cli.cache import collect_garbage

    collect_garbage(address, keep, unused_days, dry_run=dry_run)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for client in CHATTY:
        logging.getLogger(client).setLevel(logging.WARNING)
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="kubetuner", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except KubetunerError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    return 0


if __name__ == "__main__":
    main()
