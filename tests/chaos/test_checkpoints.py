"""Damaged checkpoints are found, named and skipped; whole ones are written in every way of saving."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import arguments, contents, tiny_trainer
from transformers import TrainerCallback

from recipe import manifest
from recipe.config import UserError
from recipe.training.checkpoints import ASIDE, Seal
from recipe.training.output_dir import clear_output_dir, find_checkpoint
from recipe.training.resuming import find_problem


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with checkpoint-2 and checkpoint-4; the second has the files of two processes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = tiny_trainer(folder)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    last = folder / "checkpoint-4"
    shutil.copy(last / "rng_state.pth", last / "rng_state_1.pth")
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    seal_again(last)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def seal_again(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    Seal(folder).close({"step": 4, "world_size": 2})


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def damages(path: Path, other: Path):
    """Each way to damage a file: its name, and what does it."""
    content, draw = path.read_bytes(), random.Random(path.name)
    yield "removed", path.unlink
    yield "a folder", lambda: (path.unlink(), path.mkdir())
    yield "a link to nothing", lambda: (path.unlink(), path.symlink_to("nothing"))
    variants = {
        "emptied": b"", "cut in half": content[: len(content) // 2], "one byte short": content[:-1],
        "one byte long": content + b"\0", "zeros": bytes(len(content)), "reversed": content[::-1],
    }  # fmt: skip
    for place in {0, len(content) // 2, len(content) - 1, *(draw.randrange(len(content)) for _ in range(12))}:
        variants[f"bit flipped in byte {place}"] = flipped(content, place, draw.randrange(8))
    if other.is_file() and path.name != "manifest.json":
        variants["that of another checkpoint"] = other.read_bytes()
    for name, damaged in variants.items():
        if damaged != content:
            yield name, lambda damaged=damaged: path.write_bytes(damaged)


def test_each_damage_is_named_and_the_checkpoint_before_is_used(run, capsys):
    """Of every file, the manifest too, in every way, and of a large file that is hashed in parts."""
    last, whole, cases = run / "checkpoint-4", run / "checkpoint-2", 0
    for part in (manifest.PART, 500):
        manifest.PART = part
        seal_again(last)
        manifest.add_hashes(last, content := manifest.read_manifest(last))
        manifest.write_manifest(last, content)
        for name, pristine in contents(last).items():
            path = last / name
            for damage, do in damages(path, whole / name):
                do()
                assert find_checkpoint(arguments(run, resume_from_checkpoint="true")) == str(whole), (name, damage)
                line = capsys.readouterr().out.splitlines()[0]
                assert line.startswith(f"{last} is not resumed from: ") and name in line, (name, damage, line)
                if (name, damage) != ("manifest.json", "removed") and "link" not in damage:
                    with pytest.raises(UserError, match=f"{last} is damaged: .*{name}.*; resume from {whole}"):
                        find_checkpoint(arguments(run, resume_from_checkpoint=str(last)))
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                path.write_bytes(pristine)
                cases += 1
        assert find_checkpoint(arguments(run, resume_from_checkpoint="true")) == str(last)
        [said] = capsys.readouterr().out.splitlines()
        assert "checkpoint-4 was saved by 2 processes and is resumed by 1" in said
    assert cases >= 400


@pytest.fixture(autouse=True)
def same_part_size(monkeypatch):
    monkeypatch.setattr(manifest, "PART", manifest.PART)


def test_without_a_manifest_what_resuming_needs_must_be_there_and_open(run, capsys):
    """As the stock Trainer writes it: only a checksum of its own can tell that a file's content is another."""
    last, whole, found = run / "checkpoint-4", run / "checkpoint-2", {}
    (last / "manifest.json").unlink()
    for name, pristine in contents(last).items():
        path = last / name
        for damage, do in damages(path, whole / name):
            do()
            found[name, damage] = find_problem(last, processes=2)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(pristine)
    for (name, damage), problem in found.items():
        needed = name not in ("config.json", "generation_config.json")
        if damage in ("removed", "a folder", "emptied", "cut in half", "zeros") and needed:
            assert problem and (name in problem or "weights are missing" in problem), (name, damage)
    assert find_problem(last, processes=2) is None
    assert find_problem(last, processes=3) == "rng_state_2.pth is missing"


def test_a_checkpoint_without_a_manifest_is_taken_if_no_other_is_whole_or_if_it_is_named(run, capsys):
    last, whole = run / "checkpoint-4", run / "checkpoint-2"
    shutil.copytree(whole, last, dirs_exist_ok=True)
    (last / "manifest.json").unlink()
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        (last / name).unlink()
    assert find_checkpoint(arguments(run, resume_from_checkpoint="true")) == str(whole)
    assert capsys.readouterr().out == f"{last} is not resumed from: it has no manifest.json to check it by\n"
    assert find_checkpoint(arguments(run, resume_from_checkpoint=str(last))) == str(last)
    assert capsys.readouterr().out.startswith(f"{last} has no manifest.json: ")
    (whole / "manifest.json").write_text("{")
    assert find_checkpoint(arguments(run, resume_from_checkpoint="true")) == str(last)
    assert capsys.readouterr().out.startswith(f"{last} has no manifest.json: ")
    (last / "scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(checkpoint-2: manifest.json .*checkpoint-4"):
        find_checkpoint(arguments(run, resume_from_checkpoint="true"))


