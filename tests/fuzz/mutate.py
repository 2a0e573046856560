"""Bytes with parts flipped, overwritten, cut, removed and repeated."""

from hypothesis import strategies as st

# Numbers that headers do not expect, as they stand in files.
NUMBERS = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1)
EXTREMES = [number.to_bytes(4, order) for number in NUMBERS for order in ("big", "little")]
PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
    st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("set"), PLACES, st.sampled_from(EXTREMES)),
    st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("remove"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("cut"), PLACES, st.none()),
)


def mutations(most: int = 6) -> st.SearchStrategy:
    """Lists of changes, for `mutate`. Half of them are near the beginning, where headers are."""
    near = CHANGES.map(lambda change: (change[0], change[1] ** 4, change[2]))
    return st.lists(st.one_of(CHANGES, near), max_size=most)


def mutate(data: bytes, changes: list) -> bytes:
    data = bytearray(data)
    for what, place, value in changes:
        at = int(place * len(data))
        if what == "flip" and data:
            data[at] ^= 1 << value
        elif what == "set":
            data[at : at + len(value)] = value
        elif what == "insert":
            data[at:at] = value
        elif what == "remove":
            del data[at : at + value]
        elif what == "repeat":
            data[at:at] = data[at : at + value]
        elif what == "cut":
            del data[at:]
    return bytes(data)
