"""Tell a person that a chain of jobs has stopped."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

PATIENCE_S = 30.0


def notify(command: Sequence[str], url: str | None, message: Mapping[str, str]) -> list[str]:
    """Send a message by a program (on its standard input) and a webhook (as JSON); what went wrong. A program or server
    that fails never changes how a chain ends."""
    problems = []
    text = "\n".join(f"{key}: {value}" for key, value in message.items()) + "\n"
    if command:
        try:
            subprocess.run(command, input=text, text=True, timeout=PATIENCE_S, check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(f"notify_command failed: {error}")
    if url:
        body = json.dumps({"text": text, **message}).encode()
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S):
                pass
        except (OSError, ValueError, urllib.error.URLError) as error:
            problems.append(f"notify_url failed: {type(error).__name__}")  # its text may hold the address, a secret
    return problems
