"""Saves, damages and resumes a run in each of two processes: started by test_two_processes.py.

accelerate launch in_two_processes.py FOLDER
"""

import json
import sys
from pathlib import Path

import transformers
from accelerate import PartialState
from packaging.version import Version
from tiny_runs import arguments, tiny_trainer

from recipe.config import UserError
from recipe.training.output_dir import find_checkpoint


def found(folder: Path, checkpoint: str) -> str:
    try:
        return str(find_checkpoint(arguments(folder, resume_from_checkpoint=checkpoint)))
    except UserError as error:
        return str(error)


def main(folder: Path) -> None:
    state, run = PartialState(cpu=True), folder / "run"
    results = {"whole": found(folder / "new", "false")}
    trainer = tiny_trainer(run, save_total_limit=2)
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.save_model()  # as is usual: the others are not asked
    state.wait_for_everyone()
    results["whole"] = found(run, "true")
    if state.is_main_process:
        (run / "checkpoint-4" / "rng_state_1.pth").unlink()
    state.wait_for_everyone()
    results["without a random state"] = found(run, "true")
    results["named"] = found(run, str(run / "checkpoint-4"))
    trainer = tiny_trainer(run, save_total_limit=2)
    resumes = Version(transformers.__version__) >= Version("5.18")  # 5.17 loads the optimizer to "cpu:0"
    trainer.train(resume_from_checkpoint=results["without a random state"] if resumes else None)
    results["again"] = found(run, "true")
    (folder / f"results-{state.process_index}.json").write_text(json.dumps(results), encoding="utf-8")
    # together, and without DDP's reducer: one that leaves early may abort the other, as `shut_down` in scripts/train.py
    state.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
