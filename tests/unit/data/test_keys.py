import tracemalloc
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from kubetuner.artifacts import ShardEntry
from kubetuner.data.keys import Keys
from kubetuner.digests import fingerprint

# Digests that end in zeros are the ones that a fixed-width string could shorten.
DIGESTS = st.sampled_from([bytes(32), b"\1" + bytes(31), bytes(31) + b"\1", b"\xff" * 31 + b"\0", b"\xff" * 32])


def _shard(name: str) -> ShardEntry:
    return ShardEntry(file=f"{name}.safetensors", samples=1, bytes=1, sha256=name)


def _keys(keys: Iterable[str]) -> Keys:
    return Keys((place, key, 0) for place, key in enumerate(keys))


@given(st.lists(st.tuples(DIGESTS, st.booleans())), st.lists(DIGESTS, unique=True))
def test_keys_do_what_a_dictionary_does(added: list[tuple[bytes, bool]], others: list[bytes]) -> None:
    keys = _keys(digest.hex() for digest, _ in added)
    put = {digest.hex() for digest, is_put in added if is_put}
    first = {keys[place]: place for place in reversed(range(len(keys)))}
    assert [keys[place] for place in range(len(keys))] == [digest.hex() for digest, _ in added]
    assert keys.distinct == len(first)

    found = keys.numbers([digest.hex() for digest in others])
    keys.put(keys.numbers(put), _shard("old"))
    keys.put(keys.numbers(sorted(put)), _shard("new"))

    assert len(found) == len({digest for digest, _ in added} & set(others))
    placed = list(keys.placed())
    assert placed == [
        (place, digest.hex(), _shard("new") if digest.hex() in put else None) for place, (digest, _) in enumerate(added)
    ]
    assert list(keys.placed(once=True)) == [one for one in placed if one[0] in first.values()]
    assert keys.shards() == ((_shard("new"),) if put else ())
    assert list(keys.missing()) == sorted(first[key] for key in first if key not in put)
    assert list(keys.missing(by_key=True)) == [first[key] for key in sorted(first, reverse=True) if key not in put]
    for digest in others:
        assert keys.find(digest.hex()) == (_shard("new") if digest.hex() in put else None)
        assert len(keys.lacking([digest.hex()])) == (digest.hex() in first and digest.hex() not in put)


@given(st.lists(st.tuples(st.integers(0, 2**62), DIGESTS, st.integers(-9, 2**62)), unique_by=lambda one: one[0]))
def test_missing_keys_come_by_rank(entries: list[tuple[int, bytes, int]]) -> None:
    keys = Keys((place, digest.hex(), rank) for place, digest, rank in entries)
    first: dict[bytes, tuple[int, int]] = {}
    for place, digest, rank in sorted(entries):
        first.setdefault(digest, (rank, place))
    assert list(keys.missing()) == [place for _, place in sorted(first.values())]
    by_key = sorted(sorted(first, reverse=True), key=lambda digest: first[digest][0])
    assert list(keys.missing(by_key=True)) == [first[digest][1] for digest in by_key]


def test_shards_are_those_that_are_used() -> None:
    keys = _keys(fingerprint(number) for number in range(3))
    keys.put(keys.numbers([fingerprint(1), fingerprint(9)]), _shard("z"))
    keys.put(keys.numbers([fingerprint(9)]), _shard("unused"))
    keys.put(keys.numbers([fingerprint(0)]), _shard("a"))
    assert keys.shards() == (_shard("a"), _shard("z"))
    assert keys.find(fingerprint(2)) is None


def test_more_keys_are_asked_for_than_one_query_takes() -> None:
    wanted = [fingerprint(number) for number in range(2000)]
    keys = _keys(wanted)
    assert sorted(keys.numbers(wanted)) == list(range(2000))


def test_threads_ask_while_another_notes() -> None:
    wanted = [fingerprint(number) for number in range(3000)]
    keys = _keys(wanted)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(keys.numbers, wanted[at : at + 100]) for at in range(0, 3000, 100)]
        for at, one in zip(range(0, 3000, 100), asked, strict=True):
            assert sorted(one.result()) == list(range(at, at + 100))
            pool.submit(keys.put, one.result(), _shard(str(at))).result()
    assert not keys.missing()
    assert all(shard == _shard(str(place // 100 * 100)) for place, _, shard in keys.placed())


def test_keys_take_no_python_memory() -> None:
    tracemalloc.start()
    keys = _keys(fingerprint(number) for number in range(5000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(keys) == 5000
    assert peak < 20 * 5000
