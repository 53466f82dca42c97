"""Which LoRA goes where: the core's policies, and that a plugin's word counts before theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mesh_core.builtin.lora_policy import DefaultLoraPlacement
from mesh_core.errors import ConfigError
from mesh_core.loras.policy import LoraFacts
from mesh_core.model.plan import WorkerInfo
from mesh_core.model.spans import BlockSpan
from mesh_core.system.config import Settings, atomic_write, config_dir

FACTS = LoraFacts("turbo", "0" * 64, 50 << 20, 100 << 20, False, "default", 64 << 20)
LARGE = replace(FACTS, nbytes=65 << 20)


TABLE = [
    ("default", "reference", "send", "refuse", "send"),
    ("always-send", "reference", "send", "send", "send"),
    ("never-send", "reference", "refuse", "refuse", "refuse"),
    ("worker-only", "reference", "leave-out", "leave-out", "leave-out"),
    ("local-only", "leave-out", "leave-out", "leave-out", "leave-out"),
]


@pytest.mark.parametrize(("policy", "held", "small", "large", "asked"), TABLE)
def test_the_policies_of_the_core(policy: str, held: str, small: str, large: str, asked: str) -> None:
    expected = {replace(LARGE, held=True): held, FACTS: small, LARGE: large, replace(LARGE, asked=True): asked}
    for facts, action in expected.items():
        given = replace(facts, policy=policy)
        placement = DefaultLoraPlacement().mesh_place_lora(given, BlockSpan(0, 4), WorkerInfo("blue"))
        assert placement.action == action
        assert placement.reason and len(placement.reason) < 200


def test_the_settings_know_the_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_HOME", str(tmp_path))
    for policy, *_ in TABLE:
        atomic_write(config_dir() / "config.toml", f'[loras]\npolicy = "{policy}"\n'.encode())
        assert Settings.load().loras.policy == policy
    atomic_write(config_dir() / "config.toml", b'[loras]\npolicy = "another"\n')
    with pytest.raises(ConfigError, match=r"loras\.policy"):
        Settings.load()
