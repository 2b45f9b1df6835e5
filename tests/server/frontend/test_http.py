"""The HTTP contract, in process: every body form, every error, budgets, probes, documents."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from server import commands
from server.app import create_app
from server.budget.drift import ENOUGH
from server.bundle.manifest import Bundle
from server.core import StageBatch, StageOutput
from server.engines.fake import FakeEngine
from server.frontend import images, schemas
from server.frontend.routes import ROUTES
from server.settings import Settings

Photo = Callable[..., bytes]
SURE, UNSURE = 255, 10
REFRESH = "refresh it: dvt serve, and: curl localhost:8000/openapi.json | python -m json.tool > docs/openapi.json"


def problem_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document, checked for what every one of them has."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), (
        response.text
    )
    body = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert body["type"] == f"urn:dvt-serve:problem:{code}"
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def in_json(*files: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(file).decode() for file in files]}).encode()


def form(*files: bytes, name: str = "image") -> list[tuple[str, tuple[str, bytes, str]]]:
    return [(name, (f"{index}.png", file, "image/png")) for index, file in enumerate(files)]


async def audits_done(served: Any) -> None:
    """Wait until no audit is under way."""
    while (task := served.service.audit._task) is not None:
        await asyncio.wait([task])


class TestAnswers:
    async def test_an_answer_has_every_field_of_the_contract(self, served: Any, photo: Photo) -> None:
        response = await served.classify(photo(SURE, klass=3))
        assert response.status_code == 200
        body = response.json()
        schemas.Classification.model_validate(body, strict=True)
        assert (body["model"], body["version"]) == ("fake-dvt", served.service.bundle.manifest.version)
        (result,) = body["results"]
        assert result["predictions"][0] == {"label": "label3", "class_id": 3, "probability": 1.0}
        assert len(result["predictions"]) == 5
        assert (result["exit"], result["confidence"], result["degraded"], result["gmacs"]) == (1, 1.0, False, 0.01)

    async def test_the_exit_and_its_cumulative_cost_follow_the_confidences(self, served: Any, photo: Photo) -> None:
        files = [photo(SURE), photo(UNSURE, SURE), photo(UNSURE, UNSURE, UNSURE)]
        results = (await served.classify(in_json(*files), "application/json")).json()["results"]
        assert [(result["exit"], result["gmacs"]) for result in results] == [(1, 0.01), (2, 0.03), (3, 0.08)]

    async def test_the_three_body_forms_give_equal_answers(self, served: Any, photo: Photo) -> None:
        file = photo(UNSURE, SURE, klass=7)
        answers = [
            await served.classify(file),
            await served.http.post("/classify", files=form(file)),
            await served.classify(in_json(file), "application/json"),
        ]
        bodies = [answer.json() for answer in answers]
        for body in bodies:
            body["results"][0].pop("timing_ms")
        assert bodies[0] == bodies[1] == bodies[2]

    @pytest.mark.parametrize("as_form", [True, False])
    async def test_many_images_are_answered_in_order(self, served: Any, photo: Photo, as_form: bool) -> None:
        classes = [index % 10 for index in range(40)]
        files = [photo(*((SURE,) if klass % 2 else (UNSURE, SURE)), klass=klass) for klass in classes]
        if as_form:
            response = await served.http.post("/classify", files=form(*files))
        else:
            response = await served.classify(in_json(*files), "application/json")
        found = [result["predictions"][0]["class_id"] for result in response.json()["results"]]
        assert found == classes

    async def test_top_k_is_bounded_by_the_number_of_classes(self, served: Any, photo: Photo) -> None:
        for asked, given in ((1, 1), (10, 10), (1000, 10)):
            response = await served.classify(photo(SURE), params={"top_k": asked})
            assert len(response.json()["results"][0]["predictions"]) == given

    async def test_max_exit_goes_no_deeper_and_min_confidence_replaces_the_thresholds(
        self, served: Any, photo: Photo
    ) -> None:
        async def exit_of(*confidences: int, **params: Any) -> int:
            exit_: int = (await served.classify(photo(*confidences), params=params)).json()["results"][0]["exit"]
            return exit_

        assert await exit_of(UNSURE, UNSURE, UNSURE, max_exit=2) == 2
        assert await exit_of(200, 200, 200, min_confidence=0.9) == 3
        assert await exit_of(UNSURE, UNSURE, UNSURE, min_confidence=0) == 1

    async def test_a_deadline_answers_with_the_best_so_far(self, serve: Any, engine: FakeEngine, photo: Photo) -> None:
        async with serve() as served:
            engine.gates[2].clear()
            response = await served.classify(photo(UNSURE, SURE), params={"timeout_ms": 100})
            (result,) = response.json()["results"]
            assert (result["exit"], result["degraded"]) == (1, True)
            engine.open_gates()

    async def test_base64_is_taken_as_people_write_it(self, served: Any, photo: Photo) -> None:
        texts = [
            base64.encodebytes(photo(SURE, klass=1)).decode(),  # in lines
            base64.urlsafe_b64encode(photo(SURE, klass=2)).decode().rstrip("="),
            f"data:image/png;base64,{base64.b64encode(photo(SURE, klass=3)).decode()}",
        ]
        response = await served.classify(json.dumps({"images": texts}).encode(), "application/json")
        assert [result["predictions"][0]["class_id"] for result in response.json()["results"]] == [1, 2, 3]

    async def test_a_file_is_taken_under_any_name(self, served: Any, photo: Photo) -> None:
        files = [*form(photo(SURE, klass=1), name="file"), *form(photo(SURE, klass=2), name="photo")]
        response = await served.http.post("/classify", files=files)
        assert [result["predictions"][0]["class_id"] for result in response.json()["results"]] == [1, 2]

    async def test_the_body_is_read_however_it_is_cut(self, served: Any, photo: Photo) -> None:
        one = httpx.Request("POST", "http://dvt/classify", files=form(photo(SURE, klass=4), photo(SURE, klass=5)))
        content = one.read()

        async def drops() -> AsyncIterator[bytes]:
            for at in range(0, len(content), 7):
                yield content[at : at + 7]

        response = await served.http.post(
            "/classify", content=drops(), headers={"content-type": one.headers["content-type"]}
        )
        assert [result["predictions"][0]["class_id"] for result in response.json()["results"]] == [4, 5]


class TestRequestIds:
    async def test_a_good_id_is_taken_and_returned(self, served: Any, photo: Photo) -> None:
        response = await served.classify(photo(SURE), headers={"x-request-id": "a.B_c-1"})
        assert response.headers["x-request-id"] == "a.B_c-1"

    @pytest.mark.parametrize("bad", ["", "a b", "ü", "x" * 65, "a/b", "a\n"])
    async def test_another_is_replaced(self, served: Any, bad: str) -> None:
        response = await served.http.get("/livez", headers=[(b"x-request-id", bad.encode())])
        assert response.headers["x-request-id"] != bad
        assert len(response.headers["x-request-id"]) == 32

    @pytest.mark.parametrize("path", ["/nowhere", "/classify", "/docs/assets/nothing.js", "/docs/assets/../x"])
    async def test_errors_carry_it_too(self, served: Any, path: str) -> None:
        response = await served.http.get(path, headers={"x-request-id": "mine"})
        assert response.json()["request_id"] == "mine"


class TestRefusals:
    async def test_what_is_no_image_is_named_by_index_and_reason(self, served: Any, photo: Photo) -> None:
        body = problem_of(await served.classify(photo(SURE)[:40]), 400, "bad_image")
        assert body["index"] == 0
        assert body["reason"]
        files = [photo(SURE), photo(SURE), b"\x89PNG\r\n\x1a\n", b""]
        for response in (
            await served.http.post("/classify", files=form(*files)),
            await served.classify(in_json(*files), "application/json"),
        ):
            assert problem_of(response, 400, "bad_image")["index"] == 2

    async def test_an_empty_body_is_a_bad_image(self, served: Any) -> None:
        problem_of(await served.classify(b""), 400, "bad_image")

    async def test_an_image_is_too_large_by_its_header(self, serve: Any, photo: Photo) -> None:
        async with serve(max_pixels=63) as served:
            body = problem_of(await served.http.post("/classify", files=form(photo(SURE))), 413, "image_too_large")
            assert body["index"] == 0

    async def test_a_body_is_too_large_by_what_it_states_and_by_what_it_is(self, serve: Any) -> None:
        async def endless() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield bytes(100)

        async with serve(max_body_bytes=1000) as served:
            problem_of(await served.classify(bytes(1001)), 413, "body_too_large")
            response = await served.http.post("/classify", content=endless(), headers={"content-type": "image/png"})
            problem_of(response, 413, "body_too_large")
            assert served.service.intake.held_bytes == 0

    @pytest.mark.parametrize(
        ("stated", "status"), [("1001", 413), ("0" * 30 + "1001", 413), ("9" * 5000, 413), ("³", 400), ("٣", 400)]
    )
    async def test_a_length_is_stated_in_plain_digits(self, serve: Any, stated: str, status: int) -> None:
        async with serve(max_body_bytes=1000) as served:
            headers = [(b"content-type", b"image/png"), (b"content-length", stated.encode())]
            response = await served.http.post("/classify", content=b"x", headers=headers)
            assert response.status_code == status

    async def test_too_many_images_are_refused(self, serve: Any, photo: Photo) -> None:
        async with serve(max_images=2) as served:
            files = [photo(SURE)] * 3
            problem_of(await served.http.post("/classify", files=form(*files)), 413, "too_many_images")
            problem_of(await served.classify(in_json(*files), "application/json"), 413, "too_many_images")

    @pytest.mark.parametrize(
        "headers",
        [
            {"content-type": "text/plain"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "image/svg+xml"},
            {"content-type": "image/jpeg"},  # it is a PNG
            {},
            {"content-type": "image/png", "content-encoding": "gzip"},
        ],
    )
    async def test_other_media_types_are_refused(self, served: Any, photo: Photo, headers: dict[str, str]) -> None:
        response = await served.http.post("/classify", content=photo(SURE), headers=headers)
        problem_of(response, 415, "unsupported_media_type")

    @pytest.mark.parametrize(
        "body",
        [
            "", "[]", "{}", '{"images": []}', '{"images": "x"}', '{"images": [1]}', '{"images": ["x"], "top_k": 1}',
            '{"images": ["%%%"]}', '{"images": ["Y"]}', "{" * 50, "[" * 100_000, '{"images": NaN}',
        ],
    )  # fmt: skip
    async def test_json_of_another_form_is_refused(self, served: Any, body: str) -> None:
        problem_of(await served.classify(body.encode(), "application/json"), 422, "invalid_request")

    async def test_bad_base64_names_its_index(self, served: Any, photo: Photo) -> None:
        texts = [base64.b64encode(photo(SURE)).decode(), "no base64!"]
        response = await served.classify(json.dumps({"images": texts}).encode(), "application/json")
        body = problem_of(response, 422, "invalid_request")
        assert body["index"] == 1
        assert body["detail"] == "images[1] is not valid base64: '!' at position 9"

    async def test_a_data_url_is_held_to_its_media_type(self, served: Any, photo: Photo) -> None:
        text = base64.b64encode(photo(SURE)).decode()
        texts = [f"data:image/png;base64,{text}", f"data:image/jpeg;base64,{text}"]
        response = await served.classify(json.dumps({"images": texts}).encode(), "application/json")
        body = problem_of(response, 415, "unsupported_media_type")
        assert (body["index"], body["detail"]) == (1, "Content-Type says image/jpeg, the data is image/png")

    async def test_a_text_field_is_refused_by_its_name(self, served: Any, photo: Photo) -> None:
        response = await served.http.post("/classify", files=form(photo(SURE)), data={"top_k": "1"})
        body = problem_of(response, 422, "invalid_request")
        assert (body["field"], body["detail"]) == (
            "top_k", "Every part must be an image file; 'top_k' is a text field"
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            ("multipart/form-data", b"x"),
            ("multipart/form-data; boundary=b", b""),
            ("multipart/form-data; boundary=b", b"no boundary here"),
            ("multipart/form-data; boundary=b", b"--b--\r\n"),
            ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nhalf'),
            (
                "multipart/form-data; boundary=b",
                b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n1\r\n--b--',
            ),
            ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n"),
            ("multipart/form-data; boundary=b", b"--b\r\n" + b"a: b\r\n" * 100 + b"\r\nx\r\n--b--\r\n"),
            ("multipart/form-data; boundary=" + "b" * 300, b"x"),
        ],
    )
    async def test_forms_that_are_broken_are_refused(self, served: Any, content_type: str, body: bytes) -> None:
        problem_of(await served.classify(body, content_type), 422, "invalid_request")

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            ("top_k=0", "top_k"), ("top_k=-1", "top_k"), ("top_k=x", "top_k"), ("top_k=1.5", "top_k"),
            ("top_k=", "top_k"),
            ("timeout_ms=0", "timeout_ms"), ("timeout_ms=nan", "timeout_ms"), ("timeout_ms=30001", "timeout_ms"),
            ("max_exit=0", "max_exit"), ("max_exit=4", "max_exit"), ("min_confidence=1.1", "min_confidence"),
            ("min_confidence=inf", "min_confidence"), ("topk=1", "topk"), ("top_k=1&top_k=2", "top_k"),
            ("priority=urgent", "priority"), ("priority=3", "priority"),
            *((f"{name}={text}", name) for name in ("timeout_ms", "min_confidence") for text in (
                "", ".", "-1", "%2B1", "1e0", "1_0", "%201", "1%20", "1%0A", "0x1", "%D9%A1", "%EF%BC%91", "%C2%B9",
                "infinity", "1,0", "9" * 400,
            )),
            ("top_k=%D9%A1", "top_k"), ("top_k=1_0", "top_k"), ("top_k=%2B1", "top_k"), ("top_k=1%0A", "top_k"),
        ],
    )  # fmt: skip
    async def test_a_bad_query_names_the_parameter(self, served: Any, photo: Photo, query: str, field: str) -> None:
        response = await served.http.post(
            f"/classify?{query}", content=photo(SURE), headers={"content-type": "image/png"}
        )
        body = problem_of(response, 422, "invalid_request")
        assert body["field"] == field
        assert field in body["detail"]

    async def test_nothing_at_the_path_or_not_by_this_method(self, served: Any) -> None:
        problem_of(await served.http.get("/nowhere"), 404, "not_found")
        response = await served.http.get("/classify")
        problem_of(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST, OPTIONS"

    async def test_a_full_queue_refuses_before_decoding(self, serve: Any, engine: FakeEngine, photo: Photo) -> None:
        async with serve(max_queued_images=8, max_images=8) as served:
            engine.gates[1].clear()
            running = [asyncio.create_task(served.classify(photo(SURE)))]
            await asyncio.to_thread(engine.began.acquire)
            running.append(asyncio.create_task(served.classify(in_json(*[photo(SURE)] * 8), "application/json")))
            while served.service.batcher.load.waiting[0] < 8:
                await asyncio.sleep(0)
            response = await served.classify(b"not even an image")
            problem_of(response, 503, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
            engine.open_gates()
            assert [answer.status_code for answer in await asyncio.gather(*running)] == [200, 200]

    async def test_low_priority_is_no_load_and_its_time_no_measure(self, served: Any, photo: Photo) -> None:
        machine = served.service.machine
        assert (await served.classify(photo(SURE), params={"priority": "low"})).status_code == 200
        assert machine.given.value == machine.elsewhere.value == 0
        for priority in ("normal", "high"):
            assert (await served.classify(photo(SURE), params={"priority": priority})).status_code == 200
        assert machine.given.value > 0
        assert machine.elsewhere.value > 0
        assert (await served.http.get("/budget")).json()["observed"]["images"] == 3, "it is in what is observed"

    async def test_the_door_bounds_requests_and_bytes(self, serve: Any, engine: FakeEngine, photo: Photo) -> None:
        async with serve(max_requests=1) as served:
            engine.gates[1].clear()
            running = asyncio.create_task(served.classify(photo(SURE)))
            await asyncio.to_thread(engine.began.acquire)
            problem_of(await served.classify(photo(SURE)), 503, "overloaded")
            assert (await served.http.get("/livez")).status_code == 200  # probes and budgets are not work
            engine.open_gates()
            assert (await running).status_code == 200
        assert served.service.intake.held_bytes == 0

    async def test_a_deadline_without_a_prediction_is_504(self, serve: Any, engine: FakeEngine, photo: Photo) -> None:
        async with serve() as served:
            engine.gates[1].clear()
            problem_of(await served.classify(photo(SURE), params={"timeout_ms": 30}), 504, "deadline_exceeded")
            engine.open_gates()

    async def test_a_deadline_counts_while_an_image_is_decoded(self, served: Any) -> None:
        stream = io.BytesIO()
        Image.new("RGB", (2200, 2200)).save(stream, "PNG")
        large = stream.getvalue()
        with images._large_image:  # its turn does not come
            response = await served.classify(large, params={"timeout_ms": 50})
        problem_of(response, 504, "deadline_exceeded")

    async def test_an_engine_that_fails_fails_that_batch_only(
        self, served: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        engine.fail_next = 1
        body = problem_of(await served.classify(photo(SURE)), 500, "engine_failed")
        assert "told to fail" not in json.dumps(body)
        assert (await served.classify(photo(SURE))).status_code == 200

    async def test_what_nobody_foresaw_is_500_without_a_trace(
        self, served: Any, photo: Photo, caplog: pytest.LogCaptureFixture
    ) -> None:
        served.service.stage_gmacs = ()  # a bug: the exit has no cost
        response = await served.classify(photo(SURE), headers={"x-request-id": "look-here"})
        body = problem_of(response, 500, "internal_error")
        assert not {"IndexError", "Traceback", "routes.py"} & set(response.text.replace('"', " ").split())
        assert body["request_id"] == "look-here"
        assert "look-here" in caplog.text
        assert "IndexError" in caplog.text


class TestBudget:
    async def test_the_answer_has_every_field_and_an_etag(self, served: Any) -> None:
        response = await served.http.get("/budget")
        schemas.Budget.model_validate(response.json(), strict=True)
        assert response.headers["etag"] == f'"{response.json()["version"]}"'

    async def test_observed_counts_images_under_this_budget(self, served: Any, photo: Photo) -> None:
        await served.classify(photo(SURE))
        body = (await served.http.get("/budget")).json()
        schemas.Budget.model_validate(body, strict=True)
        assert body["observed"]["images"] == 1
        assert body["observed"]["exit_fractions"] == [1.0, 0.0, 0.0]

    async def test_audits_go_on_behind_the_answers_and_start_anew_with_a_budget(self, serve: Any, photo: Photo) -> None:
        async with serve(audit_fraction=1) as served:
            early = photo(SURE, SURE, 10, klass=3)  # the last exit gives another class
            for params in ({}, {"max_exit": 1}, {"min_confidence": 0.2}):
                assert (await served.classify(early, params=params)).json()["results"][0]["exit"] == 1
            await audits_done(served)
            body = (await served.http.get("/budget")).json()
            schemas.Budget.model_validate(body, strict=True)
            assert (body["audit"]["images"], body["audit"]["pending"]) == (1, 0), (
                "of steered requests there is no audit"
            )
            assert body["audit"]["agreement"]["mean"] == 0
            assert body["audit"]["accuracy_gap"]["low"] == 0 < body["audit"]["accuracy_gap"]["mean"]
            assert body["observed"]["images"] == 3
            assert await served.metric("dvt_images_total", exit="1", degraded="false") == 3
            assert await served.metric("dvt_images_total", exit="3", degraded="false") == 0
            assert await served.metric("dvt_audited_images_total") == 1
            assert await served.metric("dvt_audit_accuracy_gap", bound="mean") == body["audit"]["accuracy_gap"]["mean"]
            audit = (await served.http.put("/budget", json={"gmacs": 0.03})).json()["audit"]
            assert (audit["images"], audit["agreement"]) == (0, {"mean": None, "low": None, "high": None})
            assert (audit["chosen"], audit["audited_ratio"]) == (0, None)
            assert audit["since_start"] == {name: body["audit"][name] for name in audit["since_start"]}
            told = commands._describe_budget((await served.http.get("/budget")).json())
            assert "audited  " not in told
            assert "all budgets 1 images for 1 of 1 chosen requests, agreement with the last exit 0" in told

    async def test_who_always_sends_the_same_id_is_audited_as_often_as_others(self, serve: Any, photo: Photo) -> None:
        async with serve(audit_fraction=0.5) as served:
            for headers in [{"x-request-id": "mine"}] * 60:
                await served.classify(photo(SURE), headers=headers)
            await audits_done(served)
            audit = (await served.http.get("/budget")).json()["audit"]
            assert 5 < audit["chosen"] == audit["images"] < 55

    async def test_an_audit_does_not_hold_up_the_end(self, serve: Any, engine: FakeEngine, photo: Photo) -> None:
        async with serve(audit_fraction=1) as served:
            engine.gates[2].clear()
            await served.classify(photo(SURE))
            for _ in range(3):  # the answer's batch, and the audit's first two
                await asyncio.to_thread(engine.began.acquire)
            await asyncio.wait_for(served.service.drain(30), 10)
            assert await served.metric("dvt_images_abandoned_total", reason="disconnect") == 0

    async def test_drift_is_told_once_there_are_images_enough(self, serve: Any, photo: Photo) -> None:
        async with serve() as served:
            body = in_json(*[photo(SURE)] * 64)
            for _ in range(ENOUGH // 64):
                await served.classify(body, "application/json")
            drift = (await served.http.get("/budget")).json()["drift"]
            assert drift == {"images": 448, "psi": None, "z": None, "alarm": False, "reasons": []}
            await served.classify(body, "application/json")
            state = (await served.http.get("/budget")).json()
            schemas.Budget.model_validate(state, strict=True)
            assert state["drift"]["reasons"] == ["psi", "exit_fractions"]
            assert await served.metric("dvt_drift_alarm") == 1
            assert await served.metric("dvt_drift_z", exit="1") == state["drift"]["z"][0] > 4
            # A new budget expects other fractions of the images to come; what was seen stays seen.
            assert (await served.http.put("/budget", json={"gmacs": 0.03})).json()["drift"] == state["drift"]

    @pytest.mark.parametrize("target", [{"gmacs": 0.03}, {"accuracy": 0.6}, {"thresholds": [0.9, 0.7]}])
    async def test_each_target_can_be_set(self, served: Any, target: dict[str, Any]) -> None:
        response = await served.http.put("/budget", json={**target, "hold": "quality"})
        body = response.json()
        assert response.status_code == 200, body
        assert (body["target"], body["hold"]) == (target, "quality")
        assert (await served.http.get("/budget")).json() == body

    async def test_a_swap_is_visible_in_the_next_answer(self, served: Any, photo: Photo) -> None:
        before = (await served.classify(photo(100, SURE))).json()
        assert (before["budget_version"], before["results"][0]["exit"]) == (2, 2)
        version = (await served.http.put("/budget", json={"thresholds": [0.2, 0.2]})).json()["version"]
        after = (await served.classify(photo(100, SURE))).json()
        assert (after["budget_version"], after["results"][0]["exit"]) == (version, 1)

    async def test_if_match_lets_only_the_first_of_two_writers_through(self, served: Any) -> None:
        etag = (await served.http.get("/budget")).headers["etag"]
        first = await served.http.put("/budget", json={"gmacs": 0.03}, headers={"if-match": etag})
        assert first.status_code == 200
        second = await served.http.put("/budget", json={"gmacs": 0.05}, headers={"if-match": etag})
        problem_of(second, 412, "version_mismatch")
        new = first.headers["etag"]
        for good in ("{}", "*", '"1", {}'):
            if_match = good.format(new)
            response = await served.http.put("/budget", json={"gmacs": 0.05}, headers={"if-match": if_match})
            assert response.status_code == 200
            new = response.headers["etag"]
        weak = await served.http.put("/budget", json={"gmacs": 0.05}, headers={"if-match": f"W/{new}"})
        problem_of(weak, 412, "version_mismatch")

    async def test_if_match_may_stand_on_several_lines(self, served: Any) -> None:
        etag = (await served.http.get("/budget")).headers["etag"]
        for lines, status in ((['"x"', '"y"'], 412), (['"x"', etag], 200)):
            headers = [("if-match", line) for line in lines]
            response = await served.http.put("/budget", json={"gmacs": 0.05}, headers=headers)
            assert response.status_code == status

    async def test_out_of_reach_says_what_is_feasible(self, served: Any) -> None:
        body = problem_of(await served.http.put("/budget", json={"gmacs": 1e-6}), 422, "budget_infeasible")
        assert body["feasible"] == (await served.http.get("/budget")).json()["feasible"]

    @pytest.mark.parametrize(
        "body",
        [
            {}, {"gmacs": 0.03, "accuracy": 0.5}, {"gmacs": "x"}, {"gmacs": True}, {"thresholds": [0.5]}, {"gmac": 1},
            {"thresholds": [0.5, 2.5]}, {"gmacs": 0.03, "hold": "both"}, {"gmacs": 0.03, "hold": []}, [], "x", None,
            {"gmacs": 0.03, "quantile": 0.9}, {"gmacs": 0.03, "mix": 1}, {"accuracy": 0.5, "mix": True},
            {"thresholds": [0.5, 0.5], "mix": True},
        ],
    )  # fmt: skip
    async def test_a_bad_budget_is_refused_and_changes_nothing(self, served: Any, body: Any) -> None:
        before = (await served.http.get("/budget")).json()
        headers = {"content-type": "application/json"}
        response = await served.http.put("/budget", content=json.dumps(body), headers=headers)
        problem_of(response, 422, "invalid_request")
        assert (await served.http.get("/budget")).json() == before

    async def test_a_latency_is_refused_where_nobody_knows_what_batches_take(self, served: Any) -> None:
        response = await served.http.put("/budget", json={"latency_ms": 25, "quantile": 0.99})
        assert "latency profile" in problem_of(response, 422, "invalid_request")["detail"]

    async def test_a_mixed_budget_judges_every_request_by_one_of_two_sets_by_its_id(
        self, served: Any, photo: Photo
    ) -> None:
        put = await served.http.put("/budget", json={"gmacs": 0.03, "mix": True, "hold": "quality"})
        body = put.json()
        schemas.Budget.model_validate(body, strict=True)
        assert body["target"] == {"gmacs": 0.03}
        assert body["predicted"]["gmacs"] == 0.03
        mix = body["mix"]
        assert 0 < mix["share"] < 1
        stage = next(s for s in (0, 1) if round(255 * body["thresholds"][s]) + 1 < round(255 * mix["thresholds"][s]))
        between = round(255 * (body["thresholds"][stage] + mix["thresholds"][stage]) / 2)
        image = photo(*[*[0] * stage, between, SURE, SURE][:3])
        leaves: dict[bool, set[int]] = {True: set(), False: set()}
        for number in range(20):
            headers = {"x-request-id": f"id-{number}"}
            for _ in range(2):
                answer = (await served.classify(in_json(image, image), "application/json", headers=headers)).json()
                exits = {result["exit"] for result in answer["results"]}
                assert len(exits) == 1, "two images of one request"
                leaves[served.service.places.of(f"id-{number}") < mix["share"]] |= exits
        assert leaves == {True: {stage + 2}, False: {stage + 1}}

    @pytest.mark.parametrize(
        "text",
        ["[" * 16_000, '{"a":' * 3000, '{"hold":' + "[" * 1000 + "]" * 1000 + "}", '{"hold":"' + "k" * 16_000 + '"}',
         '{"gmacs":' + "[" * 1000 + "]" * 1000 + "}", '{"thresholds":' + "[" * 1000 + "]" * 1000 + "}",
         '{"gmacs":' + "9" * 16_000 + "}", '{"gmacs":1e999}', '{"gmacs":-' + "9" * 300 + "}", '{"gmacs":NaN}',
         '{"thresholds":[' + "9" * 300 + ",0.5]}", '{"mix":' + "[" * 300 + "]" * 300 + ',"gmacs":0.03}',
         '{"latency_ms":' + "9" * 300 + "}", '{"accuracy":0.5,"quantile":' + "9" * 300 + "}", '{"gmacs":{"gmacs":1}}',
         '{"\\ud800":1}', '{"é' + "k" * 5000 + '":1}', '{"gmacs":null}'],
    )  # fmt: skip
    async def test_a_hostile_budget_is_refused(self, served: Any, text: str) -> None:
        before = (await served.http.get("/budget")).json()
        for path in ("/budget", "/budget/preview"):
            method = served.http.put if path == "/budget" else served.http.post
            response = await method(path, content=text.encode(), headers={"content-type": "application/json"})
            assert response.status_code == 422, response.text
            assert len(response.content) < 2000
        assert (await served.http.get("/budget")).json() == before

    async def test_only_json_is_taken_and_little_of_it(self, served: Any) -> None:
        problem_of(await served.http.put("/budget", content=b"{}"), 415, "unsupported_media_type")
        large = await served.http.put("/budget", content=bytes(20_000), headers={"content-type": "application/json"})
        problem_of(large, 413, "body_too_large")

    async def test_it_survives_a_restart(self, serve: Any, tmp_path: Path) -> None:
        async with serve(state_dir=tmp_path) as served:
            set_ = (await served.http.put("/budget", json={"gmacs": 0.05})).json()
        async with serve(state_dir=tmp_path) as served:
            stored = served.service.budget.state()  # the fixture has set another since
            assert stored.version == set_["version"] + 1

    async def test_a_store_that_fails_is_503_and_changes_nothing(self, serve: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        async with serve(state_dir=tmp_path / "file") as served:
            problem_of(await served.http.put("/budget", json={"gmacs": 0.05}), 503, "store_unavailable")
            assert (await served.http.get("/budget")).json()["version"] == 1

    async def test_a_token_guards_the_change_and_not_the_rest(self, serve: Any, tmp_path: Path) -> None:
        token = tmp_path / "token"
        token.write_text("s3cret\n")
        async with serve(control_token_file=token) as served:
            missing = await served.http.put("/budget", json={"gmacs": 0.05})
            problem_of(missing, 401, "unauthorized")
            assert missing.headers["www-authenticate"] == "Bearer"
            wrong = await served.http.put("/budget", json={"gmacs": 0.05}, headers={"authorization": "Bearer nope"})
            problem_of(wrong, 403, "forbidden")
            right = await served.http.put("/budget", json={"gmacs": 0.05}, headers={"authorization": "Bearer s3cret"})
            assert right.status_code == 200
            assert (await served.http.get("/budget")).status_code == 200


class TestPreview:
    async def test_it_tells_what_a_budget_would_have_done_and_applies_nothing(self, served: Any, photo: Photo) -> None:
        for file in (photo(SURE), photo(UNSURE, SURE)):
            await served.classify(file)
        before = await served.http.get("/budget")
        response = await served.http.post("/budget/preview", json={"gmacs": 0.03, "hold": "quality"})
        assert response.status_code == 200, response.text
        body = response.json()
        schemas.Preview.model_validate(body, strict=True)
        assert (body["target"], body["hold"], body["clamped"]) == ({"gmacs": 0.03}, "quality", False)
        assert body["traffic"]["images"] == 2
        assert body["traffic"]["thresholds"] == body["thresholds"]
        assert body["traffic"]["present"]["exit_fractions"][0] == pytest.approx(0.5, abs=0.02)
        held = (await served.http.post("/budget/preview", json={"gmacs": 0.03})).json()
        schemas.Preview.model_validate(held, strict=True)
        assert held["thresholds"] == body["thresholds"]
        assert held["traffic"]["target"]["gmacs"] <= 0.03
        after = await served.http.get("/budget")
        assert (after.json(), after.headers["etag"]) == (before.json(), before.headers["etag"])
        put = (await served.http.put("/budget", json={"gmacs": 0.03, "hold": "quality"})).json()
        assert [put[name] for name in ("target", "hold", "clamped", "thresholds", "predicted")] == [
            body[name] for name in ("target", "hold", "clamped", "thresholds", "predicted")
        ]

    async def test_before_the_first_image_there_is_no_traffic(self, served: Any) -> None:
        body = (await served.http.post("/budget/preview", json={"thresholds": [0.9, 0.8]})).json()
        schemas.Preview.model_validate(body, strict=True)
        assert body["traffic"] is None

    async def test_it_refuses_what_put_refuses(self, served: Any) -> None:
        infeasible = await served.http.post("/budget/preview", json={"gmacs": 1e-6})
        assert problem_of(infeasible, 422, "budget_infeasible")["feasible"]
        for body in ({}, {"gmacs": "x"}, [], {"gmac": 1}):
            problem_of(await served.http.post("/budget/preview", json=body), 422, "invalid_request")
        problem_of(await served.http.post("/budget/preview", content=b"{}"), 415, "unsupported_media_type")
        problem_of(await served.http.get("/budget/preview"), 405, "method_not_allowed")

    async def test_it_asks_for_no_token(self, serve: Any, tmp_path: Path) -> None:
        token = tmp_path / "token"
        token.write_text("s3cret\n")
        async with serve(control_token_file=token) as served:
            assert (await served.http.post("/budget/preview", json={"gmacs": 0.05})).status_code == 200


class TestTheRest:
    async def test_the_frontier_rises_row_by_row(self, served: Any) -> None:
        body = (await served.http.get("/frontier")).json()
        schemas.Frontier.model_validate(body, strict=True)
        assert [row["gmacs"] for row in body["rows"]] == sorted(row["gmacs"] for row in body["rows"])

    async def test_thresholds_on_an_imported_frontier_have_no_prediction(
        self, bundle: Bundle, engine: FakeEngine
    ) -> None:
        rows = tuple(replace(row, accuracy_lower=None) for row in bundle.frontier.rows)
        imported = replace(bundle.frontier, rows=rows, samples=0, records=None, source="imported")
        app = create_app(Settings(state_dir=None), replace(bundle, solved=imported), engine)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http,
        ):
            body = (await http.put("/budget", json={"thresholds": [0.5, 0.5]})).json()
            schemas.Budget.model_validate(body, strict=True)
            assert body["thresholds"] == [0.5, 0.5, 0.0]
            assert body["predicted"] == {"accuracy": None, "gmacs": None, "exit_fractions": None}
            assert "predicted   unknown" in commands._describe_budget(body)
            assert (await http.get("/metrics")).status_code == 200
            body = (await http.get("/frontier")).json()
            schemas.Frontier.model_validate(body, strict=True)
            assert (body["source"], body["samples"], body["rows"][0]["accuracy_lower"]) == ("imported", 0, None)

    async def test_the_model_is_described(self, served: Any) -> None:
        body = (await served.http.get("/model")).json()
        schemas.Model.model_validate(body, strict=True)
        assert [stage["gmacs"] for stage in body["stages"]] == [0.01, 0.03, 0.08]
        assert body["criterion"] == (await served.http.get("/frontier")).json()["criterion"] == "max_probability"
        assert body["engine"] == {
            "name": "fake", "runtime": "fake", "device": "none", "executors": 1, "max_batch_sizes": [8, 4, 4]
        }  # fmt: skip

    async def test_ready_is_for_a_server_that_is_warm_and_stays(self, serve: Any) -> None:
        async with serve() as served:
            assert (await served.http.get("/readyz")).json() == {"status": "ready"}
            served.service.leave()
            assert "leaving" in problem_of(await served.http.get("/readyz"), 503, "not_ready")["detail"]
            assert (await served.http.get("/livez")).json() == {"status": "alive"}

    async def test_a_server_that_leaves_serves_on_and_one_that_drains_does_not(self, serve: Any, photo: Photo) -> None:
        async with serve() as served:
            served.service.leave()
            response = await served.classify(photo(SURE))
            assert (response.status_code, response.headers["connection"]) == (200, "close")
            await served.service.drain(1.0)
            response = await served.classify(photo(SURE))
            problem_of(response, 503, "draining")
            assert response.headers["connection"] == "close"
            assert response.headers["retry-after"]

    async def test_a_budget_whose_body_comes_while_the_server_drains_is_refused(
        self, serve: Any, tmp_path: Path
    ) -> None:
        async with serve(state_dir=tmp_path) as served:
            begun, drained = asyncio.Event(), asyncio.Event()

            async def slowly() -> AsyncIterator[bytes]:
                yield b'{"gmacs":'
                begun.set()
                await drained.wait()
                yield b"0.05}"

            json = {"content-type": "application/json"}
            before = served.service.budget.point
            request = asyncio.create_task(served.http.put("/budget", content=slowly(), headers=json))
            await begun.wait()
            await served.service.drain(1.0)
            drained.set()
            problem_of(await request, 503, "draining")
            assert served.service.budget.point == before

    async def test_draining_answers_what_was_accepted_also_what_was_not_yet_submitted(
        self, serve: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        more = asyncio.Event()
        reading = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield photo(SURE)[:20]
            reading.set()
            await more.wait()
            yield photo(SURE)[20:]

        async with serve() as served:
            engine.gates[1].clear()
            queued = asyncio.create_task(served.classify(photo(SURE)))
            late = asyncio.create_task(
                served.http.post("/classify", content=slow(), headers={"content-type": "image/png"})
            )
            await reading.wait()
            drained = asyncio.create_task(served.service.drain(10.0))
            await asyncio.to_thread(engine.began.acquire)
            more.set()
            engine.open_gates()
            assert [answer.status_code for answer in await asyncio.gather(queued, late)] == [200, 200]
            await drained

    async def test_a_dead_batch_loop_is_not_alive_and_its_waiters_are_answered(
        self, serve: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with serve() as served:
            rows = engine.run

            def short(batch: StageBatch) -> StageOutput:
                """Breaks the contract of engines: fewer rows than it was asked for."""
                output = rows(batch)
                return StageOutput(output.probabilities, output.confidence[:0], output.slots)

            engine.run = short  # type: ignore[method-assign]
            problem_of(await served.classify(photo(SURE)), 500, "engine_failed")
            problem_of(await served.http.get("/livez"), 503, "not_ready")
            problem_of(await served.http.get("/readyz"), 503, "not_ready")

    async def test_the_docs_page_loads_from_this_server_alone(self, served: Any) -> None:
        page = (await served.http.get("/docs")).text
        assert "http://" not in page
        assert "https://" not in page
        assets = [part.split('"')[0].split("'")[0] for part in page.split("/docs/assets/")[1:]]
        assert set(assets) >= {"swagger-ui-bundle.js", "swagger-ui.css"}
        for asset in assets:
            response = await served.http.get(f"/docs/assets/{asset}")
            assert response.status_code == 200
            assert len(response.content) > 500

    async def test_the_document_is_the_one_in_the_repository(self, served: Any) -> None:
        document = (await served.http.get("/openapi.json")).json()
        kept = json.loads((Path(__file__).parents[3] / "docs" / "openapi.json").read_text())
        assert document == kept, REFRESH

    def test_every_route_is_documented_but_those_of_the_document(self) -> None:
        routes = {endpoint.__name__ for _, _, endpoint in ROUTES}
        assert routes - schemas.DOCUMENTED.keys() == {"docs", "openapi"}
        assert schemas.DOCUMENTED.keys() <= routes

    async def test_the_document_keeps_to_the_version_that_the_page_renders(self, served: Any) -> None:
        document = (await served.http.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.0.")
        components = document["components"]["schemas"]

        def walk(node: Any) -> None:
            if isinstance(node, dict):
                assert not {"prefixItems", "const"} & node.keys(), node
                assert node.get("type") != "null"
                if "$ref" in node:
                    assert node["$ref"].removeprefix("#/components/schemas/") in components
                for child in node.values():
                    walk(child)
            elif isinstance(node, list):
                for child in node:
                    walk(child)

        walk(document)

    async def test_metrics_parse_and_count(self, served: Any, photo: Photo) -> None:
        await served.classify(in_json(photo(SURE), photo(UNSURE, SURE)), "application/json")
        await served.classify(b"", "image/png")
        response = await served.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        assert samples[("dvt_requests_total", "/classify", "200", "false", "normal")] == 1
        assert samples[("dvt_requests_total", "/classify", "400", "false", "normal")] == 1
        assert samples[("dvt_refused_total", "bad_image")] == 1
        assert samples[("dvt_images_total", "1", "false")] == 1
        assert samples[("dvt_images_total", "2", "false")] == 1
        assert samples[("dvt_batches_total", "2")] == 1
        assert samples[("dvt_threshold", "1")] == 0.5
        assert samples[("dvt_budget_version",)] == 2
        assert samples[("dvt_slots_in_use",)] == 0


class TestHangUps:
    async def test_a_client_that_leaves_while_it_waits_costs_nothing_further(
        self, serve: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with serve(audit_fraction=1) as served:
            engine.gates[2].clear()
            sent: list[Any] = []
            at_hang_up: list[Any] = []  # as `connection.Exchange` is told what to do

            async def receive() -> Any:
                return {"type": "http.request", "body": photo(UNSURE, SURE), "more_body": False}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {
                "type": "http", "method": "POST", "path": "/classify", "query_string": b"", "http_version": "1.1",
                "headers": [(b"content-type", b"image/png"), (b"content-length", b"9")],
                "state": {"hang_up": at_hang_up.append},
            }  # fmt: skip
            app = served.http._transport.app
            request = asyncio.create_task(app(scope, receive, send))
            await asyncio.to_thread(engine.began.acquire)  # stage 1
            await asyncio.to_thread(engine.began.acquire)  # stage 2, held
            assert engine.slots_in_use == 1
            at_hang_up[-1]()
            await request
            assert at_hang_up[-1] is None, "nothing is kept of a request that is over"
            assert sent == []
            assert not served.service.intake.requests
            assert (
                await served.metric(
                    "dvt_requests_total", route="/classify", status="499", priority="normal", hurried="false"
                )
                == 1
            )
            assert await served.metric("dvt_images_abandoned_total", reason="disconnect") == 1
            assert served.service.audit.state().chosen == 0, "there was no answer"
            engine.open_gates()
            await served.service.drain(1.0)
        assert engine.slots_in_use == 0

    async def test_a_client_that_leaves_amid_its_body_gets_nothing(self, served: Any) -> None:
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"\x89PNG", "more_body": True}]
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/classify", "query_string": b"", "http_version": "1.1",
            "headers": [(b"content-type", b"image/png"), (b"content-length", b"900")],
        }  # fmt: skip
        await served.http._transport.app(scope, receive, send)
        assert sent == []
        assert served.service.intake.held_bytes == 0