def test_other_names_break_nothing(run):
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-9-copy", "checkpoint-٣"):
        (run / name).mkdir()
    (run / "checkpoint-6").write_text("a file")
    assert find_checkpoint(arguments(run, resume_from_checkpoint="true")) == str(run / "checkpoint-4")
    trainer = tiny_trainer(run, max_steps=8, save_steps=1, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert {path.name for path in run.glob("checkpoint-*")} == {
        "checkpoint-best", "checkpoint-", "checkpoint-9-copy", "checkpoint-٣", "checkpoint-6.kept", "checkpoint-8",
    }  # fmt: skip
    clear_output_dir(arguments(run, overwrite_output_dir=True), None)
    assert (run / "checkpoint-best").is_dir() and not (run / "checkpoint-8").exists()


def test_a_best_checkpoint_that_is_damaged_is_not_loaded_at_the_end(tmp_path):
    options = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 3,
    }
    trainer = tiny_trainer(tmp_path, **options, learning_rate=0.5)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert best.parent == tmp_path and best.name != "checkpoint-3" and state["best_model_checkpoint"] == str(best)
    weights = best / "model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes(), weights.stat().st_size - 1, 0))
    with pytest.raises(UserError, match=f"checkpoint-3: its best checkpoint, {best.name}, is damaged"):
        find_checkpoint(arguments(tmp_path, resume_from_checkpoint="true", **options))
    found = find_checkpoint(arguments(tmp_path, resume_from_checkpoint="true"))
    assert found == str(tmp_path / "checkpoint-3")  # where the last weights are the result, the best do not matter


@pytest.mark.parametrize(
    ("options", "kept", "best"),
    [
        ({"save_total_limit": 1}, {"checkpoint-4"}, None),
        ({"save_total_limit": 2, "load_best_model_at_end": True}, {"checkpoint-1", "checkpoint-4"}, "checkpoint-1"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, {"checkpoint-1"}, "checkpoint-1"),
        ({"save_only_model": True, "save_total_limit": 1}, {"checkpoint-4"}, None),
        ({"save_on_each_node": True}, {f"checkpoint-{step}" for step in (1, 2, 3, 4)}, None),
    ],
)
def test_every_way_of_saving(options, kept, best, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seen.append((find_problem(folder, 1), (folder / "optimizer.pt").exists()))

    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.5} | options
    trainer = tiny_trainer(tmp_path / "run", **changes)
    trainer.add_callback(Look())
    trainer.about_run = {"data_hash": "sha256:0"}
    trainer.train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == kept
    assert set(seen) == {(None, "save_only_model" not in options)}
    assert trainer.state.best_model_checkpoint == (best and str(tmp_path / "run" / best)) or best is None
    for name in kept:
        files = contents(tmp_path / "run" / name)
        listed = json.loads(files.pop("manifest.json"))
        assert listed["files"] == {
            file: {"size": len(content), "sha256": [hashlib.sha256(content).hexdigest()]}
            for file, content in files.items()
        }
        assert listed["data_hash"] == "sha256:0" and f"checkpoint-{listed['step']}" == name
        assert "training_args.bin" not in files


def test_the_final_folder_is_finished_when_its_config_is_there(finished, tmp_path):
    files = contents(finished)
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files if "checkpoint-" not in name)
    listed = json.loads(files["manifest.json"])["files"]
    assert {"config.json", "model.safetensors"} <= set(listed)
    assert all(hashlib.sha256(files[name]).hexdigest() == entry["sha256"][0] for name, entry in listed.items())
    times = {name: (finished / name).stat().st_ctime_ns for name in (*listed, "manifest.json")}
    last, config = times.pop("manifest.json"), times.pop("config.json")
    assert max(times.values()) <= config <= last


def test_what_a_killed_run_left_is_swept_away_and_what_it_put_aside_comes_back(run, tmp_path):
    (run / ASIDE).mkdir()
    (run / "checkpoint-4").rename(run / ASIDE / "replaced-checkpoint-4")
    (run / ".run.json.0a1b2c3d.draft").write_text("{")
    assert find_checkpoint(arguments(run, resume_from_checkpoint="true")) == str(run / "checkpoint-4")
    (run / ASIDE / "checkpoint-6").mkdir()
    clear_output_dir(arguments(run, resume_from_checkpoint="true"), str(run / "checkpoint-4"))
    assert not list(run.glob(".*")) and not (run / ASIDE).exists()


def test_resumed_from_the_one_before_equals_never_stopped(run, tmp_path):
    weights = run / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes(), 700, 3))
    checkpoint = find_checkpoint(arguments(run, resume_from_checkpoint="true"))
    whole, resumed = tiny_trainer(tmp_path / "whole", max_steps=6), tiny_trainer(run, max_steps=6)
    whole.train()
    resumed.train(resume_from_checkpoint=checkpoint)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert find_problem(run / "checkpoint-4", 1) is None  # written again


def test_large_files_are_hashed_in_the_background_and_a_kill_before_that_is_told(run, capsys, monkeypatch):
    monkeypatch.setattr(manifest, "PART", 500)
    trainer = tiny_trainer(run.parent / "large")
    trainer.train()
    assert manifest.is_hashed(run.parent / "large" / "checkpoint-4")  # training waits for it at its end
    last = run / "checkpoint-4"
    seal_again(last)  # and no more
    assert not manifest.is_hashed(last)
    assert find_checkpoint(arguments(run, resume_from_checkpoint="true")) == str(last)
    assert "ended before its large files were hashed" in capsys.readouterr().out
    for name in ("optimizer.pt", "rng_state_1.pth"):
        content = (last / name).read_bytes()
        (last / name).write_bytes(flipped(content, len(content) // 2, 1))  # a zip file has checksums of its own
        assert name in find_problem(last, 2)
        (last / name).write_bytes(content)
