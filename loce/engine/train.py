"""Training from options to results: checks, training or its continuation, evaluation. Both training scripts call it."""

from contextlib import ExitStack
from pathlib import Path

from loce.checkpoint.save import require_room
from loce.config import Config
from loce.data.annotations.lvis import LVISAnnotations
from loce.data.build import val_annotations
from loce.engine import validation
from loce.engine.arm import Arm
from loce.engine.boards import open_boards
from loce.engine.dry_run import dry_run, overfit
from loce.engine.inference import evaluate_models
from loce.engine.preflight import preflight
from loce.engine.ranks import process_group
from loce.engine.summary import introduce
from loce.engine.trainer import Trainer
from loce.utils import distributed
from loce.utils.errors import DivergedError, Stopped
from loce.utils.files import write_text
from loce.utils.progress import print_line

STOPPED = "stopped.txt"  # in the run folder while a run that was asked to stop waits to go on


def train(*configs: Config) -> None:
    """Train to the end, from the newest checkpoint in the run folder where there is one, and evaluate.

    Several configs train in one pass (see passes.py), each into its own run folder.
    """
    with process_group(configs[0].device) as device:
        try:
            if configs[0].train.dry_run or configs[0].train.overfit:
                for config in configs:
                    (dry_run if config.train.dry_run else overfit)(config, device)
                return
            # Everything that can be wrong is found here; a mistake leaves the run folders as they were.
            with preflight(*configs) as found:
                trainer = Trainer(configs, device, found.annotations, found.checkpoints)
                require_room([(arm.folder, arm.config, arm.model) for arm in trainer.arms])
            for config in configs if distributed.is_main() else ():
                Path(config.output, STOPPED).unlink(missing_ok=True)

            # Training.
            for arm in trainer.finished if distributed.is_main() else ():
                print_line(f"{arm.folder}: training is finished already")
            if trainer.arms:
                trainer.open_log()
                introduce(trainer)
                trainer.fill_memory()
                trainer.fit()
                trainer.close_log()

            # Evaluation.
            if trainer.config.train.evaluate:
                annotations = val_annotations(trainer.config)
                _evaluate([*trainer.finished, *trainer.arms], annotations)
            if trainer.diverged:
                raise DivergedError("\n".join(trainer.diverged))
        except Stopped as request:
            # For scripts that put the job back into its queue: torchrun hides the exit code.
            for config in configs if distributed.is_main() else ():
                write_text(Path(config.output) / STOPPED, f"stopped by {request}; the same command goes on\n")
            raise


def _evaluate(arms: list[Arm], annotations: LVISAnnotations) -> None:
    """Evaluate into RUN/eval; numbers and a picture also on the pages of TensorBoard."""
    with ExitStack() as stack:
        for arm in arms:
            stack.enter_context(arm.averaged())
        evaluate_models([arm.evaluated("eval") for arm in arms], annotations)
        for arm in arms if distributed.is_main() else ():
            boards = open_boards(arm.folder, None, arm.config)
            values = validation.results(arm.evaluated("eval"), annotations)
            for board in boards:
                if problem := board.show(arm.step, values):
                    print_line(f"WARNING: {problem}")
                board.close()
