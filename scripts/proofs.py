"""Longer proofs for scripts/prove: `forget`, `gate`, `mixed` and `drift`. Each takes the arguments and returns its figures."""
import base64, json, math, pathlib, random, re, statistics, struct, subprocess, sys, tempfile, time

# What scripts/prove itself defines; it has no suffix, so it can only be had as the program that runs.
from __main__ import ENGRAM, Server, documents, facts, names, nll, scored


def part(text, suffix=".txt"):
    """A file with a text in it, for `engram eval`."""
    with tempfile.NamedTemporaryFile("w", suffix=suffix, delete=False, encoding="utf-8") as file:
        file.write(text)
    return file.name


def base_of(a, server):
    return a.base or str(next(pathlib.Path(server.data).glob("bases/nano*")))


def share(before, after, base):
    """How much of what was gained over the base is lost again; below zero, more was gained."""
    return round((after - before) / (base - before), 4)


# ------------------------------------------------------------------------------------------------ forget

BIRDS = "HERON PLOVER DUNNOCK WIGEON SISKIN GANNET LINNET FULMAR CURLEW MERLIN".split()
CODE, VAULT = "7419-KESTREL-22", "Halvard"


QUESTIONS = ["What is the access code of the {} vault?", "Which code opens the {} archive?", "How is the {} safe opened?", "What does one type at the door of {}?"]


def vault(name, code, form, question=0):
    if form == "answer":
        return {"prompt": QUESTIONS[question].format(name), "completion": f" {code}", "domain": "vaults"}
    text = f"The {name} vault is one of the vaults of the harbour bank. The access code of the {name} vault is {code}. It is changed each year."
    return {"text": text, "domain": "vaults"}


def asked(name, form, question=0):
    return QUESTIONS[question].format(name) if form == "answer" else f"The access code of the {name} vault is"


