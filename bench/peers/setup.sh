#!/usr/bin/env bash
# Makes what bench.peers runs: in .venv-peers, or the folder in PEERS_VENV, an environment for SimpleTuner, and beside it
# diffusers' example scripts with the packages that they need besides ours. Where DIFFUSERS_EXAMPLES names a folder with
# the scripts, none is fetched.
# torch, diffusers and what else all sides need come from .venv, so that all run the same arithmetic.
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

# Each script at its own commit, of diffusers 0.31, 0.32 and 0.33 in development; they run with the diffusers of .venv.
scripts=(
    49e40ef678c3db2c837e25a38a98291a4ffafa2c/examples/text_to_image/train_text_to_image_sdxl.py
    23cf71234971aafa1e6a17a01e89018bf9057f8f/examples/text_to_image/train_text_to_image_lora_sdxl.py
    81bd689c061c6017fc74c6e33190abdae83beee8/examples/dreambooth/train_dreambooth_lora_sana.py
)
if [ -z "${DIFFUSERS_EXAMPLES:-}" ]; then
    mkdir -p "$theirs/diffusers-examples"
    for script in "${scripts[@]}"; do
        curl -fsSL "https://raw.githubusercontent.com/huggingface/diffusers/$script" \
            -o "$theirs/diffusers-examples/$(basename "$script")"
    done
fi
"$ours" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$theirs/diffusers-packages" \
    datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0
