"""What a pipeline's call made, as a file: a picture, or a video with its sound. Knows no pipeline by name.

Diffusers' pipelines give ``images`` or ``frames``, and ``audio`` beside frames that have sound. Pictures are written
by Pillow, videos by PyAV, which is imported when it is used.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from mesh_core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
_RATE_NAMES = ("frame_rate", "fps")
_DEFAULT_RATE = 24.0
_CODERS = ("libx264", "aac")
_WITH_VIDEO = 'pip install "comfyui-mesh[video]"'
_CRF = "17"
"""Constant rate factor of x264: hardly told from the original, at a tenth of its size."""


@dataclass(frozen=True)
class Sound:
    """``samples``: float32 in -1..1, [channels, n]; ``rate``: per second."""

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class Video:
    """``frames``: uint8 RGB, [F, H, W, 3]; ``rate``: frames per second."""

    frames: NDArray[np.uint8]
    rate: float
    sound: Sound | None = None


def makes_video(call: Any) -> bool:
    """Whether a pipeline's ``__call__`` makes frames rather than a picture."""
    return "num_frames" in inspect.signature(call).parameters


def checked_output(output: Path | None, pipeline_class: type[Any]) -> Path:
    """The file to write, named by the user or not; fails before anything slow happens.

    Raises:
        ConfigError: it cannot be written, its kind is not what the pipeline makes, or PyAV is missing.
    """
    video = makes_video(pipeline_class.__call__)
    usual = "out.mp4" if video else "out.png"
    output = output if output is not None else Path(usual)
    if output.is_dir():
        raise ConfigError(f"{output} is a folder.", hint=f"--output {output / usual}")
    if video:
        _av()
    if not (output.suffix.lower() in VIDEO_SUFFIXES if video else _writes_pictures(output.suffix.lower())):
        made = "a video" if video else "a picture"
        raise ConfigError(
            f"{pipeline_class.__name__} makes {made}; {output.name} is none that can be written.",
            hint=f"--output {output.stem}{Path(usual).suffix}",
        )
    return writable(output, "--output")


def writable(file: Path, option: str) -> Path:
    """``file``, which the user named with ``option``, as soon as it is known that it can be written.

    Raises:
        ConfigError: it cannot be; says why.
    """
    if not file.parent.exists():
        raise ConfigError(f"The folder {file.parent} does not exist.", hint=f"make it first, or another {option}")
    new = not file.exists()
    try:
        file.open("ab").close()
        if new:
            file.unlink()
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.", hint=f"another {option}") from error
    return file


def _writes_pictures(suffix: str) -> bool:
    """Whether Pillow can: many formats it knows by name, and some of them hold no colours or need other libraries."""
    from PIL import Image

    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        return False
    try:
        Image.new("RGB", (16, 16)).save(BytesIO(), format=kind)
    except (OSError, ValueError, KeyError):
        return False
    return True


def save(pipeline: Any, output: Any, arguments: Mapping[str, Any], file: Path) -> None:
    """Write the first picture or video of a call's ``output``.

    Args:
        arguments: of the call; the frame rate may be among them.

    Raises:
        ConfigError: it cannot be written there.
    """
    with _beside(file) as draft:
        if hasattr(output, "images"):
            _save_picture(output.images[0], draft)
        else:
            write_video(video_of(pipeline, output, arguments), draft)


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A file of the same kind in the same folder, which takes the place of ``file`` once it is whole: an earlier
    picture is lost to no full disk."""
    draft = file.with_name(f".{file.stem[:100]}-{token_hex(4)}{file.suffix}")
    try:
        yield draft
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _save_picture(picture: Any, file: Path) -> None:
    try:
        picture.save(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The picture could not be written: {error}.", hint="another --output") from error


def video_of(pipeline: Any, output: Any, arguments: Mapping[str, Any]) -> Video:
    """The first video of a call's ``output`` with its sound, if it has any.

    Raises:
        ConfigError: no part of the pipeline says how many samples of its sound are a second.
    """
    import numpy as np

    frames = np.stack([np.asarray(frame) for frame in output.frames[0]])
    if frames.dtype != np.uint8:
        frames = (np.clip(frames, 0.0, 1.0) * 255).round().astype(np.uint8)
    audio = getattr(output, "audio", None)
    sound = None
    if audio is not None:
        samples = audio[0].detach().float().cpu().numpy()
        sound = Sound(np.clip(np.atleast_2d(samples), -1.0, 1.0), _sample_rate(pipeline))
    return Video(frames, _frame_rate(pipeline, arguments), sound)


def write_video(video: Video, file: Path) -> None:
    """Write ``video`` as H.264 with AAC sound; the container follows from the file's name.

    Raises:
        ConfigError: PyAV is missing, or cannot write there.
    """
    av = _av()
    try:
        with av.open(str(file), "w") as container:
            pictures = container.add_stream("libx264", rate=Fraction(video.rate).limit_denominator(1001))
            height, width = (side - side % 2 for side in video.frames.shape[1:3])
            pictures.width, pictures.height, pictures.pix_fmt = width, height, "yuv420p"
            pictures.options = {"crf": _CRF}
            sounds = _sound_stream(container, video.sound) if video.sound is not None else None
            for frame in video.frames[:, :height, :width]:
                container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(pictures.encode())
            if video.sound is not None and sounds is not None:
                _write_sound(av, container, sounds, video.sound)
    except (av.FFmpegError, OSError) as error:
        raise ConfigError(f"The video could not be written: {error}.", hint="another --output") from error


def _sound_stream(container: Any, sound: Sound) -> Any:
    layouts = {1: "mono", 2: "stereo"}
    if len(sound.samples) not in layouts:
        raise ConfigError(f"Sound of {len(sound.samples)} channels is not written.", hint="one or two channels")
    return container.add_stream("aac", rate=sound.rate, layout=layouts[len(sound.samples)])


def _write_sound(av: Any, container: Any, stream: Any, sound: Sound) -> None:
    import numpy as np

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.samples), format="fltp", layout=stream.layout.name)
    frame.sample_rate, frame.pts = sound.rate, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _frame_rate(pipeline: Any, arguments: Mapping[str, Any]) -> float:
    known = inspect.signature(pipeline.__call__).parameters
    for name in _RATE_NAMES:
        default = known[name].default if name in known else None
        value = arguments.get(name, default)
        if isinstance(value, (int, float)):
            return float(value)
    return _DEFAULT_RATE


def _sample_rate(pipeline: Any) -> int:
    for component in pipeline.components.values():
        rate = getattr(getattr(component, "config", None), "output_sampling_rate", None)
        if isinstance(rate, int):
            return rate
    raise ConfigError(
        "No part of this pipeline says at which rate its sound is sampled (output_sampling_rate).",
        hint="the pipeline from a script, where the sound can be saved with a rate of your own",
    )


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError("Writing a video needs PyAV.", hint=_WITH_VIDEO) from error
    for name in _CODERS:
        try:
            av.Codec(name, "w")
        except ValueError as error:
            raise ConfigError(f"The FFmpeg of this PyAV has no coder {name}.", hint=_WITH_VIDEO) from error
    return av
