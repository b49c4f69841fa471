"""`python -m fairlead` is `fairlead`."""

from .cli import main

main()
