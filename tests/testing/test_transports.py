"""The conformance of a stranger's transport: what a good one needs to show it, and that bad ones are found out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh_core.testing import TRANSPORT_CHECKS, check_transport
from mesh_core.testing.transports import TransportCheck
from mesh_core.transport.base import Address, Channel, Listener
from tests.testing.pigeon import PigeonTransport

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("check", TRANSPORT_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: TransportCheck) -> None:
    check_transport(PigeonTransport, "pigeon://", only=check)


def test_no_test_runner_is_needed() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from mesh_core.testing import check_transport\n"
        "from mesh_core.transport.inproc import InprocTransport\n"
        "check_transport(InprocTransport, 'inproc://')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


class Forgetful(PigeonTransport):
    """Drops empty frames."""

    def connect(self, address: Address, timeout: float) -> Channel:
        channel: Any = super().connect(address, timeout)
        send = channel.send
        channel.send = lambda frames: send([f for f in frames if len(f)])
        return channel


class Miserly(PigeonTransport):
    """Hands out memory that only it may write to."""

    def connect(self, address: Address, timeout: float) -> Channel:
        channel: Any = super().connect(address, timeout)
        receive = channel.receive
        channel.receive = lambda timeout: [f.toreadonly() for f in receive(timeout) or []] or None
        return channel


class Boundless(PigeonTransport):
    """Takes frames of any size."""

    def __init__(self, limits: object) -> None:
        super().__init__()


class Casual(PigeonTransport):
    """Passes over options that it does not have."""

    def listen(self, address: str, **options: object) -> Listener:
        options.clear()
        return super().listen(address, **options)


@pytest.mark.parametrize(
    ("make", "check", "message"),
    [
        (Forgetful, "check_frames_come_back_as_they_were_sent", "frames that came back"),
        (Miserly, "check_received_views_stay_valid_and_can_be_written", "cannot be written"),
        (Boundless, "check_a_frame_over_the_limit_is_refused_before_it_is_sent", "WireTooLarge was not raised"),
        (Casual, "check_an_unknown_option_is_refused", "ConfigError was not raised"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_breaks_the_contract_is_found_and_named(make: Any, check: str, message: str) -> None:
    (only,) = [c for c in TRANSPORT_CHECKS if c.__name__ == check]
    with pytest.raises(AssertionError, match=message):
        check_transport(make, "pigeon://", only=only)


def test_the_test_file_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "write-a-transport.md").read_text("utf-8")
    name, body = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / name).write_text(body, encoding="utf-8")
    (tmp_path / "mesh_pigeon").mkdir()
    shutil.copy(Path(__file__).with_name("pigeon.py"), tmp_path / "mesh_pigeon" / "transport.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert f"{len(TRANSPORT_CHECKS)} passed" in done.stdout, done.stdout + done.stderr
    for check in TRANSPORT_CHECKS:
        assert f"`{check.__name__.removeprefix('check_')}`" in page, "the page says what each proves"
