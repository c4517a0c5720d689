"""`python -m beit …` and `torchrun … -m beit …` are `beit …`."""

from beit.cli import main

main()
