"""The views of all groups, in the order in which they are shown; a new group adds a line."""

from metaint.views.groups import heads, inner, memory, outputs, recurrence, residual, saturation, weights

VIEWS = {
    view.group: view
    for view in (
        heads.VIEW,
        outputs.VIEW,
        residual.VIEW,
        inner.VIEW,
        saturation.VIEW,
        memory.VIEW,
        weights.VIEW,
        recurrence.VIEW,
    )
}
