from pathlib import Path

import pytest

from kubetuner.artifacts import ModelArtifact, list_files
from kubetuner.errors import ArtifactError
from kubetuner.evaluation.tracked import locate_trained
from kubetuner.tracking import track

# MLflow's own dependencies warn while it creates its database.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def trained(tmp_path: Path, model: ModelArtifact) -> tuple[Path, ModelArtifact]:
    folder = tmp_path / "model"
    (folder / "pipeline" / "unet").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    (folder / "pipeline" / "unet" / "weights.safetensors").write_bytes(b"weights")
    (folder / "losses.jsonl").write_text("")
    return folder, model.model_copy(update={"files": list_files(folder)})


@pytest.fixture
def tracked(
    trained: tuple[Path, ModelArtifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, ModelArtifact]:
    """The model logged as the train step logs it: the pipeline's folder."""
    folder, artifact = trained
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("KUBETUNER_MLFLOW_ARTIFACTS", str(tmp_path / "mlartifacts"))
    monkeypatch.setenv("KUBETUNER_SPOOL", str(tmp_path / "spool"))
    with track("train", {}) as run:
        uri = run.log_model(folder / "pipeline", "sdxl-full")
    assert uri
    return folder, artifact.model_copy(update={"mlflow_model_uri": uri})


def test_the_folder_is_used_when_nothing_was_tracked(trained: tuple[Path, ModelArtifact], tmp_path: Path) -> None:
    folder, artifact = trained

    located = locate_trained(folder, artifact, tmp_path / "scratch")

    assert (located.folder, located.note) == (folder / "pipeline", "")


def test_the_tracked_model_is_fetched_and_compared(tracked: tuple[Path, ModelArtifact], tmp_path: Path) -> None:
    folder, artifact = tracked

    located = locate_trained(folder, artifact, tmp_path / "scratch")

    assert located.note == ""
    assert located.folder.is_relative_to(tmp_path / "scratch")
    assert (located.folder / "unet" / "weights.safetensors").read_bytes() == b"weights"


def test_a_tracked_model_that_differs_gives_way_to_the_folder(
    tracked: tuple[Path, ModelArtifact], tmp_path: Path
) -> None:
    folder, artifact = tracked
    stored = next((tmp_path / "mlartifacts").rglob("weights.safetensors"))
    stored.write_bytes(b"other")

    located = locate_trained(folder, artifact, tmp_path / "scratch")

    assert located.folder == folder / "pipeline"
    assert "1 file(s) that differ from the trained ones (unet/weights.safetensors)" in located.note


def test_damage_is_an_error_when_there_is_nothing_else(trained: tuple[Path, ModelArtifact], tmp_path: Path) -> None:
    folder, artifact = trained
    (folder / "pipeline" / "unet" / "weights.safetensors").unlink()

    with pytest.raises(ArtifactError, match=r"pipeline/unet/weights\.safetensors"):
        locate_trained(folder, artifact, tmp_path / "scratch")
