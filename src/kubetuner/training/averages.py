"""Averages of the trained weights (EMA)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kubetuner.config.sections.objective import EmaSettings
from kubetuner.errors import TrainingError
from kubetuner.training.distributed.sharding import part, spread


class Averages:
    """Float32 averages of parameters; they start as copies. All that changes them is the number of steps taken.

    Of a sharded parameter each process averages the part that it holds.

    Args:
        settings: Decay, interval and place.
        parameters: The trained ones, by name.
    """

    def __init__(self, settings: EmaSettings, parameters: Mapping[str, nn.Parameter]) -> None:
        self._settings, self._parameters = settings, parameters
        self.weights = {name: self._here(value).clone() for name, value in parameters.items()}

    def update(self, taken: int) -> None:
        """Follow the parameters after optimizer step ``taken`` (1 is the first)."""
        if taken % self._settings.update_interval == 0:
            follow = get_ema_multi_avg_fn(decay_after(self._settings, taken))  # type: ignore[no-untyped-call]
            follow(list(self.weights.values()), self._current(), torch.tensor(taken))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's averages.

        Raises:
            TrainingError: They are not of these parameters.
        """
        if weights.keys() != self.weights.keys():
            raise TrainingError("the checkpoint holds averages of other parameters; delete it to start afresh")
        for name, average in self.weights.items():
            average.copy_(part(spread(weights[name], self._parameters[name])))

    @torch.no_grad()
    def export(self) -> None:
        """Put the averages into the parameters."""
        for name, parameter in self._parameters.items():
            part(parameter).copy_(self.weights[name])

    def _current(self) -> Sequence[Tensor]:
        return [self._here(parameter) for parameter in self._parameters.values()]

    def _here(self, parameter: nn.Parameter) -> Tensor:
        return part(parameter.detach()).to("cpu" if self._settings.device == "cpu" else parameter.device)


def decay_after(settings: EmaSettings, taken: int) -> float:
    """The share of the old average that is kept after optimizer step ``taken``: 0 copies the weights.

    Without warmup it rises as (1 + s) / (10 + s), s = taken - 1, up to ``ema_decay``. With ``ema_warmup_steps`` it is 0
    before that step and ``ema_decay`` from it on.
    """
    if settings.warmup_steps > 0:
        return 0.0 if taken < settings.warmup_steps else settings.decay
    since = taken - 1
    return 0.0 if since <= 0 else min((1 + since) / (10 + since), settings.decay)
