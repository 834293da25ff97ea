"""The README.md of an exported directory: what the model is, how its plan was, how to load it."""

from umup.interop.source import Source

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [umup]
---

# {name}

A {architecture} written by umup {version} from `{source}` ({format}).

| | |
|---|---|
{sizes}

Trained under the parametrization `{scheme}`{numbers} with {optimizer}. {how}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{check}
"""
SIZES = ("family", "hidden_size", "num_layers", "head_dim", "vocab_size", "max_seq_len")


def model_card(source: Source, name: str, architecture: str, how: str, check: str) -> str:
    """Markdown. `how`: where the plan's multipliers went; `check`: the comparison that ended the export."""
    import umup

    plan, model = source.plan, source.config.model.model_dump()
    given = {**plan.hparams, **plan.options}
    return CARD.format(
        name=name,
        architecture=architecture,
        version=umup.__version__,
        source=source.path.name,
        format=source.format,
        sizes="\n".join(f"| {key} | {model[key]} |" for key in SIZES),
        scheme=plan.scheme,
        numbers=f" ({', '.join(f'{key} {value}' for key, value in given.items())})" if given else "",
        optimizer=plan.optimizer,
        how=how,
        check=check,
    )
