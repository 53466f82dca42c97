"""The checkpoints under a worker's folders, found by fingerprint. The network never names a path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mesh_core.errors import CheckpointError, CheckpointMismatch, CheckpointUnrecognised
from mesh_core.model import fingerprint
from mesh_core.model.adapter import ModelAdapter
from mesh_core.model.checkpoint import CheckpointHeader, ReadingProgress, read_header, weights_folder
from mesh_core.model.claims import with_stored_weights
from mesh_core.model.folders import find_checkpoints
from mesh_core.model.spec import ModelSpec
from mesh_core.model.stored import WeightFormat
from mesh_core.model.variants import variants
from mesh_core.system.logs import logger

log = logger(__name__)


class Adapters(Protocol):
    """Whoever knows the model families that are installed: the plugin registry."""

    def adapters(self) -> Mapping[str, ModelAdapter]:
        """By family."""

    def adapter(self, family: str) -> ModelAdapter:
        """The one of ``family``; raises PluginError when it cannot be used."""

    def weight_formats(self) -> Mapping[str, WeightFormat]:
        """The ways to store weights that are read, by name."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that an adapter recognised."""

    header: CheckpointHeader
    spec: ModelSpec
    adapter: ModelAdapter

    @property
    def name(self) -> str:
        """Of its file or folder, for people."""
        variant = f" ({self.header.variant})" if self.header.variant else ""
        return f"{self.header.path.name}{variant}"


def recognise(header: CheckpointHeader, adapters: Adapters) -> Checkpoint:
    """The checkpoint with the first adapter that recognises it.

    Raises:
        CheckpointUnrecognised: no installed adapter does; with the reason of the first one that gave any.
        CheckpointCorrupt: an adapter knows it, and it is damaged.
    """
    found = _asked(header, adapters)
    if isinstance(found, Checkpoint):
        return found
    if found:
        raise next(iter(found.values()))
    families = ", ".join(sorted(adapters.adapters())) or "none"
    raise CheckpointUnrecognised(
        f"No installed adapter recognises {header.path}. Installed: {families}.",
        hint="mesh plugins, to see what is installed and what failed to load",
    )


def _asked(header: CheckpointHeader, adapters: Adapters) -> Checkpoint | dict[str, CheckpointUnrecognised]:
    """The checkpoint, or why the families that it resembles cannot use it."""
    reasons: dict[str, CheckpointUnrecognised] = {}
    header = with_stored_weights(header, adapters.weight_formats().values())
    for family, adapter in adapters.adapters().items():
        try:
            spec = adapter.recognise(header)
        except CheckpointUnrecognised as reason:
            # A near relative of one family may be another adapter's own.
            reasons[family] = reason
            continue
        if spec is not None:
            return Checkpoint(header, spec, adapter)
    return reasons


def variants_at(path: Path) -> Sequence[str | None]:
    """What `read_header` is to be asked for at ``path``: each variant of a folder's weights; None alone elsewhere."""
    try:
        found = variants(weights_folder(path)) if path.is_dir() else []
    except CheckpointError:
        # Reading it says why.
        found = []
    return found if len(found) > 1 else (None,)


