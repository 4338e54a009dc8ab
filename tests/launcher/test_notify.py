from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from launcher.notify import notify

MESSAGE = {"run": "pets", "state": "failed", "reason": "disk full; $(touch planted)"}


def test_a_program_gets_the_message_on_its_standard_input(tmp_path: Path) -> None:
    code = f"import sys; open({str(tmp_path / 'got')!r}, 'w').write(sys.stdin.read())"
    assert notify([sys.executable, "-c", code], None, MESSAGE) == []
    assert "reason: disk full; $(touch planted)" in (tmp_path / "got").read_text()


def test_a_webhook_gets_json() -> None:
    got: list[dict[str, str]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert notify([], f"http://127.0.0.1:{server.server_port}/secret", MESSAGE) == []
        thread.join()
    assert got[0]["state"] == "failed" and "disk full" in got[0]["text"]


def test_a_failing_messenger_is_a_warning_without_the_secret_address() -> None:
    problems = notify(["/nowhere/mail"], "http://127.0.0.1:1/secret", MESSAGE)
    assert len(problems) == 2 and "notify_command failed" in problems[0] and "notify_url failed" in problems[1]
    assert "secret" not in problems[1]
