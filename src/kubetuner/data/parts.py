"""Whether the artifacts given are all parts of an encoded dataset (``num_shards``)."""

from collections.abc import Iterable

from kubetuner.artifacts import EncodedArtifact, LatentsArtifact
from kubetuner.errors import ArtifactError


def check_parts(artifacts: Iterable[EncodedArtifact]) -> None:
    """Refuse datasets of which parts are missing, or come twice and would count twice.

    Args:
        artifacts: Latents, text embeddings or both, in any order.

    Raises:
        ArtifactError: Names the parts that were given.
    """
    given: dict[str, list[tuple[int, int]]] = {}
    for artifact in artifacts:
        step = "cache_vae" if isinstance(artifact, LatentsArtifact) else "cache_text_embeds"
        given.setdefault(step, []).append(artifact.part)
    for step, parts in given.items():
        count = max(count for _, count in parts)
        if sorted(parts) != [(number, count) for number in range(count)]:
            named = ", ".join(f"{number} of {count}" for number, count in sorted(parts))
            raise ArtifactError(f"{step} was given as the parts {named} (counted from 0); give each part once")
