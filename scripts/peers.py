"""What scripts/compare-peers runs in Python: the peers' side of each measurement, and the table of all.

    peers.py prepare SHAPE FOLDER --examples N [--data FILE] [--random N]
                                                      the preset and the texts that all of them get
    peers.py check PACKAGE..                          whether they can be imported, and why not
    peers.py update FOLDER --dtype D [--sorted]       one LoRA update with PEFT
    peers.py transformers FOLDER --dtype D --streams N
    peers.py llama FOLDER --type T --streams N        llama.cpp, through llama-cpp-python
    peers.py table FOLDER [--json FILE]               medians, and medians of the ratios of each round

Each measurement prints its figures as one line of JSON. Weights are random, and the same for nobody: only speed counts.
"""
import argparse, importlib, itertools, json, pathlib, random, resource, statistics, sys, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRESETS = ROOT / "configs/models"
# The shape that nano is like, but for its vocabulary and depth: 8.4 million weights.
SMALL = {"num_hidden_layers": 8, "num_key_value_heads": 2, "intermediate_size": 768, "vocab_size": 8192}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
SYLLABLES = ["ba", "ko", "ri", "mul", "te", "sa", "no", "vi", "len", "da", "fu", "gor", "pe", "hi", "zu", "wam"]
END = "<|endoftext|>"
# A text of a file is cut after so many characters, some 250 tokens, so that all learn the same of it.
LONGEST = 1000


# What all of them get ------------------------------------------------------------------------------------------------

def prepare(a):
    """Writes the shape as a preset of Engram, and texts whose lengths differ as those of real ones do."""
    file = PRESETS / f"{'nano' if a.shape == 'small' else a.shape}.toml"
    if not file.is_file():
        shapes = sorted(preset.stem for preset in PRESETS.glob("*.toml"))
        sys.exit(f"peers: there is no shape {a.shape}; there are small, {', '.join(shapes)}")
    different = SMALL if a.shape == "small" else {}
    lines = []
    for line in file.read_text().splitlines():
        key = line.split(" = ")[0]
        lines.append(f"{key} = {different[key]}" if key in different else line)
    (a.folder / "shape.toml").write_text("\n".join(lines) + "\n")
    if not a.random:
        texts = from_file(a.data, a.examples) if a.data else made_up(a.examples)
        (a.folder / "texts.txt").write_text("".join(f"{text}\n{END}\n" for text in texts))


def made_up(examples):
    """Texts of made-up words."""
    source = random.Random(1)
    word = lambda: "".join(source.choice(SYLLABLES) for _ in range(source.randint(1, 3)))
    text = lambda: " ".join(word() for _ in range(min(40, max(3, round(source.lognormvariate(2.5, 0.7))))))
    return [text() for _ in range(examples)]


