"""A plugin that implements every hook. What is called with what is appended to the file MESH_TEST_CALLS."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click

from mesh_codec.base import Codec, CodecChoice, DecodeLimits, Decoder, Encoder, Quality
from mesh_core import hookimpl
from mesh_core.hookspecs import Hop, Link, StepStats, WorkerInfo
from mesh_core.model import (
    BlockSpan,
    Claim,
    Conditioning,
    ModelAdapter,
    ModelSpec,
    Parts,
    Stage,
    State,
    StoredTensor,
    WeightFormat,
)
from mesh_core.transport.base import Address, Channel, Listener, Transport


class Adapter(ModelAdapter):
    family = "wan"

    def recognise(self, header: Any) -> ModelSpec | None:
        return None

    def skeleton(self, spec: ModelSpec) -> Any:
        raise NotImplementedError

    def stage(self, spec: ModelSpec, span: BlockSpan, model: Any) -> Stage:
        raise NotImplementedError

    def begin(self, spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        raise NotImplementedError

    def finish(self, spec: ModelSpec, state: State) -> Any:
        raise NotImplementedError


class Wavelets(Codec):
    name = "wavelets"

    def capabilities(self) -> dict[str, Any]:
        return {"levels": 3}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        return {"quality": quality}

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        raise NotImplementedError

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # noqa: B008
        raise NotImplementedError


class Pigeons(Transport):
    scheme: ClassVar[str] = "pigeon"

    def connect(self, address: Address, timeout: float) -> Channel:
        raise NotImplementedError

    def listen(self, address: str, **options: object) -> Listener:
        raise NotImplementedError

    def wait(self, channels: Sequence[Channel], timeout: float) -> list[Channel]:
        return []


class Runes(WeightFormat):
    name = "runes"

    def claim(self, header: Any) -> Claim:
        return Claim()

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> Any:
        raise NotImplementedError

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        raise NotImplementedError

    def arithmetics(self, kind: str, dtype: Any, device: Any) -> tuple[str, ...]:
        return ()

    def dequantise(self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: Any, arithmetic: str) -> Any:
        raise NotImplementedError


def note(text: str) -> None:
    with Path(os.environ["MESH_TEST_CALLS"]).open("a", encoding="utf-8") as file:
        file.write(text + "\n")


@hookimpl
def mesh_register_adapters(register: Callable[[ModelAdapter], None]) -> None:
    register(Adapter())


@hookimpl
def mesh_register_codecs(register: Callable[[Codec], None]) -> None:
    register(Wavelets())


@hookimpl
def mesh_register_transports(register: Callable[[Transport], None]) -> None:
    register(Pigeons())


@hookimpl
def mesh_register_weight_formats(register: Callable[[WeightFormat], None]) -> None:
    register(Runes())


@hookimpl
def mesh_add_commands(cli: click.Group) -> None:
    @cli.command()
    @click.argument("name")
    def greet(name: str) -> None:
        """Say hello."""
        click.echo(f"Hello, {name}.")


@hookimpl
def mesh_propose_split(
    model: ModelSpec, workers: Sequence[WorkerInfo], links: Sequence[Link | None]
) -> Sequence[Hop] | None:
    return [Hop(BlockSpan(0, 3), 0), Hop(BlockSpan(3, 9), 1)] if len(workers) == 2 else None


@hookimpl
def mesh_choose_codec(
    role: str, link: Link | None, quality: Quality, codecs: Sequence[Codec], peer: dict[str, Any]
) -> CodecChoice | None:
    return CodecChoice("wavelets", {}, "as the plugin says") if quality == "fast" else None


@hookimpl
def mesh_place_lora(lora: Any, stage: Any, worker: WorkerInfo) -> Any:
    return f"{lora} on {worker.name}"


@hookimpl
def mesh_step_started(step: int) -> None:
    note(f"started {step}")


@hookimpl
def mesh_step_finished(step: int, stats: StepStats) -> None:
    note(f"finished {step} in {stats.total_ms} ms")


@hookimpl
def mesh_step_failed(step: int, error: BaseException) -> None:
    note(f"failed {step}: {error}")
