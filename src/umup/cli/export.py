"""`umup export SRC --to FORMAT --out DIR`."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from umup.cli.arguments import Parser
from umup.errors import ConfigError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(arguments: list[str]) -> int:
    """Write a model as another program's directory and compare the two; exit code 1 where they differ."""
    parser = Parser(
        "export",
        "A model as another program's directory, with a comparison of logits.",
        epilog="formats: umup (a run directory); hf-llama (a stock Llama, every multiplier folded into its weights);\n"
        "hf-granite (multipliers kept in its config); hf-gpt2, hf-gptj, hf-bloom, hf-falcon, hf-starcoder, hf-mpt;\n"
        "hf (the family's own of these)",
    )
    parser.add_argument("source", metavar="SRC", help="a run directory, or a Hugging Face directory")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="what to write, see below")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", type=Path, help="a new or empty directory")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights [as the source has them]")
    parser.add_argument("--fp8", action="store_true", help="hidden products in FP8 with static scales, as vLLM reads")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest file, as in 500MB [5GB]")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    known = parser.parse_strictly(arguments)
    shard_bytes = _bytes(known.shard_size)

    from umup.interop.export import Request, export
    from umup.interop.source import open_source

    request = Request(known.to, known.dtype, known.fp8, shard_bytes)
    report = export(open_source(known.source), known.out, request, lambda line: print(line, file=sys.stderr))
    if known.json:
        body = {**asdict(report), "out": str(report.out)}
        print(json.dumps({**body, "comparison": {**body["comparison"], "passed": report.comparison.passed}}))
    else:
        files = f"{len(report.files)} file{'s' * (len(report.files) > 1)}, {report.bytes / 1e9:.3g} GB"
        print(f"wrote {report.out}: {report.format}, {report.dtype}, {files}")
        print(report.comparison.text())
    return 0 if report.comparison.passed else 1


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * UNITS[(found[2] or "").upper()] if found else 0
    if size < 1:
        raise ConfigError(f"--shard-size {text!r} is no size; write a number of bytes, or one with KB, MB or GB")
    return int(size)
