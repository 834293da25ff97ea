"""`umup data CONFIG`."""

import json
import sys

from umup.cli.arguments import config_parser, parse_with_config


def run(arguments: list[str]) -> int:
    """Tokenize once into the cache, with a progress bar on a terminal."""
    known, config = parse_with_config(
        config_parser("data", "Tokenize a config's corpus once into a cached memory map."), arguments
    )
    from rich.console import Console
    from rich.progress import Progress

    from umup.data.tokens import prepare

    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokenizing", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        files = prepare(config.data, config.model.vocab_size, config.tokens_per_batch, progress)
    if known.json:
        print(json.dumps(files.record))
    else:
        for name, part in (("train", files.train), ("val", files.val)):
            print(f"{name}: {len(part):,} tokens in {part.path}")
    return 0
