"""The host's side of LoRAs on workers: ask what they have, let the policy decide, send what is missing.

Knows remotes and spans; what a session does with the result is the session's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mesh_core import wire
from mesh_core.crossing.stats import RunStats
from mesh_core.errors import LoraError, LoraMissing, LoraTooLarge
from mesh_core.host.hops import RemoteHop
from mesh_core.host.options import ModelIdentity
from mesh_core.host.progress import Activity, Phase, ProgressReport
from mesh_core.host.recovery import GONE
from mesh_core.host.remote import Remote
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.part import Part
from mesh_core.loras.policy import LoraFacts, LoraPlacement
from mesh_core.model.plan import WorkerInfo
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.system.logs import logger

log = logger(__name__)

CHUNK = 4 << 20
"""Bytes that are sent before the worker says that it has them. Small enough that a step's state is not kept waiting
behind it for long, large enough that a link with 100 ms of latency is used."""


@dataclass(frozen=True)
class Borrowed:
    """A LoRA that only the workers have, by the name in their listing or the start of its hash."""

    name: str
    strength: float = 1.0


AnyLora = Applied | Borrowed


@dataclass(frozen=True)
class Placed:
    """What was decided for one LoRA and one worker; for the stats."""

    worker: str
    span: str
    lora: str
    id: str
    action: str
    reason: str
    bytes_sent: int = 0


class SessionLoras:
    """Places LoRAs on the workers of one session. Used from one thread.

    Args:
        stats: told what was decided.
        report: told how far a transfer is; what it raises ends the transfer, which goes on from there next time.

    ``wanted``: the LoRAs that the session is to have.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        plugins: Plugins,
        settings: Settings,
        stats: RunStats,
        report: ProgressReport | None,
    ) -> None:
        self.identity, self.plugins, self.settings, self.stats = identity, plugins, settings, stats
        self.wanted: tuple[AnyLora, ...] = ()
        self._report = report
        self._known: dict[RemoteHop, set[str]] = {}
        self._placed: dict[tuple[RemoteHop, str], Placed] = {}

    def connected(self, hop: RemoteHop) -> None:
        """The worker is about to open the session: it may have been restarted, so what it has is asked again."""
        self._known.pop(hop, None)
        hop.loras = self.place(hop)

    def adjust(self, hops: Sequence[RemoteHop]) -> None:
        """Have the workers of an open session use what is wanted now; nothing crosses for those with no change.

        Raises:
            LoraError and its kinds, TransportError: see `place`.
        """
        for hop in hops:
            try:
                wanted = self.place(hop)
                if wanted != hop.loras:
                    self._tell(hop, wanted)
            except LoraMissing:
                # It made room for others since it was asked.
                self._known.pop(hop, None)
                self._tell(hop, self.place(hop))
            except GONE as error:
                # The next step waits for it, or opens the session anew, and asks for these LoRAs then.
                log.warning("%s gets its LoRAs when it is back: %s", hop.remote.name, error)

    def _tell(self, hop: RemoteHop, wanted: list[dict[str, Any]]) -> None:
        message = wire.Adjust(wire.next_id(), hop.remote.session, wanted)
        hop.remote.ask(message, wire.Opened, timeout=self.settings.deadlines.load)
        hop.loras = wanted

    def place(self, hop: RemoteHop) -> list[dict[str, Any]]:
        """The wanted LoRAs of the hop's span as its worker is told of them; afterwards it has all of them.

        Raises:
            LoraTooLarge, LoraMissing: the policy refuses one.
            LoraError: one cannot be sent.
            TransportError: see `Remote.ask`.
        """
        loras = self.wanted
        parameters = self.identity.spec.parameters_of(hop.span).keys()
        uses: list[tuple[dict[str, Any], Lora | None, AnyLora]] = []
        part: Lora | None
        for lora in loras:
            if isinstance(lora, Borrowed):
                uses.append((_use("", "", lora.name, lora.strength, 1.0), None, lora))
                continue
            part = lora.lora.restricted(parameters)
            if part:
                use = _use(part.id, part.outline, lora.lora.name, lora.strength, lora.strength_model)
                uses.append((use, part, lora))
        used = {_key(use) for use, *_ in uses}
        self._placed = {k: p for k, p in self._placed.items() if k[0] is not hop or k[1] in used}
        held = self._held(hop, [use for use, part, _ in uses if part is not None])
        wanted = []
        for use, part, lora in uses:
            if part is None or isinstance(lora, Borrowed):
                self._note(hop, use, LoraPlacement("reference", "asked for by its name there"))
                wanted.append(use)
                continue
            facts = LoraFacts(
                name=use["name"],
                id=use["id"],
                nbytes=part.nbytes,
                total=lora.lora.nbytes,
                held=use["id"] in held,
                policy=self.settings.loras.policy,
                limit=self.settings.loras.largest_sent,
                asked=lora.send,
            )
            if self._settle(hop, facts, use, part):
                wanted.append(use)
        self.stats.loras = [asdict(p) for p in self._placed.values()]
        return wanted

    def _held(self, hop: RemoteHop, uses: Sequence[dict[str, Any]]) -> set[str]:
        known = self._known.setdefault(hop, set())
        unknown = [use for use in uses if use["id"] not in known]
        if unknown:
            spec, span = self.identity.spec, [hop.span.start, hop.span.stop]
            question = wire.Seek(wire.next_id(), spec.family, self.identity.structure, span, unknown)
            answer = hop.remote.ask(question, wire.Sought, timeout=self.settings.deadlines.load)
            known |= {unknown[i]["id"] for i in answer.held if i < len(unknown)}
        return known

    def _settle(self, hop: RemoteHop, facts: LoraFacts, use: dict[str, Any], part: Lora) -> bool:
        """Do what the policy says; whether the span has the LoRA then."""
        worker = WorkerInfo(hop.remote.name)
        placement = self.plugins.hook.mesh_place_lora(lora=facts, stage=hop.span, worker=worker)
        if not isinstance(placement, LoraPlacement):
            raise LoraError(f"No policy says what to do with the LoRA {facts.name!r}.", hint="mesh plugins")
        sent = 0
        if placement.action == "refuse":
            self._note(hop, use, placement)
            raise _refused(facts, placement, worker)
        if placement.action == "reference" and not facts.held:
            raise LoraMissing(
                f"{worker.name} does not have {facts.name!r}, though the policy says so: {placement.reason}.",
                hint="another [loras] policy in config.toml",
            )
        if placement.action == "send" and not facts.held:
            sent = send(hop.remote, part, self.identity.structure, self.settings, self._report)
            self._known[hop].add(use["id"])
        if placement.action == "leave-out":
            log.warning("%s runs without the LoRA %s: %s", worker.name, facts.name, placement.reason)
        self._note(hop, use, placement, sent)
        return placement.action != "leave-out"

    def _note(self, hop: RemoteHop, use: dict[str, Any], placement: LoraPlacement, sent: int = 0) -> None:
        before = self._placed.get((hop, _key(use)))
        sent += before.bytes_sent if before is not None else 0
        self._placed[hop, _key(use)] = Placed(
            hop.remote.name, str(hop.span), use["name"], use["id"], placement.action, placement.reason, sent
        )
        self.stats.loras = [asdict(p) for p in self._placed.values()]


