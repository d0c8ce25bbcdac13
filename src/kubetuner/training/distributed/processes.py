"""The processes that train one model together: one per GPU, or one alone.

A batch is a function of (step, micro-step) alone, and so are its noise and its dropout. Of the micro-steps of an
optimizer step, W processes with G = ``gradient_accumulation_steps`` take turns: process r takes r, r + W, r + 2 W, and
so on. So they see what one process with W x G accumulation steps sees, in the same order, and all that differs is
the rounding of sums.

Weights and gradients travel between GPUs by NCCL. What the loop itself asks the others (``any``, ``all_of``, ``wait``)
travels between CPUs by gloo, so that no GPU is waited for.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kubetuner.config.sections.steps import TrainSection
from kubetuner.training.distributed.pulse import Pulse, read_limits
from kubetuner.training.distributed.sharding import shard

T = TypeVar("T")

# Who does not come is found and named by ``pulse``; NCCL and gloo give up a little later, and name nobody.
_LATER = timedelta(minutes=5)

_HARMLESS = (
    "Grad strides do not match bucket view strides",  # Of depthwise convolutions; they are copied.
    r"FSDP2-wrapped module .* returned a view tensor",  # Nothing is done in place to a prediction.
)


class Processes:
    """One process alone, and what several have in common.

    Attributes:
        rank: This process, from 0; the first writes checkpoints, metrics and the model.
        count: How many there are.
        sharded: Whether each holds only a part of every weight.
    """

    rank, count, sharded = 0, 1, False

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def micro_steps(self, accumulation: int) -> range:
        """This process's micro-steps of an optimizer step, ``accumulation`` of them."""
        return range(self.rank, accumulation * self.count, self.count)

    def network(self, denoiser: nn.Module) -> nn.Module:
        """What the loop asks instead of ``denoiser``, so that gradients become the mean over all processes.

        Under FSDP2 the denoiser's parameters are replaced in place: take them after this.

        Raises:
            InputError: The denoiser has not the blocks that are to be sharded.
        """
        return denoiser

    def accumulating(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around a micro-step: gradients are exchanged in the ``last`` one only."""
        return nullcontext()

    def sizes(self, own: Sequence[int]) -> tuple[int, ...]:
        """Samples of this process's micro-steps of an optimizer step, to those of all of the step's micro-steps."""
        return tuple(own)

    def gathered(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """One number per sample of this process, ``[n]``, to those of all, in the order of micro-steps of ``sizes``."""
        return values

    def all_of(self, items: Sequence[T], sizes: Sequence[int]) -> tuple[T, ...]:
        """As :meth:`gathered`, for anything; all processes must ask."""
        return tuple(items)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; all must ask."""
        return flag

    def in_step(self, asks: bool) -> bool:
        """Whether the network is to be asked now, without gradients: if this process ``asks``, or one must keep up.

        To ask a sharded network all processes must gather its weights together. So those that have nothing more to ask
        before they train on a batch ask all the same, and drop the answer, for as long as another one has.
        """
        return asks

    def wait(self) -> None:
        """Until all processes are here."""

    def from_first(self, value: T) -> T:
        """The first process's ``value``; all must ask."""
        return value


ALONE = Processes()


@contextmanager
def joined(section: TrainSection) -> Iterator[Processes]:
    """The processes that this one was started with (``torchrun``'s environment variables), or it alone.

    Raises:
        InputError: The environment's word on how long to wait for a process is no number.
    """
    if not is_one_of_several():
        yield ALONE
        return
    from accelerate import PartialState

    limits = read_limits(os.environ)
    patience = timedelta(seconds=limits.absent) + _LATER
    cuda = torch.cuda.is_available()
    state = PartialState(cpu=not cuda, backend="cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=patience)
    processes = _Together(section)
    with warnings.catch_warnings(), Pulse(processes.rank, processes.count, limits, lambda: processes.turns):
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message)
        yield processes
    state.destroy_process_group()


def of_group(section: TrainSection) -> Processes:
    """The processes of the group that this one has joined, for training by ``section``."""
    return _Together(section)


def is_one_of_several() -> bool:
    """Whether this process was started by ``torchrun`` or alike, as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class _Together(Processes):
    """Several processes: each with all weights (DDP), or each with a part of them (FSDP2).

    Attributes:
        turns: How often this process has come to where all must come.
    """

    def __init__(self, section: TrainSection) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        self.turns = 0
        self._fsdp = section.fsdp
        self.sharded = section.fsdp is not None
        self._sizes_differ = len(section.batch_sizes) > 1
        # Whole adapted layers are left out by chance then, and have no gradient.
        self._some_unused = section.lora is not None and section.lora.module_dropout > 0

    def network(self, denoiser: nn.Module) -> nn.Module:
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                distributed.broadcast(parameter.data, 0)
        if self._fsdp is not None:
            shard(denoiser, self._fsdp)
            return denoiser
        return _Replica(
            denoiser,
            forward_sync_buffers=False,
            init_sync=False,  # Only what is trained can differ, and frozen weights may be quantised.
            find_unused_parameters=self._some_unused,
            gradient_as_bucket_view=True,
        )

    @contextmanager
    def accumulating(self, network: nn.Module, last: bool) -> Iterator[None]:
        replica: Any = network
        self.turns += 1
        if self._fsdp is not None:
            replica.set_requires_gradient_sync(last)
            yield
        else:
            with nullcontext() if last else replica.no_sync():
                yield

    def sizes(self, own: Sequence[int]) -> tuple[int, ...]:
        if not self._sizes_differ:
            return tuple(own) * self.count
        self.turns += 1
        found = torch.empty(self.count * len(own), dtype=torch.int64)
        distributed.all_gather_single(found, torch.tensor(own))
        return tuple(found.reshape(self.count, -1).t().flatten().tolist())

    def gathered(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        self.turns += 1
        theirs = [list(sizes[rank :: self.count]) for rank in range(self.count)]
        most = max(map(sum, theirs))
        found = values.new_empty(self.count * most)
        distributed.all_gather_single(found, nn.functional.pad(values, (0, most - len(values))))
        rows = zip(found.reshape(self.count, most), theirs, strict=True)
        held = [iter(torch.split(row[: sum(part)], part)) for row, part in rows]
        return torch.cat([next(held[micro % self.count]) for micro in range(len(sizes))])

    def all_of(self, items: Sequence[T], sizes: Sequence[int]) -> tuple[T, ...]:
        self.turns += 1
        found: list[list[T]] = [[]] * self.count
        distributed.all_gather_object(found, list(items))
        held = [iter(one) for one in found]
        return tuple(next(held[micro % self.count]) for micro, size in enumerate(sizes) for _ in range(size))

    def any(self, flag: bool) -> bool:
        self.turns += 1
        told = torch.tensor(int(flag))
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
        return bool(told)

    def in_step(self, asks: bool) -> bool:
        return self.any(asks) if self.sharded else asks

    def wait(self) -> None:
        self.any(False)

    def from_first(self, value: T) -> T:
        self.turns += 1
        told = [value]
        distributed.broadcast_object_list(told, 0)
        return told[0]


class _Replica(DistributedDataParallel):
    """DDP that shows the network's own attributes, such as ``config``, which families read."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(cast(Any, self.module), name)
