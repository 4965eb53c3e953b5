"""The exception that scripts print as one line.

It is here because data/ imports nothing else of Folio.
"""


class UserError(Exception):
    """A mistake that the user can fix. Scripts print it on one line and exit with code 2."""
