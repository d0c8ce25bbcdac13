"""What kfp remembers of finished steps, where the shards that they made are no longer whole.

kfp goes by a step's inputs. A shard that is damaged, or that ``kubetuner cache gc`` has removed, would make the next
step fail at every run, while the step that could encode its samples again was a cache hit each time.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from kubetuner.artifacts import LatentsArtifact, TextEmbedsArtifact, read_artifact
from kubetuner.errors import ArtifactError, InputError
from kubetuner.store import open_store

Encoded = LatentsArtifact | TextEmbedsArtifact
_KINDS: dict[str, type[Encoded]] = {"latents": LatentsArtifact, "text_embeds": TextEmbedsArtifact}


def forget_broken(cache: Path, store: str) -> list[str]:
    """Forget the steps whose shards are missing or damaged; returns the kinds of artifacts they made.

    Args:
        cache: kfp's folder with a JSON file for each step it remembers: its outputs by name.
        store: Address of the store that they wrote to.
    """
    remembered = [(file, made) for file in sorted(cache.glob("*.json")) for made in _encoded(file)]
    try:
        found = open_store(store)
        indexed = {entry.shard for entry in found.entries()}
        damages = found.files.damages({shard.file: shard for _, made in remembered for shard in made.shards}.values())
    except (ArtifactError, InputError):  # The store cannot be used, which is likely what the step failed of.
        return []
    broken = {
        file: made.kind
        for file, made in remembered
        if any(shard.file not in indexed or shard.file in damages for shard in made.shards)
    }
    for file in broken:
        file.unlink()
    return sorted(set(broken.values()))


def _encoded(file: Path) -> Iterator[Encoded]:
    """The latents and text embeddings among a step's outputs, except those of another version."""
    for output in json.loads(file.read_bytes()).values():
        kind = output.get("metadata", {}).get("kind") if isinstance(output, dict) else None
        if kind in _KINDS:
            with contextlib.suppress(ArtifactError):
                yield read_artifact(Path(output["uri"]), _KINDS[kind])
