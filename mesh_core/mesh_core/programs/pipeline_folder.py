"""The folder of a diffusers pipeline: what it holds, whether it can make what is asked of it, and loading it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from mesh_core.builtin import installed_plugins
from mesh_core.errors import CheckpointUnrecognised, ConfigError
from mesh_core.model.adapting.parameters import alike
from mesh_core.model.checkpoint import CheckpointHeader, read_header, read_json, weights_folder
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.safetensors import refuse_lfs_pointer
from mesh_core.model.variants import variants
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.pipeline_arguments import Dtypes, accepted

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def pipeline_header(
    path: str | Path,
    variant: str | None = None,
    given: Collection[str] = (),
    components: str | Path | None = None,
) -> CheckpointHeader:
    """The header of the transformer in a pipeline's folder, or of one in a single file for that pipeline.

    Args:
        variant: of the weights; as in diffusers, components that do not have it are taken as they are if others do.
        given: components that the user has in memory.
        components: the folder of the pipeline, where ``path`` is a single file.

    Raises:
        ConfigError: a single file without ``components``, or a folder that holds no ``model_index.json``.
        CheckpointError: see `read_header`; no component has the variant, or one is a pointer of Git LFS.
    """
    if components is not None:
        return _file_for(Path(path), Path(components), variant, given)
    folder = Path(path)
    if not folder.exists() and _HUB_NAME.fullmatch(str(path)):
        raise CheckpointUnrecognised(
            f"There is no checkpoint at {path}; what is at Hugging Face is not downloaded.",
            hint=f"hf download {path} --local-dir models/{folder.name}, then the path of that folder",
        )
    elsewhere = variant and folder.is_dir() and variant not in variants(weights_folder(folder))
    if elsewhere and any(_of_variant(file, variant or "") for part in _parts(folder) for file in part):
        header = read_header(path)
    else:
        header = read_header(path, variant=variant or None)
    if not header.pipeline and Path(path).is_file():
        raise ConfigError(
            f"{path} is a single file, which holds a transformer alone; text encoders and VAE are needed here too.",
            hint="components=FOLDER (--components FOLDER), the folder of a whole pipeline saved by diffusers",
        )
    if not header.pipeline:
        raise ConfigError(
            f"{path} is not a pipeline folder: it has no model_index.json.",
            hint="the folder that holds transformer/, vae/ and text_encoder/, or split() on a pipeline of your own",
        )
    for part in _parts(folder, ("transformer", *given)):
        _refuse_pointers(part, variant or "")
    return header


def _file_for(file: Path, folder: Path, variant: str | None, given: Collection[str]) -> CheckpointHeader:
    if file.is_dir():
        raise ConfigError(
            f"{file} is a folder; components= is for a transformer in a single file.", hint="the folder alone"
        )
    pipeline = read_json(folder / "model_index.json")
    if not pipeline:
        raise ConfigError(
            f"{folder} is not a pipeline folder: it has no model_index.json.",
            hint="the folder that holds vae/ and text_encoder/",
        )
    for part in _parts(folder, ("transformer", *given)):
        _refuse_pointers(part, variant or "")
    return replace(read_header(file), pipeline=pipeline, folder=folder)


def pipeline_checkpoint(
    path: str | Path,
    plugins: Plugins,
    variant: str | None = None,
    given: Collection[str] = (),
    components: str | Path | None = None,
) -> Checkpoint:
    """The transformer of a pipeline. Arguments as for `pipeline_header`.

    Raises:
        ConfigError, CheckpointError: as `pipeline_header`, or no family's, or a single file of another model.
    """
    checkpoint = recognise(pipeline_header(path, variant, given, components), plugins)
    _refuse_another_model(checkpoint)
    return checkpoint


def _refuse_another_model(checkpoint: Checkpoint) -> None:
    """Refuse a single file whose model is not that of the pipeline that it is to be a part of.

    Raises:
        CheckpointUnrecognised: names the first difference, as far as the folder says what its transformer is.
    """
    header, folder = checkpoint.header, checkpoint.header.folder
    if folder is None or folder == header.path:
        return
    with torch.device("meta"):
        kind = type(checkpoint.adapter.skeleton(checkpoint.spec)).__name__
    named = header.pipeline.get("transformer")
    listed = {**header.component("transformer"), **({"_class_name": named[1]} if isinstance(named, list) else {})}
    for name, value in {"_class_name": kind, **checkpoint.spec.config}.items():
        # None stands for what follows from other arguments.
        if None not in (value, listed.get(name)) and alike(listed[name]) != alike(value):
            raise CheckpointUnrecognised(
                f"{header.path} is another model than the one in {folder}: {name} is {value!r}, there it is "
                f"{listed[name]!r}.",
                hint="the folder of the pipeline that the file was made for",
            )


def _parts(folder: Path, left_out: Collection[str] = ()) -> Iterator[list[Path]]:
    """The files of each component of a pipeline."""
    for name, value in read_json(folder / "model_index.json").items():
        if isinstance(value, list) and name not in left_out and (folder / name).is_dir():
            yield sorted(file for file in (folder / name).iterdir() if file.is_file())


def _of_variant(file: Path, variant: str) -> bool:
    return file.name.partition(".")[2].startswith(variant) and file.name.count(".") > 1


def _refuse_pointers(files: Sequence[Path], variant: str) -> None:
    """Refuse a file that would be read and that Git LFS has left a pointer to; of weights, those of the variant."""
    named = [file for file in files if variant and _of_variant(file, variant)]
    for file in files:
        if file.suffix == ".safetensors" and (file not in named if named else file.name.count(".") > 1):
            continue
        if file.suffix in (".safetensors", ".json"):
            with file.open("rb") as stream:
                refuse_lfs_pointer(file, stream.read(64))


def check_call(
    path: str | Path,
    arguments: Mapping[str, Any],
    plugins: Plugins | None = None,
    variant: str | None = None,
    components: str | Path | None = None,
) -> type[Any]:
    """Refuse what the pipeline in the folder ``path`` cannot make, before any weight is read; returns its class.

    Args:
        arguments: of the pipeline's call, as far as the user set them.

    Raises:
        ConfigError: an argument that the model does not accept, or a pipeline that diffusers does not have.
        CheckpointError: its transformer is none of an installed family.
    """
    checkpoint = pipeline_checkpoint(path, plugins or installed_plugins(), variant, components=components)
    header = checkpoint.header
    checkpoint.adapter.check_call(checkpoint.spec, header, arguments)
    found = _class_of(header)
    known = inspect.signature(found.__call__).parameters
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{found.__name__} makes nothing that has a {name}.", hint="the same without it")
    return found


def pipeline_arguments(
    header: CheckpointHeader, given: Mapping[str, Any], similar: Collection[str] = ()
) -> dict[str, Any]:
    """Those of ``given`` that the pipeline is loaded with.

    Raises:
        ConfigError: a pipeline that diffusers does not have, or an argument that is not accepted; see `accepted`.
    """
    return accepted(given, None if _custom(header, given) else _class_of(header), similar)


def _custom(header: CheckpointHeader, given: Mapping[str, Any]) -> bool:
    return given.get("custom_pipeline") is not None or not isinstance(header.pipeline.get("_class_name"), str)


def pipeline_around(model: Any, header: CheckpointHeader, dtype: Dtypes, arguments: Mapping[str, Any]) -> Any:
    """The pipeline in a folder with ``model`` for its transformer.

    Args:
        dtype: in which the other components are loaded, as diffusers takes it.
        arguments: of ``from_pretrained``.

    Raises:
        ConfigError: a pipeline that diffusers does not have, or one that takes another transformer.
    """
    import diffusers

    # The class itself: the general one passes over components that the class has a default for.
    kind = diffusers.DiffusionPipeline if _custom(header, arguments) else _class_of(header)
    # Renamed in diffusers 0.42.
    typed = {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}
    pipeline = kind.from_pretrained(str(header.folder), transformer=model, **typed, **arguments)
    if getattr(pipeline, "transformer", None) is not model:
        raise ConfigError(
            f"{type(pipeline).__name__} does not use the transformer that it is given, so it would not be split.",
            hint="split() on the loaded pipeline",
        )
    return pipeline


def _class_of(header: CheckpointHeader) -> type[Any]:
    """The class that ``model_index.json`` names. Raises ConfigError if diffusers does not have it."""
    import diffusers

    name = header.pipeline.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no pipeline {str(name)[:80]!r}.", hint="pip install -U diffusers"
        )
    return found
