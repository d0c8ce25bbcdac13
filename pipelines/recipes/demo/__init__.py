"""A fine-tune small enough for a laptop: tiny real pipelines that know four shapes and learn a fifth."""
