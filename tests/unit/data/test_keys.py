import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from kubetuner.artifacts import ShardEntry
from kubetuner.data.keys import Keys
from kubetuner.digests import fingerprint

# Digests that end in zeros are the ones that a fixed-width string could shorten.
DIGESTS = st.sampled_from([bytes(32), b"\1" + bytes(31), bytes(31) + b"\1", b"\xff" * 31 + b"\0", b"\xff" * 32])


def _shard(name: str) -> ShardEntry:
    return ShardEntry(file=f"{name}.safetensors", samples=1, bytes=1, sha256=name)


@given(st.lists(st.tuples(DIGESTS, st.booleans())), st.lists(DIGESTS, unique=True))
def test_keys_do_what_a_dictionary_does(added: list[tuple[bytes, bool]], others: list[bytes]) -> None:
    keys = Keys(digest.hex() for digest, _ in added)
    put = {digest.hex() for digest, is_put in added if is_put}
    assert [keys[position] for position in range(len(keys))] == [digest.hex() for digest, _ in added]

    found = keys.numbers([digest.hex() for digest in others])
    keys.put(keys.numbers(put), _shard("old"))
    keys.put(keys.numbers(sorted(put)), _shard("new"))

    assert len(found) == len({digest for digest, _ in added} & set(others))
    for position, (digest, _) in enumerate(added):
        assert keys.shard(position) == (_shard("new") if digest.hex() in put else None)
    assert keys.shards() == ((_shard("new"),) if put else ())
    first = {keys[position]: position for position in reversed(range(len(keys)))}
    assert dict(zip(sorted(first), keys.firsts().tolist(), strict=True)) == first
    assert keys.missing().tolist() == [first[key] for key in sorted(first) if key not in put]


def test_shards_are_those_that_are_used() -> None:
    keys = Keys(fingerprint(number) for number in range(3))
    keys.put(keys.numbers([fingerprint(1), fingerprint(9)]), _shard("z"))
    keys.put(keys.numbers([fingerprint(9)]), _shard("unused"))
    keys.put(keys.numbers([fingerprint(0)]), _shard("a"))
    assert keys.shards() == (_shard("a"), _shard("z"))
    assert keys.shard(2) is None


def test_a_key_takes_less_than_sixty_bytes() -> None:
    tracemalloc.start()
    keys = Keys(fingerprint(number) for number in range(5000))
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 60 * len(keys)
    assert peak < 100 * len(keys)
