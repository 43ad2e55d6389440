"""Where the time of a training step goes: python scripts/profile_step.py CONFIG [images=2 ...] [key=value ...].

The recipe's detector with random weights on random images; keys of the recipe work as in train.py. Writes a table and
a trace, for chrome://tracing or ui.perfetto.dev, into OUTPUT/profile.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from loce.config import Count, UserError, load_config, read_options, run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """A profile of training steps of CONFIG, by part; all other keys are the recipe's (`train.py CONFIG -h`)."""

    images: Count = 2
    size: tuple[Count, ...] = (800, 1333)  # of the images, height and width
    instances: Count = 13  # per image
    classes: Count = 1203
    steps: Count = 2  # measured, after one to warm up
    threads: Count = 1  # of PyTorch, on the CPU


def main() -> None:
    # Options of the profile, then those of the recipe.
    own = {field.name for field in fields(Options)}
    words = sys.argv[1:]
    options = read_options(Options, [w for w in words if w.partition("=")[0] in (*own, "-h", "--help")])
    if len(options.size) != 2:
        raise UserError(f"size = {list(options.size)}: must be height and width, such as [800, 1333]")
    config = load_config([w for w in words if w.partition("=")[0] not in own])
    import torch  # after the options are known to be right

    from loce.engine import profiling
    from loce.utils.distributed import setup
    from loce.utils.environment import environment
    from loce.utils.files import write_text

    # A model and images of noise, some steps, the table and the trace.
    device = setup(config.device)
    torch.set_num_threads(options.threads)
    model = profiling.made_up_model(config, options.classes, device)
    size = (options.size[0], options.size[1])
    samples = profiling.random_samples(options.images, size, options.instances, options.classes)
    folder = Path(config.output, "profile")
    step = profiling.make_step(model, config)
    parts = profiling.profile_steps(model, step, samples, options.steps, folder / "trace.json")
    text = profiling.table(parts)
    facts = "\n".join(f"    {line}" for line in environment(device).splitlines())
    write_text(folder / "profile.md", f"{text}\n\n{facts}\n")
    print(f"{text}\n\n{folder}/profile.md, {folder}/trace.json")


if __name__ == "__main__":
    run_script(main)
