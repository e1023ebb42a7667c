"""The one exception that is the user's to fix; everything else that is raised here is a defect of ours."""


class TrainerError(ValueError):
    """One line: where, what was found, what was expected, what to do next. The CLI prints it and exits 1."""


class NotFiniteError(TrainerError):
    """A loss, a gradient or a score is NaN or infinite. Raised on every rank at once."""
