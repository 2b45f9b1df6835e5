"""The streaming cascade: every image's own answer, full batches, bounds, and nothing left behind however it ends."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench.photos import photos
from server.budget.controller import default_solution
from server.bundle.manifest import EMBEDDED, Bundle
from server.calibration.every_stage import every_stage
from server.core import ImageResult, Pixels
from server.engines import load_engine
from server.engines.fake import FakeEngine
from server.errors import BadImage, BudgetInfeasible, EngineFailed, InvalidRequest, ServeError
from server.frontend.images import ImageLimits
from server.offline import cascade as cascade_module
from server.offline.cascade import Cascade, to_pixels

HALF = {"thresholds": [0.5, 0.5]}
SURE, SECOND, LAST = (255,), (0, 255), (0, 0, 255)  # an image that leaves there


@pytest.fixture
def cascade(bundle: Bundle, engine: FakeEngine) -> Iterator[Cascade]:
    with Cascade(bundle, engine, HALF, decode_threads=2) as cascade:
        yield cascade
    assert engine.closed


def made(engine: FakeEngine, confidences: tuple[int, ...], number: int = 0) -> Pixels:
    return engine.image(*confidences, klass=number % 10)


def exits(answers: list[tuple[Any, ImageResult | ServeError]]) -> list[tuple[Any, int]]:
    return [(key, answer.exit) for key, answer in answers if isinstance(answer, ImageResult)]


def test_answers_come_in_the_order_of_the_images(cascade: Cascade, engine: FakeEngine) -> None:
    kinds = [LAST, SURE, SECOND, SURE, SURE] * 30
    images = [made(engine, kind, number) for number, kind in enumerate(kinds)]
    answers = list(cascade.classify(enumerate(images)))
    assert exits(answers) == [(number, len(kind)) for number, kind in enumerate(kinds)]
    assert [int(a.probabilities.argmax()) for _, a in answers if isinstance(a, ImageResult)] == [
        number % 10 for number in range(len(kinds))
    ]


def test_or_as_soon_as_they_are_known(cascade: Cascade, engine: FakeEngine) -> None:
    kinds = [LAST] + [SURE] * 99
    answers = list(cascade.classify(enumerate(made(engine, kind) for kind in kinds), in_order=False))
    assert sorted(exits(answers)) == [(number, len(kind)) for number, kind in enumerate(kinds)]
    assert answers[-1][0] == 0  # it waited for its stage to fill


def test_survivors_of_the_whole_stream_fill_the_batches_of_later_stages(cascade: Cascade, engine: FakeEngine) -> None:
    rng = np.random.default_rng(0)
    images = (made(engine, (SURE, SURE, SECOND, LAST)[rng.integers(4)]) for _ in range(400))
    list(cascade.classify(enumerate(images)))
    for stage, size in enumerate(engine.max_batch_sizes, start=1):
        filled = [len(batch.pixels) for batch in engine.batches if batch.stage == stage]
        assert [rows for rows in filled if rows != size] == filled[len(filled) - bool(sum(filled) % size) :]
    assert cascade.rows[0] == 400


@settings(deadline=None)
@given(
    confidences=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255)), max_size=60),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
    executors=st.integers(1, 3),
    slots=st.one_of(st.none(), st.integers(1, 8)),
    in_order=st.booleans(),
    bad=st.sets(st.integers(0, 59)),
)
def test_an_answer_is_the_same_alone_and_in_any_company(
    bundle: Bundle,
    confidences: list[tuple[int, int, int]],
    sizes: tuple[int, int, int],
    executors: int,
    slots: int | None,
    in_order: bool,
    bad: set[int],
) -> None:
    engine = FakeEngine(max_batch_sizes=sizes)
    engine.executors, engine.max_slots = executors, slots
    images: list[Any] = [engine.image(*those, klass=number) for number, those in enumerate(confidences)]
    images = [b"no image" if number in bad else image for number, image in enumerate(images)]
    with Cascade(bundle, engine, HALF, decode_threads=2) as cascade:
        together = list(cascade.classify(enumerate(images), in_order=in_order))
        alone = [next(iter(cascade.classify([(number, image)]))) for number, image in enumerate(images)]
        assert engine.slots_in_use == 0
    if in_order:
        assert [key for key, _ in together] == list(range(len(images)))
    assert [told(one) for one in sorted(together, key=lambda one: one[0])] == [told(one) for one in alone]
    assert all(len(batch.pixels) <= sizes[batch.stage - 1] for batch in engine.batches)


def told(one: tuple[int, ImageResult | ServeError]) -> tuple[Any, ...]:
    key, answer = one
    if isinstance(answer, ServeError):
        return key, answer.code
    return key, answer.exit, answer.confidence, answer.probabilities.tobytes(), answer.confidences


def test_an_endless_stream_is_answered_and_never_runs_far_ahead(cascade: Cascade, engine: FakeEngine) -> None:
    pulled = 0

    def source() -> Iterator[tuple[int, Pixels]]:
        nonlocal pulled
        for number in itertools.count():
            pulled += 1
            # The first waits for survivors that do not come: in order, it holds up all the others.
            yield number, made(engine, LAST if number == 0 else SURE)

    answers = cascade.classify(source())
    ahead = []
    for given_, (number, _) in enumerate(itertools.islice(answers, 6000)):
        assert given_ == number
        ahead.append(pulled - given_)
    answers.close()
    assert max(ahead) <= 2048 + 1
    assert engine.slots_in_use == 0


def test_few_images_are_alive_at_once(cascade: Cascade, engine: FakeEngine) -> None:
    """Two batches of the first stage that run and two that are next, one of each later stage, what is decoded."""
    pulled = 0

    def source() -> Iterator[tuple[int, Pixels]]:
        nonlocal pulled
        for pulled in range(1, 5001):
            yield pulled, made(engine, (SURE, SURE, LAST)[pulled % 3])

    answers = cascade.classify(source(), in_order=False)
    assert max(pulled - given_ for given_, _ in enumerate(answers, start=1)) < 60


def test_what_is_no_image_is_told_in_its_place(cascade: Cascade, engine: FakeEngine, tmp_path: Any) -> None:
    images: list[Any] = [made(engine, SURE), b"", tmp_path / "missing.jpg", tmp_path, None, made(engine, SURE)]
    images += [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8), "\0"]
    answers = list(cascade.classify(enumerate(images)))
    assert exits(answers) == [(0, 1), (5, 1)]
    errors = [answer for _, answer in answers if isinstance(answer, ServeError)]
    assert all(isinstance(error, BadImage) for error in errors)
    assert errors[1].detail == "The file cannot be read: no such file or directory"
    assert errors[3].detail == "The image cannot be decoded: a NoneType is no image"


def test_an_array_may_be_used_again_for_the_next_image(cascade: Cascade, engine: FakeEngine) -> None:
    one = made(engine, SURE)

    def source() -> Iterator[tuple[int, Pixels]]:
        for number in range(100):
            one[0, 1, 0] = number % 10
            yield number, one

    classes = [int(answer.probabilities.argmax()) for _, answer in cascade.classify(source())]  # type: ignore[union-attr]
    assert classes == [number % 10 for number in range(100)]


def test_an_engine_that_fails_ends_the_stream_and_leaves_nothing_behind(cascade: Cascade, engine: FakeEngine) -> None:
    images = [made(engine, LAST)] * 50
    engine.fail_next = 1
    with pytest.raises(EngineFailed, match="told to fail"):
        list(cascade.classify(enumerate(images)))
    assert engine.slots_in_use == 0
    assert len(list(cascade.classify(enumerate(images)))) == 50


def test_what_the_source_raises_is_raised(cascade: Cascade, engine: FakeEngine) -> None:
    def source() -> Iterator[tuple[int, Pixels]]:
        for number in range(50):
            yield number, made(engine, LAST)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(cascade.classify(source()))
    assert engine.slots_in_use == 0


def test_who_has_seen_enough_may_stop(cascade: Cascade, engine: FakeEngine) -> None:
    answers = cascade.classify((number, made(engine, LAST)) for number in itertools.count())
    assert [next(answers)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    answers.close()
    assert engine.slots_in_use == 0


def test_a_cascade_that_is_closed_ends_its_stream(bundle: Bundle, engine: FakeEngine) -> None:
    """As where what is done with an answer fails: the generator goes after the cascade."""
    with Cascade(bundle, engine, HALF) as cascade:
        answers = cascade.classify((number, made(engine, LAST)) for number in itertools.count())
        next(answers)
    assert engine.closed
    with pytest.raises(RuntimeError, match="the cascade is closed"):
        list(answers)
    del answers


def test_streams_take_turns(cascade: Cascade, engine: FakeEngine) -> None:
    first = cascade.classify(enumerate([made(engine, SURE)] * 3))
    next(first)
    with pytest.raises(RuntimeError, match="one stream at a time"):
        next(cascade.classify([(0, made(engine, SURE))]))
    assert len(list(first)) == 2
    assert len(list(cascade.classify([(0, made(engine, SURE))]))) == 1


def test_no_images_are_no_answers(cascade: Cascade) -> None:
    assert list(cascade.classify([])) == []


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ({"latency_ms": 25}, InvalidRequest),
        ({"gmacs": 1e-9}, BudgetInfeasible),
        ({"gmacs": 0.05, "accuracy": 0.5}, InvalidRequest),
        ({}, InvalidRequest),
    ],
)
def test_a_target_that_cannot_be_is_refused(
    bundle: Bundle, engine: FakeEngine, target: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Cascade(bundle, engine, target)


def test_without_a_target_it_is_the_one_that_a_server_starts_with(bundle: Bundle, engine: FakeEngine) -> None:
    with Cascade(bundle, engine) as cascade:
        assert cascade.solution == default_solution(bundle.frontier)


def test_the_embedded_model_answers_as_it_does_image_by_image() -> None:
    files = photos(20)
    bundle = Bundle.load(EMBEDDED)
    engine = load_engine(bundle, engine="onnx")
    with Cascade(bundle, engine, {"thresholds": [0.6, 0.5]}) as cascade:
        answers = list(cascade.classify(enumerate(files)))
        for number, answer in answers:
            pixels = to_pixels(files[number], bundle.preprocessing, ImageLimits())
            stages = list(every_stage(engine, [pixels]))
            exit_ = next(
                at for at, threshold in enumerate((0.6, 0.5, 0.0), start=1) if stages[at - 1].confidence[0] >= threshold
            )
            assert isinstance(answer, ImageResult)
            assert answer.exit == exit_
            assert np.array_equal(answer.probabilities, stages[exit_ - 1].probabilities[0])


def test_few_pictures_wait_to_be_decoded(bundle: Bundle, engine: FakeEngine) -> None:
    """They are held in the size that they came in."""
    asked = threading.Semaphore(0)
    more = []

    class Late(os.PathLike[str]):
        """The thread that decodes is at this one while four are held, and no more are asked for."""

        def __fspath__(self) -> str:
            for _ in range(4):
                asked.acquire()
            more.append(asked.acquire(timeout=0.1))
            return "/missing"

    def source() -> Iterator[tuple[int, Any]]:
        for number in range(40):
            asked.release()
            yield number, Late() if number == 0 else made(engine, SURE)

    with Cascade(bundle, engine, HALF, decode_threads=1) as cascade:
        assert len(list(cascade.classify(source()))) == 40
    assert more == [False]


def test_an_interrupt_between_any_two_lines_ends_the_stream_and_is_waited_for_by_nobody(bundle: Bundle) -> None:
    kinds = [SURE, LAST, SECOND] * 4

    def interrupted_at(line: int) -> bool:
        """Whether there was such a line."""
        seen = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:  # noqa: ARG001
            nonlocal seen
            if frame.f_code.co_filename != cascade_module.__file__:
                return None
            if event == "line" and not frame.f_code.co_name.startswith("close"):
                seen += 1
                if seen == line:
                    raise KeyboardInterrupt
            return trace

        engine = FakeEngine(max_batch_sizes=(4, 2, 2))
        with Cascade(bundle, engine, HALF, decode_threads=2) as cascade:
            stream = cascade.classify(enumerate(made(engine, kind) for kind in kinds))
            sys.settrace(trace)
            try:
                list(stream)
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(None)
            return False

    within = threading.Thread(target=lambda: all(map(interrupted_at, itertools.count(1, 7))), daemon=True)
    within.start()
    within.join(60)
    assert not within.is_alive()
