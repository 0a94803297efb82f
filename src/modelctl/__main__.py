"""python -m modelctl"""

from .cli import main

main()
