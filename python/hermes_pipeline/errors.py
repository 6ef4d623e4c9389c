"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """What was given cannot be used; the message says what was wanted and the way out.

    The command line prints the message alone and exits with 2. Anything else that escapes
    is a defect of ours and keeps its traceback.
    """
