"""Labels of an epoch: many clips at once as each alone by the definition, frame by frame."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.labels import BLOCK, Ranges, Turns, epoch_labels, label_rule
from pipeline.schema import ROLES, draws, rate_threshold

events = st.lists(st.tuples(st.sampled_from(["assistant", "DST_UPDATE"]), st.integers(0, 30), st.integers(0, 9)))
rates = st.sampled_from([0.0, 0.3, 1.0])
clip = st.tuples(st.integers(0, 9), st.integers(1, 12), events, st.integers(0, 1), st.booleans(), rates)


def by_definition(number, start, size, turns, steps, onset, rate, epoch):
    """[2, size]; frames 3 and 4 were annotated by nobody."""
    drawn = draws(number, epoch, np.arange(start, start + size)) < np.uint64(rate_threshold(rate))
    tracked = steps or any(role == "DST_UPDATE" for role, *_ in turns)
    labels = []
    for head in ("assistant", "DST_UPDATE"):
        row = []
        for frame, kept in zip(range(start, start + size), drawn, strict=True):
            here = [(role == head, at == frame or not onset) for role, at, n in turns if at <= frame < at + n]
            if (True, True) in here:
                label = 1
            elif (True, False) in here:  # the rest of an onset
                label = -100
            else:
                label = 0 if kept or (False, True) in here else -100
            row.append(-100 if frame in (3, 4) or (head == "DST_UPDATE" and not tracked) else label)
        labels.append(row)
    return labels


@settings(max_examples=60, deadline=None)
@given(st.lists(clip, min_size=1, max_size=3), st.integers(0, 5))
def test_many_clips_have_the_labels_of_each_alone(some, epoch):
    clips = [some[i % len(some)] for i in range(BLOCK + 3)]  # more than are drawn at a time
    starts, sizes, steps, onset, rate = (np.array([c[k] for c in clips]) for k in (0, 1, 3, 4, 5))
    turns = [(i, ROLES.index(role), at, at + n) for i, c in enumerate(clips) for role, at, n in c[2]]
    rule = label_rule(
        Turns(*np.array(turns, np.int64).reshape(-1, 4).T),
        Ranges(np.arange(len(clips)), np.full(len(clips), 3), np.full(len(clips), 5)),
        starts=starts, sizes=sizes, seeds=np.arange(len(clips), dtype=np.uint64), rates=rate, steps=steps, onset=onset,
    )  # fmt: skip
    expected = [by_definition(i, *c, epoch) for i, c in enumerate(clips)]
    assert epoch_labels(rule, epoch).tolist() == np.concatenate(expected, axis=1).tolist()
