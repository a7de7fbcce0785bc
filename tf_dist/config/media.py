"""Options of sound and pictures: how a recording becomes frames, and an image patches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError

option = partial(options.option, group="sound and images")


@dataclass(frozen=True)
class MediaOptions(options.Options):
    """Frames of recordings (transcribe, speak) and patches of images (caption)."""

    sample_rate: int = option(
        16000, text="samples per second of all WAV files", least=1000, on_resume="same", may_be_idle=True
    )
    mels: int = option(80, text="bands of the mel spectrogram", least=2, on_resume="same", may_be_idle=True)
    stack_frames: int = option(
        4, text="frames (10 ms each) in a slot of a row", least=1, on_resume="same", may_be_idle=True
    )
    image_size: int = option(
        64, text="height and width that images are resized to", least=1, on_resume="same", may_be_idle=True
    )
    patch_size: int = option(
        8,
        text="height and width of a patch; must divide the image",
        least=1,
        on_resume="same",
        may_be_idle=True,
    )

    def check(self) -> None:
        """Refuse sizes that do not fit each other or a row."""
        if self.image_size % self.patch_size:
            raise UsageError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.patch_size * self.patch_size * 3 % 2:
            raise UsageError(f"patch_size is {self.patch_size}: it must be even, as two values are one word")
        if self.mels * self.stack_frames % 2:
            raise UsageError(f"mels {self.mels} x stack_frames {self.stack_frames} must be even")
