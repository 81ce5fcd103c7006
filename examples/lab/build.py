"""Make the bundled lab model from nothing: python -m examples.lab.build

Trains the language model, then its transcoder, labels the features, measures everything, and writes it all to
tracer/lab/. An interrupted build goes on after its first round, if that is done.
"""

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.lab import measure
from examples.lab.card import card_markdown, gates
from examples.lab.decoders import DECODERS, finish_decoders
from examples.lab.joint import JointConfig, train_jointly
from examples.lab.language_model import LanguageModelConfig, accuracy, train_language_model
from examples.lab.swaps import residual_swap
from examples.lab.transcoder import FINISH, JOINT, finish_transcoder, inventory, new_transcoder
from examples.lab.vocabulary import build_tokenizer, known_words
from examples.lab.world import Question, World, questions, read_world
from tracer.replacement import ReplacementModel
from transcoders import load, save

FIRST_ROUND = "first round"
"""Folder of the language model between the two rounds of its training."""
SECONDS = "seconds.json"
"""In that folder: how long it took."""
OUTPUT = Path(__file__).parents[2] / "tracer" / "lab"


@click.command()
@click.option("--output", default=OUTPUT, type=click.Path(path_type=Path), help="Folder to write to.")
@click.option(
    "--measure-only", is_flag=True, help="Train nothing; name the features and write the card of what is there."
)
@click.option(
    "--first-steps",
    default=LanguageModelConfig.round.steps,
    show_default=True,
    help="If the first round is done and the build was ended after it, that one is used as it is.",
)
@click.option("--joint-steps", default=JointConfig.round.steps, show_default=True)
@click.option("--transcoder-steps", default=FINISH.steps, show_default=True)
@click.option("--decoders-only", is_flag=True, help="Do the last part only, with the transcoder that is there.")
def build(
    output: Path, measure_only: bool, first_steps: int, joint_steps: int, transcoder_steps: int, decoders_only: bool
) -> None:
    """Make the lab model, its transcoder and its card. Replaces what is there."""
    world = read_world()
    asked = questions(world)
    if not (measure_only or decoders_only):
        output.mkdir(parents=True, exist_ok=True)
        if not (output / FIRST_ROUND).is_dir():
            _train_first(world, asked, output, first_steps)
        _train_both(world, asked, output, joint_steps, transcoder_steps)
        shutil.rmtree(output / FIRST_ROUND)
    lab = measure.Lab(world, asked, *measure.load_model(str(output / "model")))
    if not measure_only:
        _finish_decoders(lab, output)
    pq.write_table(
        inventory(lab, load(output / "transcoder"), "lab-clt"), output / "features.parquet", compression="zstd"
    )
    card = make_card(lab, output) | {"build": _build_of(output), "measured": _circumstances()}
    _write(output / "card.json", card)
    (output / "card.md").write_text(card_markdown(card), encoding="utf-8")
    for gate in gates(card):
        print(f"{'met   ' if gate.met else 'MISSED'} {gate.name}: {gate.value:.4g} ({gate.bound})")


def _train_first(world: World, asked: list[Question], output: Path, steps: int) -> None:
    """The language model alone."""
    start = time.time()
    tokenizer = build_tokenizer(world, asked)
    shape = LanguageModelConfig(round=replace(LanguageModelConfig.round, steps=steps))
    model = train_language_model(asked, tokenizer, shape, log_progress(world, asked, tokenizer))
    unfinished = output / f"{FIRST_ROUND}.unfinished"
    _save_model(model, tokenizer, unfinished)
    _write(unfinished / SECONDS, {"first round": time.time() - start})
    unfinished.rename(output / FIRST_ROUND)


def _train_both(world: World, asked: list[Question], output: Path, joint_steps: int, transcoder_steps: int) -> None:
    """The model and its transcoder together, then the transcoder alone."""
    start = time.time()
    lab = measure.Lab(world, asked, *measure.load_model(str(output / FIRST_ROUND)))
    plan = JointConfig(round=replace(JointConfig.round, steps=joint_steps))
    transcoder = new_transcoder(lab)
    train_jointly(lab, transcoder, JOINT, plan, log_progress(world, asked, lab.tokenizer))
    _save_model(lab.model, lab.tokenizer, output / "model")
    together = time.time() - start
    lab = measure.Lab(world, asked, *measure.load_model(str(output / "model")))
    transcoder = finish_transcoder(lab, transcoder, replace(FINISH, steps=transcoder_steps))
    save(transcoder, output / "transcoder", dtype=torch.float16)
    (output / "words.txt").write_text("\n".join(known_words(world, asked)) + "\n", encoding="utf-8")
    seconds = json.loads((output / FIRST_ROUND / SECONDS).read_text(encoding="utf-8"))
    seconds |= {"both together": together, "transcoder alone": time.time() - start - together}
    _write(output / "card.json", {"build": _circumstances() | {"seconds": seconds}})