class CheckpointLibrary:
    """Checkpoints under ``roots``. Folders are read anew whenever a checkpoint is not found at once.

    Args:
        roots: folders and files that the user named.

    Attributes:
        skipped: files and folders that the last scan could not use, and why.
    """

    def __init__(self, roots: Sequence[Path], adapters: Adapters) -> None:
        self._roots, self._adapters = tuple(roots), adapters
        self._known: dict[tuple[Path, str | None], Checkpoint] = {}
        self.skipped: dict[Path, CheckpointError] = {}

    def scan(self) -> list[Checkpoint]:
        """All checkpoints, found from their headers; the others are in `skipped`."""
        found: dict[tuple[Path, str | None], Checkpoint] = {}
        skipped: dict[Path, CheckpointError] = {}
        for path, variant in ((p, v) for root in self._roots for p in find_checkpoints(root) for v in variants_at(p)):
            try:
                found[path, variant] = recognise(read_header(path, variant=variant), self._adapters)
            except CheckpointError as error:
                skipped[path] = error
                if path not in self.skipped:
                    log.info("not served: %s", error)
        self._known, self.skipped = found, skipped
        return list(found.values())

    def catalogue(self) -> list[dict[str, Any]]:
        """What is here, as plain values; no paths."""
        return [
            {
                "name": c.name,
                "family": c.spec.family,
                "variant": c.spec.variant,
                "blocks": c.spec.blocks,
                "structure": fingerprint.structure(c.spec),
                "fingerprint": fingerprint.known(c.header, c.spec) or "",
            }
            for c in self.scan()
        ]

    def find(self, family: str, structure: str, wanted: str, progress: ReadingProgress | None = None) -> Checkpoint:
        """The checkpoint whose weights have the fingerprint ``wanted``.

        Raises:
            PluginNotFound: no adapter for that family here.
            CheckpointMismatch: none of this structure has those weights; says what is here instead.
            CheckpointError: none has, and one cannot be read.
        """
        if family not in self._adapters.adapters():
            self._adapters.adapter(family)
        similar = [c for c in self.scan() if (c.spec.family, fingerprint.structure(c.spec)) == (family, structure)]
        # Those whose fingerprint is remembered come first: they cost nothing to check.
        unread: list[CheckpointError] = []
        for c in sorted(similar, key=lambda c: fingerprint.known(c.header, c.spec) is None):
            try:
                if fingerprint.of_checkpoint(c.header, c.spec, progress) == wanted:
                    return c
            except CheckpointError as error:
                unread.append(error)
        raise unread[0] if unread else self._mismatch(family, similar, wanted)

    def like(self, family: str, structure: str) -> Checkpoint:
        """Any checkpoint of that structure: enough to tell what fits it.

        Raises:
            PluginNotFound: no adapter for that family here.
            CheckpointMismatch: none of this structure is here.
        """
        if family not in self._adapters.adapters():
            self._adapters.adapter(family)
        for known in (list(self._known.values()), self.scan()):
            for c in known:
                if (c.spec.family, fingerprint.structure(c.spec)) == (family, structure):
                    return c
        raise self._mismatch(family, [], "")

    def _mismatch(self, family: str, similar: Sequence[Checkpoint], wanted: str) -> CheckpointMismatch:
        message, refused = self._why(family, similar, wanted), list(self._refused(family))
        if not refused:
            return CheckpointMismatch(message, hint="the same file on both machines")
        listed = "; ".join(reason.message for reason in refused[:3])
        return CheckpointMismatch(f"{message} Not used here: {listed}", hint=refused[0].hint)

    def _refused(self, family: str) -> Iterator[CheckpointError]:
        """Why files that may be of that family are not used; paths stay here."""
        for path, error in self.skipped.items():
            reason: CheckpointError | None
            for variant in variants_at(path):
                try:
                    found = _asked(read_header(path, variant=variant), self._adapters)
                    reason = None if isinstance(found, Checkpoint) else found.get(family)
                except CheckpointError:
                    reason = error
                if reason is None:
                    continue
                yield type(reason)(reason.message.replace(str(path), path.name), hint=reason.hint)

    def _why(self, family: str, similar: Sequence[Checkpoint], wanted: str) -> str:
        if similar:
            held = ", ".join(f"{c.name} ({fingerprint.of_checkpoint(c.header, c.spec)[:12]})" for c in similar)
            return f"The host's {family} weights ({wanted[:12]}) are not here; same shapes, other weights: {held}."
        others = [c for c in self._known.values() if c.spec.family == family]
        if others:
            listed = ", ".join(f"{c.name} ({c.spec.variant}, {'/'.join(c.spec.dtypes)})" for c in others)
            which = wanted[:12] or "of another size"
            return f"The host's {family} model ({which}) is not here; other {family} models: {listed}."
        names = ", ".join(c.name for c in self._known.values()) or "none"
        return f"No {family} model is in this worker's folders; models here: {names}."
