"""A stand-in for torchaudio, which SimpleTuner imports for its music models and no image family calls."""

from torchaudio import transforms as transforms
