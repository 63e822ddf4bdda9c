"""`ModelRunner`: one rank. It holds the weights, the KV pool, the slot tables and the sampler, and computes step plans.

It knows slots and tokens, not requests. A plan changes the tables first and computes after that; a step that raises leaves tables from which
its sequences can be set up and computed again. What concerns one slot only (ids outside the vocabulary, NaN logits) is reported in its SlotResult.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from lmdeploy.config import EngineConfig
from lmdeploy.engine.arrivals import Arrivals, Finish, Owed, after, nothing_more
from lmdeploy.engine.batch import MOST_PROMPTS, BatchBuilder, SlotTables, StepBatch, upload
from lmdeploy.engine.grammar_compiler import GrammarCompiler
from lmdeploy.engine.graphs import Ran, StepGraphs, device_turn
from lmdeploy.engine.guided import GuidedSlots, GuidedStep
from lmdeploy.engine.kv_cache import PLAIN_LAYOUT, KVCache, KVLayout
from lmdeploy.engine.late import Held, join_in_time, note_ends
from lmdeploy.engine.mask_pool import MaskPool
from lmdeploy.engine.memory import PoolShape, free_bytes, make_bill, trim
from lmdeploy.engine.model import Model
from lmdeploy.engine.pictures import PictureSlots
from lmdeploy.engine.plan import ENDED, LATE, Ints, Items, NewSequence, PlanItem, Rows, StepPlan, StepResult
from lmdeploy.engine.repeat import REPEATS, GuidedRows, Repeat
from lmdeploy.engine.sampler import Sampler, SamplingTable
from lmdeploy.engine.scores import all_logits, part_of, pooled, prompt_logprobs, rows_per_chunk, token_logprobs
from lmdeploy.engine.sizing import PoolRequest, bytes_per_token, size_pool
from lmdeploy.inputs import Scratch
from lmdeploy.kernels.row_buckets import buckets
from lmdeploy.log import get_logger
from lmdeploy.messages import SamplingParams, TokenLogprobs
from lmdeploy.models.vision import VisionEncoder

logger = get_logger(__name__)
Tensor = torch.Tensor

#: bytes kept for the graphs of smaller steps
GRAPH_ROOM = 256 << 20


class ModelRunner:
    """One rank. `config` is resolved; construction sizes and takes all memory, after running the largest step once."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        pool: PoolRequest,
        device: torch.device,
        dtype: torch.dtype,
        *,
        kv_layout: KVLayout = PLAIN_LAYOUT,
        pads_rows: bool = False,
        vision: VisionEncoder | None = None,
        grammars: GrammarCompiler | MaskPool | None = None,
        graphed: bool = False,
    ) -> None:
        assert config.max_batch_size is not None
        self.model, self.device, self.dtype = model, device, dtype
        self._turn = device_turn(device)
        self.max_batch_size, self.max_tokens = config.max_batch_size, config.max_prefill_token_num
        self.scratch = Scratch(self.max_tokens, dtype, device)
        self.pictures = PictureSlots(vision)
        self.kv_layout = kv_layout
        self.graphs: StepGraphs | None = None
        self.arrivals = Arrivals(self.max_batch_size + MOST_PROMPTS, device)
        self._owed: Owed | None = None  # of the step that was launched last
        self._held: Held | None = None  # of the step before, where the next one is being launched
        self._repeat: Repeat | None = None
        self.graphed = graphed
        spare, reserved, graphs = int(self.graphed), 0, 0  # a slot and a block more than are used
        self.chunk = rows_per_chunk(model.spec.vocab_size)
        self.guided = GuidedSlots.of(grammars, config.max_batch_size, device) if grammars is not None else None
        with torch.inference_mode():
            self.kv = KVCache(model.spec, 1, pool.block_size, dtype, device, kv_layout)
            self._make_tables(min(pool.session_len, self.max_tokens + 1), spare)  # the largest step needs no longer sequence
            start = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            skipped = self._start_shallow() if device.type == "cpu" else 1.0
            self._run_largest_step()
            if device.type == "cuda":  # what a step takes for itself and gives back
                reserved = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
            if vision is not None:
                vision.warm_up()
            self.step_seconds = skipped * (time.perf_counter() - start)
            if self.graphed:
                graphs = self._graph_bytes()
            if pads_rows:
                self._run_buckets()
            self.model = model
            self.kv.free()
            trim()
            token_bytes = bytes_per_token(model.spec, dtype, kv_layout.format)
            size = size_pool(pool, token_bytes, free_bytes(device) - reserved - graphs)
            self.session_len, self.note = size.session_len, size.note
            self.kv = KVCache(model.spec, size.num_blocks + spare, pool.block_size, dtype, device, kv_layout)
            self._make_tables(min(size.session_len, size.num_blocks * pool.block_size), spare)  # no sequence outgrows the pool
            self.sampler.reserve(self.max_batch_size)
            if self.graphed:
                self.tables.blocks[-1] = size.num_blocks  # where rows that only fill up a graph write
        self.renew_graphs()
        trim()
        workspace = self.scratch.nbytes + self.sampler.scratch.nbytes + self.tables.nbytes + self.sampling.nbytes
        shape = PoolShape(size.num_blocks, pool.block_size, token_bytes, bytes_per_token(model.spec, torch.bfloat16), kv_layout.format.name)
        self.memory = make_bill(
            device, (model.weight_bytes + (vision.weight_bytes if vision else 0), self.kv.nbytes, workspace), shape, size.session_len, size.note, graphs
        )

    def _make_tables(self, session_len: int, spare: int) -> None:
        spec = self.model.spec
        depends = spec.rope.depends_on_length
        self.tables = SlotTables(self.max_batch_size + spare, session_len, self.kv.block_size, self.device, keeps_rope_lengths=depends)
        self.sampling = SamplingTable(self.max_batch_size, spec.vocab_size, self.device)
        self.sampler = Sampler(self.sampling, self.tables.tokens)
        self.batches = BatchBuilder(self.tables, self.kv.layers, self.scratch, uses_rope_lengths=depends)
        self._wants: list[SamplingParams | None] = [None] * self.max_batch_size  # of slots that want more than tokens
        self._wanting = np.zeros(self.max_batch_size, dtype=bool)  # which these are
        self._broken: dict[int, str] = {}

    def drop_cache(self) -> None:
        """Give back the KV pool."""
        self.kv.free()
        self.batches.kv = []
        trim()

    def renew_graphs(self, *, awake: bool = True) -> None:
        """Forget all captured steps: weights or cache are, or may be, elsewhere. New ones are captured when they are needed, once both are there (`awake`)."""
        self._repeat = None
        if self.graphs is not None:
            self.graphs.drop()
        self.graphs = self._make_graphs() if self.graphed and awake else None

    def prepare_ahead(self) -> bool:
        """Capture a graph that no step has needed yet, or compute what comes without one; True while there are more."""
        if self.graphs is None:
            return False
        self._repeat = None
        with self._turn:
            return self.graphs.prepare_next()

    def set_layout(self, layout: KVLayout) -> None:
        """Other key centres, in an empty pool."""
        self.kv_layout = layout
        self.kv.center(layout.key_centers)

    @torch.inference_mode()
    def make_cache(self) -> None:
        """A pool of the same size, empty. Raises ConfigError when the memory is not there."""
        self.kv = KVCache(self.model.spec, self.kv.num_blocks, self.kv.block_size, self.dtype, self.device, self.kv_layout)
        self.batches.kv = self.kv.layers

    def close(self) -> None:
        """Drop weights, pool and buffers."""
        self._owed = None
        if self.guided is not None:
            self.guided.close()
        if self.graphs is not None:
            self.graphs.drop()
        del self.model, self.graphs, self.pictures, self.kv, self.tables, self.sampler, self.sampling, self.batches, self.scratch
        trim()

    # -- a step ------------------------------------------------------------------------------------------------------

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan; results in the order of its items."""
        return self.launch(plan)()

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin to compute a plan; the returned function waits for its results, which come in the order of the items. Call it once, before the one after next."""
        if self._repeat is not None and self._repeat.is_before(plan):
            return self._launch_again(plan)
        result = StepResult.of(plan)
        return partial(after, self._launch(plan, result), result)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan, result: StepResult) -> Finish | None:
        self._repeat = self._held = None
        if plan.released or plan.new:
            self._settle(plan)  # what it writes must not reach those who come after
        for slot in plan.released:
            self._wants[slot], self._wanting[slot] = None, False
            self.pictures.drop(slot)
            self._broken.pop(slot, None)
            if self.guided is not None:
                self.guided.release(slot)
        for new in plan.new:
            self._set_up(new)
        items, rows = plan.items, result.rows()
        if self._broken:
            items, rows = self._sound(items, rows)
        if not len(items):
            return None
        with self._turn:
            self.tables.append_blocks(items.new_blocks.items())
            return self._compute(plan, items, rows) or self.arrivals.end()

    def _launch_again(self, plan: StepPlan) -> Callable[[], StepResult]:
        """The step before once more, each of its sequences a token further: nothing else has changed that would have to be looked at."""
        repeat, self._repeat = self._repeat, None
        assert repeat is not None and self.graphs is not None
        if repeat.guided is not None:
            result = StepResult.of(plan)
            return partial(after, self._guide_again(plan, repeat, repeat.guided, result.rows()), result)
        with self._turn:
            self.graphs.again(plan.items.new_blocks)
            line = self.arrivals.follow()
        self._repeat = Repeat.of(repeat.count, repeat.left - 1)
        return partial(self._arrived, plan.step, line, repeat.count)

    @torch.inference_mode()
    def _guide_again(self, plan: StepPlan, repeat: Repeat, rows: GuidedRows, results: Rows) -> Finish:
        """The same with grammars. What the step computes does not depend on whether tokens of the one before are late, only which are chosen."""
        assert self.graphs is not None and self.guided is not None
        self._held = None
        with self._turn:
            self._settle(plan)
            self.graphs.again(plan.items.new_blocks)
            line = self.arrivals.follow()
            known = rows.lengths + 1 if self._held is None else self._held.lengths(rows.lengths + 1, rows.slots)
            self._repeat = Repeat.of(repeat.count, repeat.left - 1, GuidedRows(rows.slots, known, rows.order), self._held, self.graphs.stay)
            mask = self.guided.masks(rows.slots, self.sampling.young(rows.slots, known))
            assert mask is not None
            return self._owe(self.graphs.logits[: repeat.count], rows.slots, known, results.take(rows.order), mask, line, rows.order)

    def _arrived(self, step: int, line: int, count: int) -> StepResult:
        return StepResult(step, self.arrivals.wait(line, count))

    def _sound(self, items: Items, rows: Rows) -> tuple[Items, Rows]:
        """Without the items whose slots could not be set up, which have an error instead."""
        errors = [self._broken.get(slot) for slot in items.slots.tolist()]
        for row, error in enumerate(errors):
            if error is not None:
                rows[row].error = error
        sound = np.flatnonzero([error is None for error in errors])
        return items.take(sound), rows.take(sound)

    def _set_up(self, new: NewSequence) -> None:
        slot, params, vocab = new.slot, new.sampling, self.model.spec.vocab_size
        self._broken.pop(slot, None)
        try:
            ids = np.fromiter(new.token_ids, dtype=np.int64, count=len(new.token_ids))  # looked at as an array: a prompt's first token waits for this
            if not 0 <= ids.min() <= ids.max() < vocab:
                raise ValueError(f"the prompt has token ids outside the vocabulary 0..{vocab - 1}")
            self.tables.set(new, ids)
            self.sampling.set(slot, params, new.prompt_len)
            self.pictures.set(slot, new.pictures, new.prompt_len)
            if self.guided is not None:
                self.guided.set(slot, params, new.token_ids[new.prompt_len :])
            elif params.grammar is not None:
                raise ValueError("this engine cannot follow a grammar")
        except ValueError as error:
            self._broken[slot] = str(error)
        more = params.prompt_logprobs is not None or params.output_logits or params.output_last_hidden_state or params.embed
        self._wants[slot], self._wanting[slot] = params if more else None, bool(more)

    def _compute(self, plan: StepPlan, items: Items, results: Rows) -> Finish | None:
        wants_more = bool(self._wanting[items.slots].any())
        all_rows = [self._wants_all(item, self._wants[item.slot]) for item in items] if wants_more else None
        batch = self.batches.build(items, all_rows)
        layout, ordered = batch.layout, results.take(batch.order)
        sampled = ordered.take(layout.chosen)
        graphed = self.graphs is not None and not wants_more and not self.pictures.shown_by(items)
        slots = batch.slots
        guided = self.guided is not None and self.guided.follows(slots)
        ran = self.graphs.run(layout, partial(self._settle, plan), leave=guided) if self.graphs is not None and graphed else None
        hidden = None
        if ran is None:
            self._settle(plan)
            hidden = self._forward(batch)
        lengths = batch.lengths if self._held is None else self._held.lengths(batch.lengths, slots)
        mask = self.guided.masks(slots, self.sampling.young(slots, lengths)) if self.guided is not None and self.guided.used else None
        if hidden is not None and wants_more:
            self._add_rows(batch, hidden, ordered)
            self._want_less(items)
        if not len(sampled):
            return None
        if ran is not None:
            return self._take(ran, batch.layout.arrive, slots, lengths, sampled, mask)
        assert hidden is not None
        rows = hidden if batch.sample_rows is None else hidden.index_select(0, upload(batch.sample_rows, self.device))
        logits = torch.empty((rows.shape[0], self.model.spec.vocab_size), dtype=self.dtype, device=self.device)
        self.model.raw_logits(rows, logits)
        return self._sample(logits, slots, lengths, sampled, mask)

    def _forward(self, batch: StepBatch) -> Tensor:
        inputs = self.batches.inputs(batch.layout)
        self.pictures.fill(inputs, batch.items)
        return self.model.forward(inputs)

    def _take(self, ran: Ran, arrive: Ints, slots: Ints, lengths: Ints, results: Rows, mask: GuidedStep | None) -> Finish | None:
        """What a graph brought: its tokens hold where no logits are to be edited otherwise, masked or handed on."""
        assert self.graphs is not None
        line = ran.line
        if not self.sampling.apart[slots].any() and (mask is None or isinstance(ran.places, slice)):
            count = len(results)
            self.arrivals.mark(line)
            # each token of the plan comes, in its order, and the next step's go to the next line
            whole = isinstance(ran.places, slice) and count == len(results.result.tokens) and np.array_equal(arrive, results.places)
            if whole and line == self.arrivals.last:
                guided = None if mask is None else GuidedRows(slots, lengths, arrive)
                self._repeat = Repeat.of(count, REPEATS, guided, self._held, self.graphs.stay)
            if mask is not None:
                return self._owe(ran.logits[ran.places], slots, lengths, results, mask, line, arrive)
            return lambda: results.note_tokens(self.arrivals.wait(line, count)[arrive])
        logits = ran.logits[ran.places] if isinstance(ran.places, slice) else ran.logits.index_select(0, upload(ran.places, self.device))
        return self._sample(logits, slots, lengths, results, mask)

    def _sample(self, logits: Tensor, slots: Ints, lengths: Ints, results: Rows, mask: GuidedStep | None) -> Finish | None:
        """Choose the next token of rows of logits [S, V], which may be overwritten."""
        self._put_back(logits, slots)
        wanted = np.flatnonzero(self.sampling.logprobs[slots] >= 0)
        raw = torch.log_softmax(logits[upload(wanted, self.device)].float(), dim=-1) if wanted.size else None
        choose = self.sampler.begin(logits, slots, lengths, mask)
        bring = partial(self._bring, slots, wanted, raw, results, mask)
        if mask is None:
            return bring(choose())
        # the grammars do not know the tokens of the step before yet
        mask.busy = partial(self.arrivals.is_due, self.arrivals.follow())
        self._owed = Owed(partial(self._choose_owed, lambda: bring(choose()), True, logits, results, mask), self.device)
        return self._owed.finish

    def _owe(self, logits: Tensor, slots: Ints, lengths: Ints, results: Rows, mask: GuidedStep, line: int, arrive: Ints) -> Finish:
        """The same of logits that the last graph left, whose rows are chosen from as they are; tokens come on its line, where it has left those of other rows."""
        self._put_back(logits, slots)
        mask.busy, mask.paced = partial(self.arrivals.is_due, line), True
        assert self.graphs is not None and self.guided is not None
        choose = self.graphs.choice(slots, lengths, mask, line, arrive)
        told = partial(self._told, lambda: self.arrivals.wait(line, len(slots))[arrive], results, mask)
        launched, mark = partial(self.guided.launched, mask), partial(self.arrivals.mark, line)

        def launch() -> Finish:
            choose()
            launched()
            mark()
            return told

        self._owed = Owed(partial(self._choose_owed, launch, False, logits, results, mask), self.device)
        return self._owed.finish

    def _put_back(self, logits: Tensor, slots: Ints) -> None:
        """Logits that were kept for this step."""
        held, self._held = self._held, None
        if held is not None:
            held.put_back(logits, slots)

    def _bring(self, slots: Ints, wanted: Ints, raw: Tensor | None, results: Rows, mask: GuidedStep | None, tokens: Tensor) -> Finish:
        """Begin to bring chosen tokens to the host; `raw`: log-probabilities of the rows `wanted`, for which everything waits here."""
        finish = self._fetch(tokens, results, mask)
        if raw is None:
            return finish
        finish()
        self._add_logprobs(slots, wanted.tolist(), raw, tokens, results)
        return nothing_more

    def _settle(self, plan: StepPlan) -> None:
        """Launch what the step before still owes; `plan` is launched next."""
        owed, self._owed = self._owed, None
        if owed is not None:
            owed.settle(plan)

    def _choose_owed(self, choose: Callable[[], Finish], edits: bool, logits: Tensor, results: Rows, mask: GuidedStep, plan: StepPlan | None) -> Finish:
        """Choose the tokens of a step, but of rows whose masks are not there, if these can have their tokens from the next step, which is `plan`. `edits`: this
        may overwrite the logits; else what is kept of them need not be before the device has something to do."""
        if plan is None:
            return choose()
        plain = ~self._wanting[mask.slots]
        if results.result.more:
            plain &= ~np.isin(results.places[mask.rows], list(results.result.more))
        kept = join_in_time(mask, plan, plain)
        finish = None if edits else choose()
        self._held = Held.of(mask, kept, logits)
        return finish or choose()

    def _fetch(self, tokens: Tensor, results: Rows, mask: GuidedStep | None) -> Finish:
        """Begin to copy tokens to the host; the returned function waits for them and tells results and grammars."""
        return partial(self._told, self.arrivals.begin(tokens), results, mask)

    def _told(self, host: Callable[[], Ints], results: Rows, mask: GuidedStep | None) -> None:
        """Wait for tokens, and tell results and grammars."""
        if mask is not None and mask.paced and mask.busy is not None:
            mask.waited = mask.busy()
        arrived = host()
        if mask is not None and (mask.late.any() or mask.ended.any()):
            arrived = arrived.copy()  # not all come in memory of their own
            arrived[mask.rows[mask.late]], arrived[mask.rows[mask.ended]] = LATE, ENDED
        results.note_tokens(arrived)
        if mask is not None:
            assert self.guided is not None
            note_ends(mask, self.guided.follow(mask, arrived), results)

    def _add_logprobs(self, slots: Ints, wanted: list[int], raw: Tensor, tokens: Tensor, results: Rows) -> None:
        counts = self.sampling.logprobs[slots[wanted]].tolist()
        chosen = tokens[torch.tensor(wanted, device=self.device)].clamp_min(0)
        for row, logprobs in zip(wanted, token_logprobs(raw, chosen, counts), strict=True):
            if not results.failed(row):
                results[row].logprobs = logprobs

    # -- what some requests want beside tokens -----------------------------------------------------------------------

    def _prompt_targets(self, item: PlanItem) -> int:
        """How many of the item's rows predict a prompt token."""
        return max(0, min(item.num_tokens, int(self.sampling.prompt_len[item.slot]) - 1 - item.start))

    def _wants_all(self, item: PlanItem, want: SamplingParams | None) -> bool:
        if want is None:
            return False
        scores = want.prompt_logprobs is not None and self._prompt_targets(item) > 0
        pooled = want.embed == "mean" or (want.embed == "last" and item.start + item.num_tokens == self.sampling.prompt_len[item.slot])
        return scores or pooled or "all" in (want.output_logits, want.output_last_hidden_state)

    def _add_rows(self, batch: StepBatch, hidden: Tensor, results: Rows) -> None:
        for row in np.flatnonzero(self._wanting[batch.items.slots] & (batch.num_rows > 0)).tolist():
            item, result, first = batch.items[row], results[row], batch.first_row.item(row)
            want = self._wants[item.slot]
            assert want is not None
            rows = hidden[first : first + batch.num_rows.item(row)]
            if want.embed:
                result.embedding = pooled(rows, want.embed)
            if want.prompt_logprobs is not None and (targets := self._prompt_targets(item)):
                result.prompt_logprobs = self._score_prompt(item, rows[:targets], want.prompt_logprobs)
            if want.output_logits and (part := part_of(rows, want.output_logits, item)) is not None:
                result.logits = all_logits(self.model.logits, part, self.model.spec.vocab_size, self.chunk)
            if want.output_last_hidden_state and (part := part_of(rows, want.output_last_hidden_state, item)) is not None:
                result.last_hidden_state = part.detach().to("cpu", copy=True)

    def _want_less(self, items: Items) -> None:
        """A prompt that has been scored wants no more: the steps of its answer, and of all others, can be graphs again."""
        ends = items.starts + items.counts
        for row in np.flatnonzero(self._wanting[items.slots] & (ends >= self.sampling.prompt_len[items.slots])).tolist():
            slot = items.slots.item(row)
            want = self._wants[slot]
            if want is not None and not (want.output_logits or want.output_last_hidden_state or want.embed):
                self._wants[slot], self._wanting[slot] = None, False

    def _score_prompt(self, item: PlanItem, rows: Tensor, count: int) -> list[TokenLogprobs]:
        targets = self.tables.tokens[item.slot, item.start + 1 : item.start + 1 + rows.shape[0]].long()
        return prompt_logprobs(self.model.logits, rows, targets, count, self.chunk)

    def _make_graphs(self) -> StepGraphs:
        return StepGraphs(self.model, self.batches, self.sampler, self.arrivals.lines, self.arrivals.take_line, self.max_batch_size, self.dtype)

    def _graph_bytes(self) -> int:
        """What graphs take beside the cache: the memory of the largest one, which all share, and room for what each needs of the driver's."""
        trim()
        with self._turn:  # another engine of this process may be at work
            before = free_bytes(self.device)
            graphs = self._make_graphs()
            graphs.warm_up()
            taken = max(before - free_bytes(self.device), 0)
            graphs.drop()
        del graphs
        trim()
        return taken + GRAPH_ROOM

    # -- start-up ----------------------------------------------------------------------------------------------------

    def _start_shallow(self) -> float:
        """Leave out layers like those before them: they need no other buffers, and take nearly all of a start. How many times longer a whole step takes."""
        self.model, share = self.model.shallow()
        return 1 / share

    def _run_largest_step(self) -> None:
        """The largest chunk, the largest batch and the most rows that are scored, so that every buffer that a step needs is there before the pool is sized.

        Only shapes matter: one block stands for all, and what is computed is thrown away.
        """
        longest = self.tables.width - 1
        length = min(self.max_tokens, longest)
        count = max(1, min(self.max_batch_size, self.max_tokens // length))
        self._run_dummy([PlanItem(slot, 0, length, [], True) for slot in range(count)], SamplingParams(max_new_tokens=1))
        batch = [PlanItem(slot, min(1, longest - 1), 1, [], True) for slot in range(min(self.max_batch_size, self.max_tokens))]
        drawn = SamplingParams(max_new_tokens=2, temperature=1.0, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, logit_bias={0: 0.0})
        self._run_dummy(batch, drawn)
        rows = min(self.chunk, self.max_tokens)  # the scores of a prompt: libraries keep buffers for products of such a size
        self.model.logits(torch.zeros((rows, self.model.spec.hidden_size), dtype=self.dtype, device=self.device))
        self._synchronize()

    def _run_buckets(self) -> None:
        """One chunk for each number of rows that products will ever see, so that what torch keeps for each is in the bill."""
        longest = min(self.max_tokens, self.tables.width - 1)
        for rows in buckets(longest):
            self._run_dummy([PlanItem(0, 0, min(rows, longest), [], True)], SamplingParams(max_new_tokens=1))

    def _run_dummy(self, items: list[PlanItem], params: SamplingParams) -> None:
        for item in items:
            self.sampling.set(item.slot, params, 1)
        plan = StepPlan(0, [], [], Items.of(items))
        self._compute(plan, plan.items, StepResult.of(plan).rows())
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
