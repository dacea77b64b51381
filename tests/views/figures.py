"""What a figure says and draws."""


def caption_of(figure):
    """The note under it, as one line."""
    return next(note.text for note in figure.layout.annotations if note.name == "caption").replace("<br>", " ")


def titles_of(figure):
    """Titles of the y axes, from above."""
    axes = sorted((axis for axis in figure.layout if axis.startswith("yaxis")), key=lambda axis: int(axis[5:] or 1))
    return [figure.layout[axis].title.text for axis in axes]


def lines_of(figure, title):
    """The lines of the panel with a title, without bands and keys."""
    row = titles_of(figure).index(title) + 1
    axis = f"y{row if row > 1 else ''}"
    return [t for t in figure.data if t.yaxis == axis and t.fill is None and t.x[0] is not None]
