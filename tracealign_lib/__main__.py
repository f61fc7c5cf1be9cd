"""`python -m tracealign_lib` is `tracealign`: a launcher of several processes starts modules by name."""

from tracealign_lib.cli import app

app()
