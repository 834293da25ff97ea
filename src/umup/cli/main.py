"""`umup COMMAND ...`: the command table, and how errors become exit codes.

0 done or passed, 1 a check ran and failed, 2 bad input, 3 a run failed, 4 a check was undecided, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

import umup
from umup.errors import ConfigError, InputError, RunError, did_you_mean

COMMANDS = {
    "demo": "the whole story on a CPU in minutes: sweep a proxy, transfer, train wider, generate, plot",
    "train": "train a config; goes on if the run directory holds a checkpoint",
    "generate": "text from a run",
    "data": "tokenize a config's corpus once into a cached memory map",
    "rules": "schemes, hyperparameters, options, optimizers and horizon rules, with their sources",
    "explain": "the plan of a config: every number with its rule and source",
    "coord-check": "is training the same at every width? a verdict, and the mistake if it is not",
    "ranges": "what a run's FP8 scales saw, and which products to spare",
    "sweep": "hyperparameter search on a proxy; resumable, and many workers may join",
    "transfer-check": "does a tuned value stay best over width, depth, batch or length: basins, drift, verdict",
    "transfer": "a target's complete config from a finished sweep or run: moves with rules, warnings, cost",
    "export": "a model as another program's directory (Hugging Face's, or a run), and a comparison of logits",
    "convert": "configs across ecosystems: Cerebras (SP and muP), nanoGPT-mup, llm.c, umup; Megatron, torchtitan out",
    "bench": "the speed table of this machine: BF16, FP8, peers where installed; or whether FP8 pays for a config",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(umup.__version__)
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except InputError as error:
        return _complain(error, 2)
    except RunError as error:
        return _complain(error, 3)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        sys.stdout = None
        return 0
    except (OSError, MemoryError) as error:
        return _complain(str(error) or type(error).__name__, 3)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):  # torch's two wordings
            raise
        return _complain(f"out of memory: {str(error).splitlines()[0]}", 3)
    except KeyboardInterrupt:
        resumes = arguments[0] in ("train", "demo", "sweep", "transfer-check")
        return _complain("interrupted" + "; the same command goes on where it was" * resumes, 130)


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; {did_you_mean(command, COMMANDS)}")
    result: int = import_module(f"umup.cli.{command.replace('-', '_')}").run(arguments)
    return result


def _complain(error: object, code: int) -> int:
    print(f"umup: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: umup COMMAND ...   (umup COMMAND --help says more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