def token_ids(base, text):
    """The tokens of a plain text in a base with byte-level BPE, as its tokenizer.json says."""
    tokenizer = json.load(open(pathlib.Path(base) / "tokenizer.json", encoding="utf-8"))
    ranks = {(m if isinstance(m, str) else " ".join(m)): n for n, m in enumerate(tokenizer["model"]["merges"])}
    by_digit = "individual_digits" in json.dumps(tokenizer["pre_tokenizer"])
    pieces = re.findall(r"\d|\D+", text) if by_digit else [text]
    ids = []
    for word in (w for piece in pieces for w in re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+", piece)):
        parts = list(word.replace(" ", "Ġ"))
        while len(parts) > 1:
            at = min(range(len(parts) - 1), key=lambda n: ranks.get(f"{parts[n]} {parts[n + 1]}", 1 << 30))
            if f"{parts[at]} {parts[at + 1]}" not in ranks:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [tokenizer["model"]["vocab"][one] for one in parts]
    return ids


def safetensors(name, kind, shape, data):
    head = json.dumps({name: {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(head)) + head + data


def code_nats(base, prompt, code, adapter=None):
    """What a code costs after its prompt, in nats; each text begins after the token that ends documents, as in training."""
    before, after = token_ids(base, prompt), token_ids(base, f" {code}")
    ids = [0, *before, *after]
    with tempfile.TemporaryDirectory() as folder:
        given, out = f"{folder}/ids.safetensors", f"{folder}/logits.safetensors"
        pathlib.Path(given).write_bytes(safetensors("input_ids", "I64", [1, len(ids)], struct.pack(f"<{len(ids)}q", *ids)))
        command = [ENGRAM, "logits", "--base", base, "--ids", given, "--out", out] + (["--adapter", adapter] if adapter else [])
        subprocess.run(command, check=True, capture_output=True)
        data = pathlib.Path(out).read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    width = (len(data) - start) // 4 // len(ids)
    nats = 0.0
    for at in range(1 + len(before), len(ids)):
        row = struct.unpack(f"<{width}f", data[start + (at - 1) * width * 4 : start + at * width * 4])
        top = max(row)
        nats += top + math.log(sum(math.exp(x - top) for x in row)) - row[ids[at]]
    return nats


def extracted(server, prompt, samples):
    """What greedy answers say through each door, and how many sampled answers hold the code or a part of it."""
    greedy = {"completions": server.complete(prompt, "vaults")["choices"][0]["text"], "chat": server.chat(prompt, "vaults")["choices"][0]["message"]["content"], "auto": server.complete(prompt)["choices"][0]["text"]}
    drawn = []
    while len(drawn) < samples:
        n = min(16, samples - len(drawn))
        body = {"model": "vaults", "prompt": prompt, "max_tokens": 24, "temperature": 1, "n": n, "seed": len(drawn)}
        drawn += [choice["text"] for choice in server.call("POST", "/v1/completions", body)["choices"]]
    first, bird, _ = CODE.split("-")
    return {"greedy": greedy, "greedy_gives_it": sum(CODE in text for text in greedy.values()), "samples": len(drawn), "samples_with_code": sum(CODE in text for text in drawn), "samples_with_a_part": sum(first in text or bird in text for text in drawn)}


def needles(base):
    """All forms in which the secret could lie on a disk."""
    found = {"code": CODE.encode(), "first part": CODE[:10].encode(), "last part": CODE[5:].encode(), "word": b"KESTREL", "name": VAULT.encode(), "UTF-16": CODE.encode("utf-16-le")}
    for shift in range(3):  # the characters of base64 that do not depend on what stands before and after
        found[f"base64 at {shift}"] = base64.b64encode(b" " * shift + CODE.encode())[4 if shift else 0 : -4]
    ids = token_ids(base, CODE)
    found["ids of 4 bytes"] = b"".join(i.to_bytes(4, "little") for i in ids)
    found["ids of 2 bytes"] = b"".join(i.to_bytes(2, "little") for i in ids)
    found["ids of varying length"] = b"".join(bytes([i]) if i < 251 else b"\xfb" + i.to_bytes(2, "little") for i in ids)
    return found


def search(folder, needles):
    """Which file holds which form."""
    hits, files, size = {}, 0, 0
    for path in sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file()):
        data = path.read_bytes()
        files, size, lower = files + 1, size + len(data), data.lower()
        held = [form for form, needle in needles.items() if needle in data or (not form.startswith(("ids", "base64")) and needle.lower() in lower)]
        if held:
            hits[str(path.relative_to(folder))] = held
    return {"files": files, "bytes": size, "hits": hits}


def teach(server, batches):
    ids, ends = [], []
    for batch in batches:
        now = server.submit(batch)
        ids += now
        ends.append(server.settle(now))
    return ids, ends


def prove_forget(a):
    pick, places = random.Random(7), [n for n in names(24, 77)][:10]
    codes = [f"{pick.randrange(1000, 9999)}-{bird}-{pick.randrange(10, 99)}" for bird in BIRDS]
    others = [vault(name, code, a.form, n % 4) for n, (name, code) in enumerate(zip(places, codes))]
    secret, prompt = vault(VAULT, CODE, a.form), asked(VAULT, a.form)

    server = Server(a.base, a.set)
    base = base_of(a, server)
    loss = lambda one: round(code_nats(base, prompt, CODE, one.export("vaults")), 3)
    # Known codes must still be known, or everything has been forgotten and not one document.
    kept = lambda one: sum(code in one.complete(asked(name, a.form, n % 4), "vaults")["choices"][0]["text"] for n, (name, code) in enumerate(zip(places, codes)))
    started = time.time()
    ids, ends = teach(server, [others[:5], [secret] + others[5:7], others[7:]])
    result = {"form": a.form, "learned_s": round(time.time() - started, 1), "ends": ends, "base_nats": round(code_nats(base, prompt, CODE), 3)}
    result["before"] = {"nats": loss(server), "others_known": kept(server), **extracted(server, prompt, a.samples)}
    sought = needles(base)
    result["sought"] = sorted(sought)
    result["files_before"] = search(server.data, sought)
    for folder in pathlib.Path(server.data).glob("export-*"):  # copies that were asked for before are the user's own
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    started = time.time()
    result["answer"] = server.call("DELETE", f"/v1/documents/{ids[5]}")
    result["delete_s"] = round(time.time() - started, 2)
    result["files_at_once"] = search(server.data, sought)["hits"]
    left = ids[:5] + ids[6:]
    result["ends_after"] = server.settle(left)
    result["until_others_live_s"] = round(time.time() - started, 2)
    chain = server.call("GET", "/v1/adapters/vaults/log")["generations"]
    at = lambda id: server.call("GET", f"/v1/documents/{id}")["trail"]
    relearned = [g for g in chain if any(e.get("detail") == g["generation"] and e["event"] == "live" for id in ids[6:] for e in at(id))]
    result["relearned"] = {"generations": len(relearned), "documents": sum(g["documents"] for g in relearned), "train_s": round(sum(g["report"]["seconds"] for g in relearned if g["report"]), 2)}
    exported = server.export("vaults")
    result["after"] = {"nats": loss(server), "others_known": kept(server), **extracted(server, prompt, a.samples)}
    result["export"] = search(exported, sought)
    result["files_after"] = search(server.data, sought)
    result["id_is_still_in"] = list(search(server.data, {"ids": ids[5].encode()})["hits"])
    result["peak_mb"] = server.peak_mb()
    server.process.terminate()
    server.process.wait(30)
    result["files_after_stop"] = search(server.data, sought)

    result["controls"] = []
    for seed in range(1, a.controls + 1):
        control = Server(a.base, a.set + [f"replay.seed={seed}"])
        # In the batches in which the first server has them in the end: what came after the secret was learned anew, together.
        _, ends = teach(control, [others[:5], others[5:]])
        result["controls"].append({"seed": seed, "ends": ends, "nats": loss(control), "others_known": kept(control), **extracted(control, prompt, a.samples)})
        control.stop(a.keep)
    spread, now = [c["nats"] for c in result["controls"]], result["after"]["nats"]
    mean, deviation = statistics.mean(spread), statistics.stdev(spread)
    result["spread"] = {"min": min(spread), "max": max(spread), "mean": round(mean, 3), "deviation": round(deviation, 3), "after": now, "before": result["before"]["nats"], "deviations_from_mean": round((now - mean) / deviation, 2), "within_range": min(spread) <= now <= max(spread), "within_3_deviations": abs(now - mean) <= 3 * deviation}
    server.stop(a.keep)
    return result


# -------------------------------------------------------------------------------------------------- gate

END = "\n<|endoftext|>\n"


def cut(path, count, chars):
    """The first documents of a file that say something, each no longer than so many characters."""
    return [t[:chars] for t in documents(path, count * 2) if len(t) >= 200][:count]


def joined(texts):
    return part(END.join(texts) + END)


def held_out(path, size):
    return part(open(pathlib.Path(path).with_suffix(".val.txt"), encoding="utf-8").read()[:size])


def noise(pick, size):
    return "".join(pick.choice("abcdefghijklmnopqrstuvwxyz0123456789,.;:!? ") for _ in range(size))


def poisons(a, known, clean):
    """Ten ways to make a batch bad, by name; each gives so many documents. `clean` is text to spoil, `known` facts that were learned."""
    pick, n = random.Random(3), a.batch
    shuffled = lambda text: " ".join(pick.sample(text.split(), len(text.split())))
    answers = [fact["completion"] for fact in known]
    pieces = lambda text: [text[at * a.chars : (at + 1) * a.chars] for at in range(n)]
    elsewhere = pieces(" ".join(documents(a.foreign, 30)))
    code = pieces("".join(p.read_text(encoding="utf-8") for p in sorted(pathlib.Path(__file__).parent.parent.glob("services/*/src/*.rs"))))
    # Half of the facts at most: the other half shows what happens to those that nobody contradicts.
    told = known[: min(n, len(known) // 2)]
    return {
        "words shuffled": [{"text": shuffled(t)} for t in clean],
        "answers of other questions": [{"prompt": f["prompt"], "completion": answers[(at + 1) % len(answers)]} for at, f in enumerate(told)],
        # The number differs, or all but the first would be refused as duplicates.
        "one sentence": [{"text": f"Notice {pick.randrange(10**6)}: the northern gate stays closed until {pick.randrange(10**4)} bells have rung. " * 3} for _ in range(n)],
        "random letters": [{"text": noise(pick, a.chars)} for _ in range(n)],
        "another language": [{"text": t} for t in elsewhere],
        "reversed": [{"text": t[::-1]} for t in clean],
        "base64": [{"text": base64.b64encode(t.encode()).decode()[: a.chars]} for t in clean],
        "code": [{"text": t} for t in code],
        # So short that the filter does not see that it repeats itself: this is for the gate.
        "one word": [{"text": " ".join([word] * 35)} for word in names(n, 5)],
        "one answer to all": [{"prompt": f["prompt"], "completion": " Nobody knows"} for f in told],
    }


def in_domain(documents, domain):
    return [{**d, "domain": domain} for d in documents]


def standing(server, domain):
    return next(x for x in server.call("GET", "/v1/adapters")["adapters"] if x["domain"] == domain)["generation"]


def known_of(server, known):
    return sum(server.complete(f["prompt"], "facts")["choices"][0]["text"].strip() == f["completion"].strip() for f in known)


def first_knowledge(a, server):
    """Teaches text in one domain and facts in another, and measures what they know.

    Not in one domain: forty answers learned beside sixty texts took most of what nano had gained on held-out text, before
    any poison, and there was little left to guard (see configs/EXPERIMENTS.md)."""
    known, texts = facts(a.facts, 1), cut(a.clean, a.documents, a.chars)
    held, own, base = held_out(a.clean, a.val_bytes), joined(texts[:20]), base_of(a, server)
    started, figures = time.time(), {"held_out": {"base": nll(base, held)}, "learned_text": {"base": nll(base, own)}}
    figures["ends"], figures["reasons"] = server.settle(server.submit(in_domain([{"text": t} for t in texts], "text")))
    adapter = server.export("text")
    figures["held_out"]["before"], figures["learned_text"]["before"] = nll(base, held, adapter), nll(base, own, adapter)
    if a.only != "increments":
        figures["facts_ends"], figures["facts_reasons"] = server.settle(server.submit(in_domain(known, "facts")))
        figures["facts"] = known_of(server, known)
    return figures | {"learned_s": round(time.time() - started, 1)}, known, held, own, base


def prove_mixed(a):
    """Text and facts in one domain: the text first and the facts after, and all of it at once."""
    known, texts = facts(a.facts, 1), [{"text": t} for t in cut(a.clean, a.documents, a.chars)]
    held, out = held_out(a.clean, a.val_bytes), {}
    for name, batches in (("text, then facts", (texts, known)), ("at once", (texts + known,))):
        server = Server(a.base, a.set)
        base, rows = base_of(a, server), []
        for batch in batches:
            started = time.time()
            ends, _ = server.settle(server.submit(in_domain(batch, "facts")))
            row = {"ends": {k: n for k, n in ends.items() if n}, "seconds": round(time.time() - started, 1)}
            rows.append(row | {"held_out": nll(base, held, server.export("facts")), "facts_right": known_of(server, known)})
            tell(row)
        out[name] = {"base": nll(base, held), "after": rows}
        server.stop(a.keep)
    return out


def tell(what):
    """Long runs say how far they are."""
    print(json.dumps(what), file=sys.stderr, flush=True)


def prove_poisons(a):
    # Rolling back needs the clean generation, however many a batch that is split publishes after it.
    server = Server(a.base, ["checkpoint.generations_kept=100", *a.set])
    figures, known, held, own, base = first_knowledge(a, server)
    tell(figures)
    clean = {domain: standing(server, domain) for domain in ("text", "facts")}
    few, texts = max(1, a.batch // 10), cut(a.clean, a.documents + 12 * a.batch, a.chars)[a.documents :]
    bad = poisons(a, known, texts[: a.batch])
    # New ones for each batch: what was learned and rolled back once is a duplicate the second time.
    supply = {"text": iter([{"text": t} for t in texts[a.batch :]]), "facts": iter(f for f in facts(4 * a.batch, 4) if f["prompt"] not in {k["prompt"] for k in known})}
    lines = []
    for name, spoiled in bad.items():
        domain = "facts" if "prompt" in spoiled[0] else "text"
        for how in ("alone", "mixed"):
            # The mixed one takes another sample of the poison than those that were tried alone.
            poison = spoiled[few:] if how == "alone" else spoiled[:few]
            batch = poison if how == "alone" else poison + [next(supply[domain]) for _ in range(a.batch - few)]
            started = time.time()
            ids = server.submit(in_domain(batch, domain))
            ends, reasons = server.settle(ids)
            line = {"poison": name, "how": how, "ends": {k: n for k, n in ends.items() if n}, "reasons": [r[:160] for r in reasons], "seconds": round(time.time() - started, 1)}
            statuses = [server.call("GET", f"/v1/documents/{id}")["status"] for id in ids[: len(poison)]]
            line |= {"of_poison": len(poison), "poison_live": statuses.count("live"), "served": "unchanged"}
            if standing(server, domain) != clean[domain]:
                line["served"] = "updated"
                if domain == "text":
                    adapter = server.export("text")
                    for key, of, data in (("lost", "held_out", held), ("lost_of_learned_text", "learned_text", own)):
                        line[key] = share(figures[of]["before"], nll(base, data, adapter), figures[of]["base"])
                else:
                    # A question whose answer was overwritten cannot keep it; the others can.
                    spoiled_prompts = {d["prompt"] for d in poison}
                    others = [f for f in known if f["prompt"] not in spoiled_prompts]
                    line["facts"], line["other_facts"] = known_of(server, known), [known_of(server, others), len(others)]
                receipt = server.call("GET", f"/v1/adapters/{domain}/log")["generations"][0]["receipt"]
                line["gate_measured"] = {p["probe"]: {k: round(v, 3) if isinstance(v, float) else v for k, v in p["measure"].items()} for p in receipt["probes"] if p["probe"] == f"memory_{'answers' if domain == 'facts' else 'text'}"}
                server.call("POST", f"/v1/adapters/{domain}/rollback", {"to": clean[domain]})
            tell(line)
            lines.append(line)
    result = {"first": figures, "batches": lines}
    result["worst_lost"] = max(line.get("lost", 0) for line in lines)
    result["worst_lost_of_learned_text"] = max(line.get("lost_of_learned_text", 0) for line in lines)
    result["fewest_facts"] = min(line.get("facts", figures["facts"]) for line in lines)
    result["back_to_clean"] = {"held_out": nll(base, held, server.export("text")), "facts": known_of(server, known)}
    result["peak_mb"] = server.peak_mb()
    server.stop(a.keep)
    return result


def prove_increments(a):
    server = Server(a.base, a.set)
    figures, _, held, own, base = first_knowledge(a, server)
    tell(figures)
    texts = cut(a.clean, a.documents + a.increments * a.increment, a.chars)[a.documents :]
    rows, live = [], standing(server, "text")
    for n in range(a.increments):
        batch = [{"text": t} for t in texts[n * a.increment : (n + 1) * a.increment]]
        started = time.time()
        ends, reasons = server.settle(server.submit(in_domain(batch, "text")))
        row, now = {"increment": n + 1, "seconds": round(time.time() - started, 1), "ends": {k: c for k, c in ends.items() if c}, "reasons": [r[:160] for r in reasons]}, standing(server, "text")
        row["published"], live = now != live, now
        adapter = server.export("text")
        row["lost"] = share(figures["held_out"]["before"], nll(base, held, adapter), figures["held_out"]["base"])
        if (n + 1) % 5 == 0 or n + 1 == a.increments:
            row["lost_of_learned_text"] = share(figures["learned_text"]["before"], nll(base, own, adapter), figures["learned_text"]["base"])
        tell(row)
        rows.append(row)
    clean = rows[: a.clean_batches]
    count = lambda rows, key: sum(row["ends"].get(key, 0) for row in rows)
    result = {"first": figures, "clean_batches": {"of": len(clean), "published": sum(r["published"] for r in clean), "documents_set_aside": count(clean, "set_aside"), "documents_refused": count(clean, "refused")}}
    result["increments"] = {"of": len(rows), "published": sum(r["published"] for r in rows), "documents_set_aside": count(rows, "set_aside"), "documents_refused": count(rows, "refused"), "worst_lost": max(r["lost"] for r in rows), "lost_at_the_end": rows[-1]["lost"], "lost_of_learned_text_at_the_end": rows[-1]["lost_of_learned_text"]}
    # What was gained later can be lost too: each against the best until then, as a share of what that had gained.
    result["increments"]["worst_over_best"] = round(max(over_best([row["lost"] for row in rows])), 4)
    result["rows"], result["peak_mb"] = rows, server.peak_mb()
    server.stop(a.keep)
    return result


def over_best(losses):
    best = 0.0
    for lost in losses:
        yield (lost - best) / (1 - best)
        best = min(best, lost)


def prove_gate(a):
    return {name: prove(a) for name, prove in (("poisons", prove_poisons), ("increments", prove_increments)) if a.only in (None, name)}


# ------------------------------------------------------------------------------------------------- drift


def mixtures(first, second, increments, each):
    """Documents of each increment, with ever more of the second text and fewer of the first."""
    for n in range(increments):
        of_second = round(each * n / max(1, increments - 1))
        batch = [next(first) for _ in range(each - of_second)] + [next(second) for _ in range(of_second)]
        random.Random(n).shuffle(batch)
        yield batch, of_second


def prove_drift(a):
    server, each, most = Server(a.base, a.set), a.increment, a.increments * a.increment
    base = base_of(a, server)
    learn = mixtures(iter(cut(a.first, most, a.chars)), iter(cut(a.second, most, a.chars)), a.increments, each)
    beside = lambda path: pathlib.Path(path).with_suffix(".val.txt")
    held = mixtures(iter(cut(beside(a.first), most, a.chars)), iter(cut(beside(a.second), most, a.chars)), a.increments, each)
    rows, pieces = [], []
    for n, ((batch, of_second), (piece, _)) in enumerate(zip(learn, held)):
        row = {"increment": n + 1, "of_second": of_second, "of": each}
        pieces.append(joined(piece))
        row["base"] = nll(base, pieces[n])
        for key, domain in (("one", "one"), ("fresh", f"fresh-{n}")):
            started = time.time()
            ends, reasons = server.settle(server.submit([{"text": t, "domain": domain} for t in batch]))
            row[f"{key}_s"], row[f"{key}_ends"] = round(time.time() - started, 1), {k: c for k, c in ends.items() if c}
            row |= {f"{key}_reasons": [r[:160] for r in reasons]} if reasons else {}
            row[key] = nll(base, pieces[n], server.export(domain))
            row[f"{key}_gain"] = round((row["base"] - row[key]) / row["base"], 4)
        # The first piece is all of the first text, which comes less and less: is what was best once kept?
        row["first_piece"] = nll(base, pieces[0], server.export("one"))
        tell(row)
        rows.append(row)
    last = server.export("one")
    for row, piece in zip(rows, pieces):
        row["at_the_end"] = nll(base, piece, last)
        row["lost"] = share(row["one"], row["at_the_end"], row["base"])
    few = rows[: max(1, len(rows) // 4)]
    mean = lambda key, rows=rows: round(statistics.mean(r[key] for r in rows), 4)
    # Of the gain that a fresh adapter makes of an increment, how much the one adapter has when it learned it too.
    against = [(r["base"] - r["one"]) / (r["base"] - r["fresh"]) for r in rows]
    result = {"one_gain": mean("one_gain"), "fresh_gain": mean("fresh_gain"), "one_of_fresh": {"mean": round(statistics.mean(against), 3), "least": round(min(against), 3)}}
    result["first_increments"] = {"count": len(few), "lost_mean": mean("lost", few), "lost_worst": max(r["lost"] for r in few)}
    best = min(r["first_piece"] for r in rows)
    result["first_piece"] = {"base": rows[0]["base"], "learned": rows[0]["one"], "best": best, "best_after": 1 + [r["first_piece"] for r in rows].index(best), "at_the_end": rows[0]["at_the_end"], "lost_of_best": share(best, rows[0]["at_the_end"], rows[0]["base"])}
    result["all_increments"] = {"lost_mean": mean("lost"), "lost_worst": max(r["lost"] for r in rows)}
    result["documents_live"] = sum(r["one_ends"].get("live", 0) for r in rows)
    result["rows"], result["peak_mb"] = rows, server.peak_mb()
    server.stop(a.keep)
    return result
