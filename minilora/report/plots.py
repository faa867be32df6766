"""matplotlib, if it is there: it belongs to the extra `plots`, and only the pictures need it."""

import io
import warnings

from minilora.atomic import atomic_write
from minilora.textfiles import printable


def load_pyplot(what: str):
    """matplotlib.pyplot drawing into files, or None after a line that says what is left out."""
    try:
        import matplotlib
    except ImportError:
        print(f"{what} not drawn: matplotlib is missing, see the extra `plots`; everything else works")
        return None
    matplotlib.use("Agg")  # no window, also where a display is
    from matplotlib import pyplot

    return pyplot


def plain(name: str) -> str:
    """A name as a label: no formula between dollar signs, and shown though it begins with _."""
    return " " * name.startswith("_") + printable(name).replace("$", r"\$")


def save_figure(pyplot, figure, path) -> bool:
    """Write the figure as PNG and forget it; True, so that callers can return it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    atomic_write(path, buffer.getvalue())
    return True
