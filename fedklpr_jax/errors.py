"""What the user did wrong, said in one line.

Anything a person can mend (a name, a value, a folder, a picture) is raised as `InputError`; the command line prints
its message alone and leaves with status 2. Everything else is our own mistake and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input. The message names the file, field or client, what is wrong, and what would be right.

    >>> print(InputError("config.rounds: -1 is not allowed; give a whole number from 1"))
    config.rounds: -1 is not allowed; give a whole number from 1
    """
