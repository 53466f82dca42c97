"""What adapters of diffusers' model classes share. Knows no family."""

from mesh_core.model.adapting.inputs import refuse_attention_arguments, restore_strides, unusual_strides
from mesh_core.model.adapting.naming import PREFIXES, find_naming, scope_in_stacks
from mesh_core.model.adapting.parameters import (
    COMPUTED_TYPES,
    LARGEST_SIZE,
    check_sizes,
    describe_parameters,
    diffusers_class,
    full_config,
    invisible_arguments,
)

__all__ = [
    "COMPUTED_TYPES",
    "LARGEST_SIZE",
    "PREFIXES",
    "check_sizes",
    "describe_parameters",
    "diffusers_class",
    "find_naming",
    "full_config",
    "invisible_arguments",
    "refuse_attention_arguments",
    "restore_strides",
    "scope_in_stacks",
    "unusual_strides",
]