def _finish_decoders(lab: measure.Lab, output: Path) -> None:
    """The last part: some decoders once more."""
    start = time.time()
    transcoder = finish_decoders(lab, load(output / "transcoder").float(), DECODERS)
    save(transcoder, output / "transcoder.unfinished", dtype=torch.float16)
    shutil.rmtree(output / "transcoder")
    (output / "transcoder.unfinished").rename(output / "transcoder")
    build = _build_of(output)
    build["seconds"]["decoders"] = time.time() - start
    _write(output / "card.json", {"build": build})


def _circumstances() -> dict[str, str | int]:
    return {"date": date.today().isoformat(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _build_of(output: Path) -> dict:
    """How the files in the folder were made, which only the card knows."""
    return json.loads((output / "card.json").read_text(encoding="utf-8"))["build"]


def _write(file: Path, card: dict) -> None:
    file.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """In half precision: half the size, and measured as it ships."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def log_progress(
    world: World, questions: list[Question], tokenizer: PreTrainedTokenizerFast, every: int = 200
) -> Callable[[int, float, LlamaForCausalLM], None]:
    """A step callback that now and then prints the loss, accuracies, and where the model hops."""
    start = time.time()
    random = np.random.default_rng(1)
    watched = {
        "held out": ("two-hop state", "two-hop country", "addition", "three-hop", "indirect object"),
        "new city": ("two-hop state", "two-hop country"),
        "train": (
            "city then state",
            "city then country",
            "city of state",
            "city of country",
            "opposites french",
            "three-hop",
            "digits",
        ),
    }
    probes = {}
    for family, split in [(family, split) for split, families in watched.items() for family in families]:
        chosen = [q for q in questions if (q.family, q.split) == (family, split)]
        probes[f"{family} {split}"] = [chosen[i] for i in random.permutation(len(chosen))[:512]]

    def on_step(step: int, loss: float, model: LlamaForCausalLM) -> None:
        if step % every:
            return
        scores: dict[str, float | list[float]] = {
            name: round(accuracy(model, tokenizer, probe), 3) for name, probe in probes.items()
        }
        lab = measure.Lab(world, questions, model, tokenizer)
        for kind in ("state", "country"):
            pairs = measure.swap_pairs(lab, f"two-hop {kind}")
            scores[f"swap {kind}"] = [round(residual_swap(model, pairs, i), 2) for i in range(len(model.model.layers))]
        print(f"step {step}  {time.time() - start:.0f} s  loss {loss:.4f}  {scores}", flush=True)

    return on_step


def make_card(lab: measure.Lab, folder: Path) -> dict:
    """Every number on the card."""
    transcoder = load(folder / "transcoder")
    swaps = measure.measure_residual_swaps(lab)
    last_layer = last_layer_with_city(swaps["two-hop state"]["donor city"])
    places = measure.measure_place_features(lab, transcoder, last_layer)
    replacement = ReplacementModel.load(folder / "model", folder / "transcoder", name="lab")
    return {
        "model": {
            "parameters": sum(p.numel() for p in lab.model.parameters()), "vocabulary": len(lab.tokenizer),
            "layers": lab.model.config.num_hidden_layers, "d_model": lab.model.config.hidden_size,
            "accuracy": measure.measure_accuracy(lab), "residual_swap": swaps,
        },
        "transcoder": {
            "features_per_layer": transcoder.config.n_features,
            **measure.measure_transcoder(lab, transcoder), "dead": measure.measure_dead(lab, transcoder),
            "places": places,
        },
        "graphs": measure.measure_graphs(lab, replacement),
    }  # fmt: skip


def last_layer_with_city(swap_by_layer: list[float]) -> int:
    """The last layer after which the city's token still decides nearly every answer."""
    return max((layer for layer, share in enumerate(swap_by_layer) if share >= 0.9), default=0)


if __name__ == "__main__":
    build()
