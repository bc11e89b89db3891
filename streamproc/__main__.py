"""``python -m streamproc``, for where the script is not on the path."""

from streamproc.cli import main

main()
