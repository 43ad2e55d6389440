"""Training from options to results: checks, training or its continuation, evaluation. Both training scripts call it."""

from pathlib import Path

from loce.checkpoint.save import require_room
from loce.config import Config
from loce.data.build import val_annotations
from loce.engine import validation
from loce.engine.boards import open_boards
from loce.engine.dry_run import dry_run, overfit
from loce.engine.inference import evaluate_model
from loce.engine.preflight import preflight
from loce.engine.ranks import process_group
from loce.engine.summary import introduce
from loce.engine.trainer import Trainer
from loce.utils import distributed
from loce.utils.errors import Stopped
from loce.utils.files import write_text
from loce.utils.progress import print_line

STOPPED = "stopped.txt"  # in the run folder while a run that was asked to stop waits to go on


def train(config: Config) -> None:
    """Train to the end, from the newest checkpoint in the run folder where there is one, and evaluate."""
    with process_group(config.device) as device:
        try:
            if config.train.dry_run or config.train.overfit:
                return (dry_run if config.train.dry_run else overfit)(config, device)
            # Everything that can be wrong is found here; a mistake leaves the run folder as it was.
            with preflight(config) as found:
                trainer = Trainer(config, device, found.annotations, found.checkpoint)
                if trainer.step < trainer.total:
                    require_room(trainer.folder, config, trainer.model)
            if distributed.is_main():
                (trainer.folder / STOPPED).unlink(missing_ok=True)

            # Training.
            if trainer.step < trainer.total:
                trainer.open_log()
                introduce(trainer)
                trainer.fill_memory()
                trainer.fit()
                trainer.log.close()
            elif distributed.is_main():
                print_line(f"{trainer.folder}: training is finished already")

            if config.train.evaluate:
                _evaluate(trainer)
        except Stopped as request:
            if distributed.is_main():  # for scripts that put the job back into its queue: torchrun hides the exit code
                write_text(Path(config.output) / STOPPED, f"stopped by {request}; the same command goes on\n")
            raise


def _evaluate(trainer: Trainer) -> None:
    """Evaluate into RUN/eval; numbers and a picture also on the pages of TensorBoard."""
    folder, config, step = trainer.folder / "eval", trainer.config, trainer.step
    annotations = val_annotations(config)
    evaluate_model(trainer.model, config, folder, f"{trainer.folder} after {step} iterations", annotations)
    if distributed.is_main():
        boards = open_boards(trainer.folder, None, config)
        values = validation.results(trainer.model, config, folder, annotations)
        for board in boards:
            if problem := board.show(step, values):
                print_line(f"WARNING: {problem}")
            board.close()
