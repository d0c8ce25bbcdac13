#!/usr/bin/env bash
# Makes the environment in which bench.peers runs SimpleTuner: .venv-peers, or the folder in PEERS_VENV.
# torch, diffusers and what else both sides need come from .venv, so that both run the same arithmetic.
set -euo pipefail
cd "$(dirname "$0")/../.."
ours=.venv/bin/python
theirs="${PEERS_VENV:-.venv-peers}"

"$ours" -m venv "$theirs"
pip() { "$theirs/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
packages "$ours" > "$(packages "$theirs/bin/python")/packages-of-kubetuner.pth"

# 4.10.1 says Python 3.12 and runs on 3.11; with all its requirements it would bring a second torch and music libraries.
pip --no-deps --ignore-requires-python simpletuner==4.10.1
# 5.14.1: later ones lack a class that it imports. spacy, librosa, ...: all its model families are imported at start.
pip transformers==5.14.1 httpx spacy
pip --no-deps wandb platformdirs xxhash imageio py3langid pypinyin hangul-romanize num2words librosa lazy_loader soxr \
    loguru einops toml atomicwrites 'trainingsample>=0.3,<0.4'
"$theirs/bin/python" -c 'import transformers; print("SimpleTuner runs with transformers", transformers.__version__)'
