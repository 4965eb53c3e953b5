"""The one exception that a script prints as a line. data/ imports nothing else of Folio's."""


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print it on one line and exit with code 2."""
