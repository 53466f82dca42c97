"""Every module that plugins may import from, with its names. A change here is a change for other people's code."""

from __future__ import annotations

from collections.abc import Mapping

PUBLIC: Mapping[str, str] = {
    "mesh_core.errors": """
        MAX_RENDERED Cancelled CheckpointChanged CheckpointCorrupt CheckpointError CheckpointMismatch
        CheckpointUnrecognised ConfigError ConstantsMissing LoraError LoraMissing LoraTooLarge
        LoraUnmatched MeshError NotAuthorised PeerLost PlanDoesNotFit PlanError PluginBroken
        PluginConflict PluginError PluginIncompatible PluginNotFound RemoteError SessionError
        SessionUnknown TransportError TransportTimeout Unreachable UnsupportedInput WireError
        WireMalformed WireTooLarge WireUnsupportedVersion by_name
    """,
    "mesh_core.hookspecs": """
        API_MAJOR ENTRY_POINT_GROUP BlockSpan Codec CodecChoice Crossing Hop Link LoraFacts
        LoraPlacement ModelAdapter ModelSpec Quality Role StepStats Transport WeightFormat WorkerInfo hookimpl
        mesh_add_commands mesh_choose_codec mesh_place_lora mesh_propose_split
        mesh_register_adapters mesh_register_codecs mesh_register_transports mesh_register_weight_formats
        mesh_step_failed mesh_step_finished mesh_step_started
    """,
    "mesh_core.model": """
        BlockSpan CheckpointHeader Claim Conditioning Dimensions ModelAdapter ModelSpec ParameterSpec Parts
        Piece Role Stage State StoredTensor TensorInfo WeightFormat WeightReader read_header
    """,
    "mesh_core.model.adapting": """
        COMPUTED_TYPES LARGEST_SIZE PREFIXES check_sizes describe_parameters diffusers_class find_naming
        full_config invisible_arguments refuse_attention_arguments restore_strides scope_in_stacks unusual_strides
    """,
    "mesh_core.programs.comfy": """
        ComfySide Expected HandOver RemotePart hand_over_at intercepted
    """,
    "mesh_core.transport.base": """
        Address Channel Frame Frames Listener Peer Transport Trust UnfitMessage
    """,
    "mesh_core.transport.frames": "byte_views",
    "mesh_core.wire.limits": "GREETING HANDED_OVER LIMITS MessageLimits PROBE_BYTES REQUEST SENT_BACK",
    "mesh_core.builtin": "builtin_plugins installed_plugins load_plugins",
    "mesh_core.worker.server": "Worker WorkerOptions",
    "mesh_core.testing": """
        TRANSPORT_CHECKS ThreadWorker check_codec check_every_cut check_reads_only_its_own check_recognises_without_data
        check_transport mesh_home thread_workers wait_until
    """,
}
"""Beside these, a plugin imports from `mesh_core` itself what a script does, and from `mesh_codec`."""
