"""FP8 training against BF16 and torchao on this machine: `umup bench` under the name of the other benchmarks.

python benchmarks/fp8_training.py [--shape 7b | 1b | tiny | CONFIG] [--variants A,B,...] [--json]
"""

import sys

from umup.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
