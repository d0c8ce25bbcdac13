"""A stand-in for skrample, which needs Python 3.12; SimpleTuner calls it for scheduled sampling only."""

from skrample import scheduling as scheduling
