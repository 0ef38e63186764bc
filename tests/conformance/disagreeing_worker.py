"""One of two ranks that differ: `heterodox train` with the arguments behind `--` for rank 1 alone."""

import os
import sys

from heterodox.__main__ import main

if __name__ == "__main__":
    cut = sys.argv.index("--")
    alone = sys.argv[cut + 1 :] if os.environ["RANK"] == "1" else []
    sys.argv = ["heterodox", *sys.argv[1:cut], *alone]
    main()
