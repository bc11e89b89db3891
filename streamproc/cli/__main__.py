"""``python -m streamproc.cli``, for where the script is not on the path."""

from streamproc.cli import main

main()
