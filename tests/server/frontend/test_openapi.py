"""The served document against the server: Schemathesis draws requests from it, valid and not, and judges the answers.

In a process of its own, as it changes Hypothesis wherever it is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOOKS = Path(__file__).parent / "openapi_hooks.py"
REPLACED = "positive_data_acceptance,negative_data_rejection,not_a_server_error"


@pytest.fixture
def url() -> Iterator[str]:
    environment = {**os.environ, "DVT_STATE_DIR": "", "DVT_PROFILE_SECONDS": "0.2"}
    command = [sys.executable, "-m", "server", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found := re.search(r"Listening on (\S+)", line):
                break
        assert found, "the server ended before it listened"
        yield found[1]
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_the_server_keeps_to_its_document(url: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--checks", "all", "--exclude-checks", REPLACED, "--continue-on-failure"),
        *("--max-examples", "50", "--seed", "1", "--generation-deterministic"),
        *("--request-timeout", "30", "--no-color"),
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
