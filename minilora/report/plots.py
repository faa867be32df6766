"""matplotlib, if it is there: it belongs to the extra `plots`, and only the pictures need it."""

import io

from minilora.atomic import atomic_write


def load_pyplot(what: str):
    """matplotlib.pyplot drawing into files, or None after one printed line that says what is
    left out and why."""
    try:
        import matplotlib
    except ImportError:
        print(f"{what} not drawn: matplotlib is missing, see the extra `plots`; everything else works")
        return None
    matplotlib.use("Agg")  # no window, also where a display is
    from matplotlib import pyplot

    return pyplot


def save_figure(pyplot, figure, path) -> bool:
    """Write the figure as PNG and forget it; True, so that callers can return it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    atomic_write(path, buffer.getvalue())
    return True
