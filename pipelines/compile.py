"""Compile the pipeline to YAML that is the same every time."""

import tempfile
from pathlib import Path


def compile_pipeline(target: Path) -> None:
    """Write the compiled pipeline to ``target``.

    kfp puts comments on top whose order changes from process to process, so they are left out: equal pipelines are
    equal files.
    """
    from kfp.compiler import Compiler

    from pipelines.finetune import finetune

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "pipeline.yaml"
        Compiler().compile(finetune, str(raw))
        lines = raw.read_text(encoding="utf-8").splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines[start:]), encoding="utf-8")