def from_file(file, examples):
    """Texts of a file, evenly from its beginning to its end: lines of {"text"}, or documents that end in END."""
    try:
        content = pathlib.Path(file).read_text()
        if file.endswith(".jsonl"):
            texts = [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
        else:
            texts = content.split(END)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"peers: {file} is no text, nor lines of {{\"text\"}} in a .jsonl: {error!r}")
    texts = [text for text in (text.strip()[:LONGEST].strip() for text in texts) if text]
    if len(texts) < examples:
        sys.exit(f"peers: {file} has {len(texts)} texts, and {examples} are wanted (--examples)")
    return [texts[i * len(texts) // examples] for i in range(examples)]


def shape(folder):
    """The preset's table [model], whose values are numbers, words and truth values."""
    found, inside = {}, False
    for line in (folder / "shape.toml").read_text().splitlines():
        if line.startswith("["):
            inside = line == "[model]"
        elif inside and " = " in line:
            key, value = line.split(" = ", 1)
            found[key] = json.loads(value)
    return found


def check(a):
    for name in a.packages:
        try:
            importlib.import_module(name)
        except Exception as error:
            sys.exit(f"{name}: {error}")


def tell(**figures):
    print(json.dumps(figures))


# PEFT and transformers -----------------------------------------------------------------------------------------------

def model(a):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    config = {key: value for key, value in shape(a.folder).items() if key not in ("model_type", "rope_theta")}
    # No answer ends before it is as long as it may be.
    config = LlamaConfig(**{**config, "eos_token_id": None, "pad_token_id": 0})
    return LlamaForCausalLM(config).to(getattr(torch, a.dtype))


def batches(a):
    """Steps of examples as PEFT takes them: padded to the longest, and what is padded neither seen nor learned."""
    import torch
    from tokenizers import Tokenizer

    if a.random:
        source, vocabulary = random.Random(1), shape(a.folder)["vocab_size"]
        ids = [[source.randrange(vocabulary) for _ in range(a.random)] for _ in range(a.examples)]
    else:
        tokenizer = Tokenizer.from_file(str(PRESETS / "nano/tokenizer.json"))
        texts = [text.strip() for text in (a.folder / "texts.txt").read_text().split(END)]
        ids = [tokenizer.encode(text).ids + [tokenizer.token_to_id(END)] for text in texts if text]
    if a.sorted:
        ids.sort(key=len)
    for start in range(0, len(ids), a.batch):
        rows = ids[start : start + a.batch]
        longest = max(map(len, rows))
        fill = lambda row, value: row + [value] * (longest - len(row))
        yield {
            "input_ids": torch.tensor([fill(row, 0) for row in rows]),
            "attention_mask": torch.tensor([fill([1] * len(row), 0) for row in rows]),
            "labels": torch.tensor([fill(row, -100) for row in rows]),
        }


def update(a):
    import torch
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    learner = get_peft_model(model(a), lora)
    learner.train()
    weights = [weight for weight in learner.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-4)
    steps = list(batches(a))

    def step(batch):
        learner(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    step(steps[0])
    started = time.perf_counter()
    for batch in steps:
        step(batch)
    seconds = time.perf_counter() - started
    tokens = sum(int(batch["attention_mask"].sum()) for batch in steps)
    padded = sum(batch["input_ids"].numel() for batch in steps)
    # In KiB, but for a Mac, which counts bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    tell(tokens_per_s=tokens / seconds, tokens=tokens, padded_tokens=padded,
         peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def transformers(a):
    import torch

    answerer = model(a).eval()
    vocabulary = answerer.config.vocab_size

    def seconds(tokens):
        """Of a new prompt and so many tokens for each stream."""
        prompts = torch.randint(0, vocabulary, (a.streams, a.prompt))
        started = time.perf_counter()
        with torch.inference_mode():
            answers = answerer.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                                        max_new_tokens=tokens, min_new_tokens=tokens)
        assert answers.shape[1] == a.prompt + tokens
        return time.perf_counter() - started

    seconds(a.tokens)
    first, whole = seconds(1), seconds(a.tokens)
    tell(prompt_tokens_per_s=a.streams * a.prompt / first,
         decode_tokens_per_s=a.streams * (a.tokens - 1) / (whole - first))


# llama.cpp -----------------------------------------------------------------------------------------------------------

def gguf_file(a):
    """The shape with random weights as llama.cpp reads them; norms stay f32."""
    import gguf
    import numpy

    c, path = shape(a.folder), a.folder / f"{a.type}.gguf"
    if path.exists():
        return path, c["vocab_size"]
    heads, width, inner = c["num_attention_heads"], c["hidden_size"], c["intermediate_size"]
    kv_width = c["num_key_value_heads"] * (width // heads)
    kind = gguf.GGMLQuantizationType[a.type.upper()]
    source = numpy.random.default_rng(0)
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(c["max_position_embeddings"])
    file.add_embedding_length(width)
    file.add_block_count(c["num_hidden_layers"])
    file.add_feed_forward_length(inner)
    file.add_head_count(heads)
    file.add_head_count_kv(c["num_key_value_heads"])
    file.add_layer_norm_rms_eps(c["rms_norm_eps"])
    file.add_rope_dimension_count(width // heads)
    file.add_vocab_size(c["vocab_size"])
    file.add_tokenizer_model("no_vocab")

    def matrix(name, rows, columns):
        values = (source.standard_normal((rows, columns)) * 0.02).astype(numpy.float32)
        file.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name):
        file.add_tensor(f"{name}.weight", numpy.ones(width, numpy.float32))

    matrix("token_embd", c["vocab_size"], width)
    norm("output_norm")
    for n in range(c["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            norm(f"blk.{n}.{name}")
        for name, rows, columns in (
            ("attn_q", width, width), ("attn_k", kv_width, width), ("attn_v", kv_width, width),
            ("attn_output", width, width), ("ffn_gate", inner, width), ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            matrix(f"blk.{n}.{name}", rows, columns)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path, c["vocab_size"]


class LlamaCpp:
    def __init__(self, path, streams, length, threads):
        import llama_cpp

        self.library = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = streams
        # Each stream gets an equal part, in steps of 256.
        settings.n_ctx = streams * -(-length // 256) * 256
        settings.n_batch = max(2048, streams)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings) if self.model else None
        if not self.context:
            sys.exit("llama.cpp does not take the model")

    def forget(self):
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def read(self, rows):
        """Takes rows of token, position, stream, and whether what follows is wanted."""
        batch = self.library.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for n, (token, position, stream, wanted) in enumerate(rows):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, wanted
            batch.seq_id[n][0] = stream
        status = self.library.llama_decode(self.context, batch)
        self.library.llama_synchronize(self.context)
        self.library.llama_batch_free(batch)
        if status != 0:
            sys.exit(f"llama.cpp: llama_decode returned {status}")


def llama(a):
    path, vocabulary = gguf_file(a)
    engine = LlamaCpp(path, a.streams, a.prompt + a.tokens, a.threads)
    source = random.Random(0)
    token = lambda: source.randrange(vocabulary)

    def run():
        """Seconds of the prompts, and of the tokens after each prompt's first: here the next token is any token."""
        engine.forget()
        started = time.perf_counter()
        for stream in range(a.streams):
            engine.read([(token(), n, stream, n == a.prompt - 1) for n in range(a.prompt)])
        first = time.perf_counter()
        for n in range(a.tokens - 1):
            engine.read([(token(), a.prompt + n, stream, True) for stream in range(a.streams)])
        return first - started, time.perf_counter() - first

    run()
    reading, decoding = run()
    tell(prompt_tokens_per_s=a.streams * a.prompt / reading,
         decode_tokens_per_s=a.streams * (a.tokens - 1) / decoding)


# The table -----------------------------------------------------------------------------------------------------------

FIGURES = ("tokens_per_s", "prompt_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes")


def results(folder):
    """{what: {who: {figure: {round: value}}}}, in the order of measurement, from files ROUND.WHAT.WHO.json."""
    found = {}
    for path in sorted(folder.glob("*.*.*.json"), key=lambda path: path.stat().st_mtime_ns):
        turn, what, who, _ = path.name.split(".")
        figures = json.loads(path.read_text())
        rows = [(who, figures)]
        if "rows" in figures:  # `engram bench serve` has one for each number of adapters
            rows = [(f"{who}-{row['adapters']}-adapters" if row["adapters"] else who, row) for row in figures["rows"]]
        for name, row in rows:
            for figure in FIGURES:
                # What Engram's serve has as tokens_per_s has the prompts in it, and the peers' have not.
                if row.get(figure) is not None and (what, figure) != ("serve", "tokens_per_s"):
                    found.setdefault(what, {}).setdefault(name, {}).setdefault(figure, {})[turn] = row[figure]
    return found


def comparable(ours, peer):
    """Engram beside a peer, in 8 bits where the peer is."""
    return ours.startswith("engram") and not peer.startswith("engram") and ("int8" in ours) == ("q8" in peer)


def ratios(whats):
    """Each of Engram's figures as a multiple of each peer's, round by round."""
    for what, by_who in whats.items():
        for ours, peer in itertools.product(by_who, by_who):
            for figure in FIGURES if comparable(ours, peer) else ():
                mine, theirs = by_who[ours].get(figure, {}), by_who[peer].get(figure, {})
                each = [mine[turn] / theirs[turn] for turn in mine if turn in theirs]
                if each:
                    yield {"what": what, "figure": figure, "engram": ours, "peer": peer,
                           "median": statistics.median(each), "each_round": each}


def table(a):
    whats = results(a.folder)
    medians = [
        {"what": what, "who": who, "figure": figure, "median": statistics.median(each.values()),
         "each_round": list(each.values())}
        for what, by_who in whats.items() for who, figures in by_who.items() for figure, each in figures.items()
    ]
    compared = list(ratios(whats))
    print("Medians")
    for row in medians:
        value = f"{row['median'] / 1e6:10.1f} MB" if row["figure"] == "peak_rss_bytes" else f"{row['median']:10.1f}"
        print(f"  {row['what']:9}{row['who']:25}{row['figure']:20}{value}")
    print("Engram as a multiple of each peer: the median of the rounds' ratios, the least and the largest")
    for row in compared:
        least, largest = min(row["each_round"]), max(row["each_round"])
        names = f"{row['engram']} / {row['peer']}"
        print(f"  {row['what']:9}{names:45}{row['figure']:20}{row['median']:7.2f}  ({least:.2f} to {largest:.2f})")
    if a.json:
        left_out = (a.folder / "left-out").read_text().splitlines()
        figures = {"shape": shape(a.folder), "threads": a.threads, "learned": a.learned, "medians": medians, "ratios": compared,
                   "left_out": left_out}
        a.json.write_text(json.dumps(figures, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, *names, **flags):
        one = commands.add_parser(run.__name__)
        one.set_defaults(run=run)
        for name in names:
            one.add_argument(name, type=pathlib.Path if name == "folder" else str)
        for flag, default in flags.items():
            one.add_argument(f"--{flag}", default=default, type=type(default))
        return one

    command(prepare, "shape", "folder", examples=128, data="", random=0)
    command(check).add_argument("packages", nargs="+")
    learning = command(update, "folder", dtype="float32", batch=16, threads=1, examples=128, random=0)
    learning.add_argument("--sorted", action="store_true")
    command(transformers, "folder", dtype="float32", prompt=64, tokens=64, streams=1, threads=1)
    command(llama, "folder", type="bf16", prompt=64, tokens=64, streams=1, threads=1)
    command(table, "folder", threads=1, learned="").add_argument("--json", type=pathlib.Path)
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
