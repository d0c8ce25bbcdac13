import torch

from kubetuner.training.randomness import derive_seed, seed_dropout


def test_dropout_depends_on_the_step_and_on_nothing_before_it():
    seed_dropout(7, 3, 0)
    first = torch.rand(4)
    torch.rand(9)
    seed_dropout(7, 3, 0)
    assert torch.equal(torch.rand(4), first)
    seed_dropout(7, 3, 1)
    assert not torch.equal(torch.rand(4), first)


def test_dropout_draws_what_torchs_own_seeding_gives():
    seed_dropout(7, 3, 0)
    first = torch.rand(4)
    torch.manual_seed(derive_seed(7, "dropout", 3, 0))
    assert torch.equal(torch.rand(4), first)
