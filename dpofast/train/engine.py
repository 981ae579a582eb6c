"""The loop: steps, evaluations and checkpoints, in an order that only the options decide and no kill changes."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpofast.train import checkpoint, log, model, state
from dpofast.train.config import Config
from dpofast.train.feed import Feed
from dpofast.train.frozen import FileStore, FrozenLayers
from dpofast.train.objective import Scored, objective_of
from dpofast.train.ranks import Ranks
from dpofast.train.references import References
from dpofast.train.report import mean_and_error, share_and_error
from dpofast.train.stop import Stop


class Outcome(NamedTuple):
    """How a training ended: after which step, by patience or not, and by which signal, if one came."""

    step: int
    impatient: bool = False
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"stopped by a signal after step {self.step} and saved; go on with --resume"
        if self.impatient:
            return f"ended after step {self.step}: no evaluation was better for as long as patience says"
        return f"ended after step {self.step}"


class Context(NamedTuple):
    """What a training runs in: the processes, the screen, and the signals that ask it to stop."""

    ranks: Ranks
    screen: log.Screen
    stop: Stop


class Training:
    """One training, on this rank: what is trained, on what, how far it is."""

    def __init__(self, config: Config, context: Context, identity: Mapping[str, Any]) -> None:
        self.config, self.identity = config, identity
        self.ranks, self.screen, self.stop = context
        self.out, self.root = Path(config.out), Path(config.out) / "checkpoints"
        self.objective = objective_of(config)
        self.feed = Feed(config, self.ranks, self.objective)
        self.total = steps_of(config, self.feed.records)
        self.position = state.Position()
        self.log: log.JsonLog | None = None
        self.board: Any = None
        self.resumed = self._find_checkpoint()
        self.saved = self.position.step if self.resumed else -1
        state.seed(config.seed)
        self.bare = model.trained(config, self.resumed)
        self.called = model.wrapped(self.bare, config, self.ranks)
        if config.cache_frozen:
            self.frozen = self._frozen_states()
            self._cache_frozen(self.bare)
        self.parameters = model.trained_parameters(self.bare)
        self._make_optimizer()
        self.references = self._references() if self.objective.needs_reference else None
        if self.resumed:
            self._load(state.load(self.resumed))
        else:  # again: whether a reference was loaded meanwhile must not tell; and each rank has its own dropout
            state.seed(config.seed + self.ranks.rank)

    # Where it begins

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; its position and identity are taken over, or refused."""
        present = checkpoint.steps(self.root)
        if not self.config.resume:
            if present:
                raise ValueError(f"out: {self.out} has a run of {present[0]} steps; pass --resume or another out")
            return None
        found, notes = self.ranks.of_first(lambda: state.newest(self.root))
        for note in notes:
            self.screen.say(note)
        if found is None:
            return None
        kept = state.load(found)
        changed = self.config.differences(kept["config"])
        changed += [
            f"{name} has changed" for name, value in self.identity.items() if kept["identity"].get(name) != value
        ]
        if changed:
            raise ValueError(f"resume: the run in {self.out} began otherwise ({'; '.join(changed)}); put that back, or "
                             "begin another out")  # fmt: skip
        self.position = state.position_of(kept)
        if self.ranks.first:
            self._point(found)
        self.screen.say(f"going on after step {self.position.step}, from {found}")
        return found

    def _make_optimizer(self) -> None:
        from transformers import get_scheduler

        c = self.config
        betas = (c.adam_betas[0], c.adam_betas[1])
        self.optimizer = torch.optim.AdamW(self.parameters, c.learning_rate, betas, weight_decay=c.weight_decay)
        warmup = math.ceil(c.warmup * self.total)
        self.scheduler = get_scheduler(c.schedule, self.optimizer, warmup, self.total)

    def _load(self, kept: Mapping[str, Any]) -> None:
        model.load_optimizer(self.called, self.optimizer, kept["optimizer"])
        self.scheduler.load_state_dict(kept["scheduler"])
        self.feed.load_state_dict(kept["feed"])
        self.objective.load_state_dict(kept.get("objective", {}))
        state.set_random_numbers(kept["random"][self.ranks.rank])

    # What the loss compares with

    def _references(self) -> References:
        """The reference's log-probs of all data, those that are not on the disk computed now."""
        path = Path(self.config.references or self.out / "references.bin")
        names = ("reference", "data", "encoding", "precision")
        identity = {name: self.identity[name] for name in names}
        self.ranks.of_first(lambda: len(References(path, identity)))  # made or refused before another rank reads it
        kept = References(path, identity, writes=self.ranks.first)
        if self.resumed is None or len(kept) == 0:
            self._score_reference(kept)
        return kept

    def _frozen_states(self) -> FileStore:
        """What frozen layers make of each row; of this rank's rows."""
        of = {"model": self.identity["model"], "last_layers": self.config.last_layers}
        of["cache_frozen"] = self.config.cache_frozen
        return FileStore(self.out / f"frozen-{self.ranks.rank}.states", of)

    def _cache_frozen(self, policy: torch.nn.Module) -> None:
        with self._autocast():
            FrozenLayers(policy, self.config.last_layers, self.config.cache_frozen, self.frozen)

    @torch.no_grad()
    def _score_reference(self, kept: References) -> None:
        reference, done = None, 0
        self.screen.begin("reference", 0, self.feed.all_batches)
        for batches in _in_groups(self.feed.everything(), self.ranks.world):
            keys = [batch.keys for batch in batches]
            if not all(map(kept.has, keys)):
                if reference is None:
                    folder = self.config.reference or self.config.model
                    reference = model.load(folder, self.config, "reference").to(self.ranks.device)
                    if self.config.cache_frozen and not self.config.reference:  # the same layers
                        self._cache_frozen(reference)
                mine = [] if self.ranks.rank >= len(batches) else self._reference_logps(reference, batches)
                for each, logps in zip(keys, self.ranks.gathered(mine)):
                    kept.add(each, logps)
            done += len(batches)
            self.screen.advance(done)
            if self.ranks.any(bool(self.stop)):
                break
        kept.sync()
        self.screen.end()

    def _reference_logps(self, reference: torch.nn.Module, batches: Sequence[Any]) -> list[float]:
        batch = batches[self.ranks.rank].to(self.ranks.device)
        with self._autocast():
            return self.objective.logps(reference, batch).tolist()

    def ref_logps(self, batch: Any) -> Tensor | None:
        """The reference's log-probs of the answers in a batch, where the loss needs them."""
        return None if self.references is None else self.references.of(batch.keys, self.ranks.device)

    # The loop

    def run(self) -> Outcome:
        """Train to the end, or until a signal; the last state is in a checkpoint then."""
        if self.ranks.first:
            self.log = log.JsonLog(self.out / "log.jsonl", self.position.log_bytes)
        if self.ranks.first and self.config.tensorboard:
            self.board = log.tensorboard(self.out / "tensorboard", self.position.step)
        self.screen.begin("training", self.position.step, self.total)
        try:
            return self._run()
        finally:
            self.screen.end()
            for each in (self.log, self.board):
                if each is not None:
                    each.close()

    def _run(self) -> Outcome:
        while True:
            stopped = self.ranks.any(bool(self.stop))
            better = not stopped and self._is_due(self.config.evaluate_every) and self._evaluate()
            stopped = stopped or self.ranks.any(bool(self.stop))
            impatient = 0 < self.config.patience <= self.position.worse
            ended = self.position.step >= self.total or impatient
            due = stopped or ended or self._is_due(self.config.save_every)
            if self.saved != self.position.step and (better or (due and self.position.step > 0)):
                self._save()
            if stopped:
                return Outcome(self.position.step, signal=self.stop.signal or signal.SIGTERM)
            if ended:
                return Outcome(self.position.step, impatient)
            self.step()

    def _is_due(self, every: int) -> bool:
        step = self.position.step
        return step in (0, self.total) or (every > 0 and step % every == 0)

    def step(self) -> dict[str, float]:
        """Take a step; returns what is known of it, means over its records."""
        began, c = time.perf_counter(), self.config
        batches = [batch.to(self.ranks.device) for batch in self.feed.step()]
        scored, tokens = [], 0
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else model.without_exchange(self.called):
                with self._autocast():
                    scored.append(self.objective.score(self.called, batch, self.ref_logps(batch)))
                # a rank's gradient is averaged with those of the others
                (scored[-1].loss * (batch.records * self.ranks.world / c.batch_size)).backward()
            tokens += batch.tokens
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, c.clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        entry, tokens = self._metrics(scored, [batch.records for batch in batches], tokens)
        if not math.isfinite(entry["loss"]) or not norm.isfinite():
            raise FloatingPointError(
                f"loss {entry['loss']} and gradient norm {norm.item()} in step {self.position.step + 1}; what was "
                "saved before it is whole. A smaller learning_rate or a clip may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.advance(scored, self.ranks)
        entry |= {"learning_rate": self.scheduler.get_last_lr()[0], "grad_norm": norm.item()}
        self.scheduler.step()
        self._advance(entry, tokens, time.perf_counter() - began)
        return entry

    def _metrics(self, scored: Sequence[Scored], sizes: Sequence[int], tokens: int) -> tuple[dict[str, float], int]:
        """Means over the records of the step on all ranks that have a number, and its tokens."""
        names = list(scored[0].values)
        columns = [torch.cat([each.values[name].double() for each in scored]).cpu() for name in names]
        loss = sum(each.loss.item() * size for each, size in zip(scored, sizes))
        sums = [loss, *(column.nansum().item() for column in columns), float(tokens)]
        counts = [float(sum(sizes)), *(float((~column.isnan()).sum()) for column in columns)]
        total = self.ranks.sum(torch.tensor([*sums, *counts], dtype=torch.float64)).tolist()
        means = {name: x / n for name, x, n in zip(("loss", *names), total, total[len(sums) :]) if n}
        return means, int(total[len(names) + 1])

    def _advance(self, entry: dict[str, float], tokens: int, seconds: float) -> None:
        p = self.position
        p.step, p.tokens, p.seconds = p.step + 1, p.tokens + tokens, p.seconds + seconds
        self._write({"step": p.step, **entry, "tokens": p.tokens, "seconds": seconds, "tokens/s": tokens / seconds})
        note = f"loss {entry['loss']:.4f}"
        if "rewards/margins" in entry:
            note += f"  margin {entry['rewards/margins']:+.3f}"
        if "rewards/accuracies" in entry:
            note += f"  accuracy {entry['rewards/accuracies']:.0%}"
        self.screen.advance(p.step, f"{note}  lr {entry['learning_rate']:.1e}  {tokens / seconds:,.0f} tokens/s")

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(entry)
        if self.board is not None:
            for name, value in entry.items():
                self.board.add_scalar(name, value, entry["step"])

    # Held-out data

    def _evaluate(self) -> bool:
        """Evaluate, unless that is done already or a signal comes; returns whether it is the best so far."""
        if not self.config.eval_data or self.position.evaluated >= self.position.step:
            return False
        began = time.perf_counter()
        values = self._held_out()
        if values is None:
            return False
        entry: dict[str, Any] = {"step": self.position.step, "eval/records": len(values["loss"])}
        for name, found in values.items():
            if not found:
                continue
            measure = share_and_error if name.endswith("accuracies") else mean_and_error
            entry[f"eval/{name}"], entry[f"eval/{name}/error"] = measure(found)
        self._write(entry | {"eval/seconds": time.perf_counter() - began})
        self.screen.say(f"step {self.position.step}: held-out loss {entry['eval/loss']:.4f}" + _accuracy(entry))
        by_loss = self.config.best_by == "loss"
        return self.position.judge(entry["eval/loss"] if by_loss else -entry["eval/rewards/accuracies"])

    @torch.no_grad()
    def _held_out(self) -> dict[str, list[float]] | None:
        """Numbers of each held-out record, in their order; None if a signal came."""
        found: dict[str, list[float]] = {}
        self.bare.eval()
        try:
            for batches in _in_groups(self.feed.held_out(), self.ranks.world):
                # a rank without a batch takes the last one's: where weights are sharded, all have to run
                batch = batches[min(self.ranks.rank, len(batches) - 1)].to(self.ranks.device)
                with self._autocast():
                    scored = self.objective.score(self.bare, batch, self.ref_logps(batch), reduction="none")
                mine = {name: x.tolist() for name, x in {"loss": scored.loss, **scored.values}.items()}
                for part in self.ranks.gathered(mine)[: len(batches)]:
                    for name, values in part.items():
                        found.setdefault(name, []).extend(x for x in values if not math.isnan(x))
                if self.ranks.any(bool(self.stop)):
                    return None
            return found
        finally:
            self.bare.train()

    # Checkpoints

    def _save(self) -> None:
        random = self.ranks.gathered(state.random_numbers())
        whole = model.whole_state(self.called, self.optimizer)
        self.ranks.of_first(lambda: self._write_checkpoint(random, *whole))
        self.saved = self.position.step

    def _write_checkpoint(self, random: list[Any], weights: dict[str, Any] | None, optimizer: dict[str, Any]) -> None:
        self.position.log_bytes = self.log.sync()
        kept = {
            "config": self.config.as_dict(), "identity": dict(self.identity), "position": state.as_dict(self.position),
            "optimizer": optimizer, "scheduler": self.scheduler.state_dict(),
            "feed": self.feed.state_dict(), "objective": self.objective.state_dict(), "random": random,
        }  # fmt: skip

        def fill(folder: Path) -> None:
            model.save(self.bare, weights, self.feed.tokenizer, folder)
            state.save(kept, folder)

        step = self.position.step
        target = checkpoint.write(self.root, step, fill, self._expected_bytes())
        keep = set(checkpoint.steps(self.root)[: self.config.keep]) | {self.position.best_step}
        self._point(target)
        checkpoint.remove_but(self.root, {step for step in keep if step is not None})

    def _point(self, last: Path) -> None:
        """Let the links in ``out`` lead to the last checkpoint and to the best."""
        state.point(self.out / "last", last)
        if self.position.best_step is not None:
            state.point(self.out / "best", checkpoint.folder_of(self.root, self.position.best_step))

    def _expected_bytes(self) -> int:
        """What a checkpoint takes: the last one's size, or what is trained and AdamW's two numbers for each."""
        present = checkpoint.steps(self.root)
        if present:
            return checkpoint.bytes_of(checkpoint.folder_of(self.root, present[0]))
        saved = self.parameters if self.config.lora_rank else self.bare.parameters()
        return sum(p.numel() * p.element_size() for p in saved) + 8 * sum(p.numel() for p in self.parameters)

    def _autocast(self):
        on = self.config.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=on)


def steps_of(config: Config, records: int) -> int:
    """How many steps a training on so many records takes."""
    return config.steps or max(1, round(config.epochs * records / config.batch_size))


def _in_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """``size`` items at a time; the last may be fewer."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def _accuracy(entry: Mapping[str, Any]) -> str:
    name = "eval/rewards/accuracies"
    return f", accuracy {entry[name]:.1%} ± {entry[name + '/error']:.1%}" if name in entry else ""