def send(remote: Remote, lora: Lora, structure: str, settings: Settings, report: ProgressReport | None) -> int:
    """Send a LoRA to a worker's library, from where a broken transfer stopped and without the tensors that it has in
    other LoRAs that it received; returns the bytes that crossed.

    Raises:
        LoraTooLarge: the worker cannot keep it.
        LoraError: the worker refuses what arrived, or a file changed meanwhile.
    """
    part, timeout = Part(lora), settings.deadlines.load
    offer = wire.Offer(wire.next_id(), lora.id, part.digest(), part.nbytes, lora.family, structure, lora.name[:200])
    have = remote.ask(offer, wire.Offered, timeout=timeout).have
    sent = 0
    while have < part.nbytes:
        if report is not None:
            report(Activity(remote.name, Phase.SENDING_LORA, have, part.nbytes, lora.name))
        # The head alone first: with it, the worker finds what it has of the rest in other LoRAs, and asks for what
        # follows on that.
        data = part.read(have, min(CHUNK, part.head_nbytes - have) if have < part.head_nbytes else CHUNK)
        before = have
        message = wire.Chunk(wire.next_id(), lora.id, have)
        have = remote.ask(message, wire.Offered, timeout=timeout, buffers=[data]).have
        sent += len(data)
        if have <= before:
            raise LoraError(f"{remote.name} does not get further with {lora.name!r}.", hint="the same again")
    if report is not None:
        report(Activity(remote.name, Phase.SENDING_LORA, part.nbytes, part.nbytes, lora.name))
    return sent


def _use(id_: str, outline: str, name: str, strength: float, base: float) -> dict[str, Any]:
    return {"id": id_, "outline": outline, "name": name[:200], "strength": float(strength), "base": float(base)}


def _key(use: Mapping[str, Any]) -> str:
    """What tells a LoRA from others: several may have one name, and long names are cut off."""
    return str(use["id"] or use["name"])


def _refused(facts: LoraFacts, placement: LoraPlacement, worker: WorkerInfo) -> LoraError:
    hint = f"put the file into that worker's LoRA folder (mesh serve --loras), or mesh lora push {worker.name}"
    if facts.nbytes > facts.limit:
        return LoraTooLarge(
            f"The LoRA {facts.name!r} is not sent to {worker.name}: {placement.reason}.",
            hint=f"{hint}, or have it sent (a larger [loras] largest_sent, or policy = 'always-send')",
        )
    return LoraMissing(f"The LoRA {facts.name!r} is not used on {worker.name}: {placement.reason}.", hint=hint)
