"""`umup generate RUN --prompt TEXT`."""

import sys

from umup.cli.arguments import Parser


def run(arguments: list[str]) -> int:
    """Stream a completion to the terminal, or print it as JSON."""
    parser = Parser("generate", "Text from a run or an imported model, streamed as it is made.")
    parser.add_argument("run", metavar="RUN", help="a run directory, or a Hugging Face directory")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to make [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy [0.8]")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all [0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total share [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may repeat")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a stream")
    known = parser.parse_strictly(arguments)
    if "" in known.stop:
        parser.error("--stop must not be empty")
    if known.max_tokens < 1:
        parser.error(f"--max-tokens must be 1 or more, not {known.max_tokens}")

    from umup.inference.completion import Completion, completion_json, load_run
    from umup.inference.generate import Sampling

    sampling = Sampling(known.temperature, known.top_k, known.top_p, known.seed)
    loaded = load_run(known.run, lambda line: print(line, file=sys.stderr))
    echo = known.prompt  # printed with the first piece: until then the prompt may be refused
    for piece in loaded.stream(known.prompt, known.max_tokens, sampling, tuple(known.stop)):
        if isinstance(piece, Completion):
            print(completion_json(known.prompt, piece) if known.json else echo)
        elif not known.json:
            sys.stdout.write(echo + piece)
            sys.stdout.flush()
            echo = ""
    return 0
