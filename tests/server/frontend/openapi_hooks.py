"""What Schemathesis is told about this server (SCHEMATHESIS_HOOKS in test_openapi.py; pytest does not import this).

Two of its checks are replaced: a document can say what a valid request looks like, but not what the model at hand, the
moment or the pixels make of it. Everything else that a valid request gets instead of an answer is a failure.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

# Refusals of requests that are valid by the document.
OF_THE_MOMENT = {"budget_infeasible", "version_mismatch"}
OF_THE_PIXELS = {"bad_image", "image_too_large"}
OF_THE_MODEL = {"max_exit", "timeout_ms"}  # fields with a largest value that is the model's or a setting
OF_ANOTHER = {"expires_s"}  # fields that go with another one only
OF_HTTP = {"If-Match"}  # headers whose form is another document's


@schemathesis.check
def accepts_what_the_document_allows(ctx: Any, response: Any, case: Any) -> None:
    if 400 <= response.status_code < 500 and response.headers.get("content-type") == ["application/problem+json"]:
        problem = response.json()
        if problem["code"] in OF_THE_MOMENT | OF_THE_PIXELS:
            return
        if problem.get("field") in OF_THE_MODEL | OF_ANOTHER | OF_HTTP:
            return
        if problem.get("field") == "images" and "index" in problem:  # a string that is no base64
            return
        if problem["code"] == "invalid_request" and isinstance(case.body, dict) and "thresholds" in case.body:
            return  # how many there are is the model's
    positive_data_acceptance(ctx, response, case)


@schemathesis.check
def refuses_what_the_document_does_not_allow(ctx: Any, response: Any, case: Any) -> None:
    if response.status_code != 412:  # refused as well, for another reason
        negative_data_rejection(ctx, response, case)


@schemathesis.check
def fails_only_where_the_time_given_was_too_short(ctx: Any, response: Any, case: Any) -> None:
    del ctx, case
    if response.status_code >= 500:
        assert response.json()["code"] == "deadline_exceeded"
