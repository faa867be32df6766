"""--log-to tensorboard: a run's numbers and figures as event files, in RUN/tensorboard.

    tensorboard --logdir runs

The package is an optional extra (pip install 'minilora[log]'); nothing else needs it.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from minilora.errors import UserError


def check_available() -> None:
    """UserError where --log-to tensorboard cannot be done."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--log-to tensorboard needs the package tensorboard: pip install tensorboard") from None


class Board:
    """The event files of one run. first_step: what an earlier session wrote from there on is
    withdrawn, since a resumed run takes these steps anew."""

    def __init__(self, run_dir: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def scalars(self, group: str, values: dict[str, object], step: int) -> None:
        """One point for each number, on the curve GROUP/NAME; what is no number is left out."""
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """A figure of the report, if the run has it."""
        if path.exists():
            pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
            self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
