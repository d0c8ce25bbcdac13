"""Settings that Hugging Face's client reads when it is imported."""

import os
import tempfile

os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="kubetuner-hf-"))
