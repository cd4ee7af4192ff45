"""The set of digests behind exact duplicates."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_pipeline.stages.validated_rows.statistics import DigestSet
from sft_pipeline.stages.validated_rows.validate import KEY

# Few values, so that they repeat; zeros at the end, which NumPy does not show but must tell apart.
DIGESTS = st.integers(0, 300).map(lambda n: (b"%03d" % n).ljust(16, b"\0" if n % 2 else b"x"))


@given(batches=st.lists(st.lists(DIGESTS, max_size=40), max_size=12))
def test_the_first_of_equal_digests_is_new(batches: list[list[bytes]]) -> None:
    seen, known = DigestSet(), set[bytes]()
    for batch in batches:
        expected = []
        for digest in batch:
            expected.append(digest not in known)
            known.add(digest)
        assert seen.add(np.array(batch, KEY)).tolist() == expected
        assert len(seen) == len(known)


def test_a_hundred_thousand_digests_take_sixteen_bytes_each_in_few_arrays() -> None:
    some, seen = random.Random(1), DigestSet()
    digests = [some.randbytes(16) for _ in range(100_000)]
    for start in range(0, len(digests), 1_000):
        assert seen.add(np.array(digests[start : start + 1_000], KEY)).all()
    assert not seen.add(np.array(digests, KEY)).any() and len(seen) == 100_000
    assert sum(run.nbytes for run in seen._runs) == 1_600_000 and len(seen._runs) < 10
