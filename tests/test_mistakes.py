"""Mistakes that people make: each is one short sentence, has its exit code, and leaves nothing.

A row is a command line, the exit code that docs/command_line.md gives it, and words that its line
must hold: the nearest name where there is one, else what is allowed or where the mistake is.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import sampler
from sampler.bundled import FOLDER
from sampler.cli import main
from sampler.runs.lock import Lock

LONGEST = 300

FILES = {
    "p.txt": "a fox\n",
    "empty.txt": "# nothing\n",
    "latin.txt": b"fine\ncaf\xe9\n",
    "nul.txt": b"a\x00b\n",
    "wild.txt": "a __animl__\n",
    "two.txt": "{a|b} fox\n",
    "head.csv": "promt,seed\na,1\n",
    "blank.csv": "prompt,seed\na,1\n,2\n",
    "large.csv": "prompt,seed\na,1e17\n",
    "midjourney.txt": "a fox --ar 16:9\n",
    "short.csv": "prompt,seed\na\n",
    "cell.csv": "prompt,steps\na,many\n",
    "below.csv": "prompt,steps\na,-3\n",
    "field.csv": "prompt,sampler,sampler.ordr\na,ab,2\n",
    "odd.csv": "prompt,widht\na,64\n",
    "broken.jsonl": '{"prompt": \n',
    "number.jsonl": '{"prompt": 5}\n',
    "p.docx": "a\n",
    "p.parquet": "PAR1 no",
    "list.yaml": "- a\n",
    "twice.yaml": "run: {steps: 2}\nrun: {n: 2}\n",
    "tab.yaml": "run:\n\tsteps: 2\n",
    "open.yaml": "run: [1\n",
    "unknown.yaml": "run:\n  stpes: 3\n",
    "tag.yaml": "run: !!python/object:os.system x\n",
    "text.yaml": "run: {steps: '20'}\n",
    "yes.yaml": "run: {dedupe: yes}\n",
    "version.yaml": "version: 2\n",
    "gone.yaml": "prompts: {file: nowhere.txt}\n",
    "bad.json": '{"run": ',
    "latin.yaml": b"# caf\xe9\n",
    "tune.yaml": "reward: brightness\nprompts: [a fox]\noutput: {dir: tuned}\n",
    "text.png": "no image\n",
    "cards/animal.txt": "cat\ndog\n",
}

MISTAKES = [
    # commands and options
    ("genrate a", 2, "Did you mean 'generate'?"),
    ("config", 2, None),
    ("config schem", 2, "Did you mean 'schema'?"),
    ("list smplers", 2, "did you mean 'samplers'"),
    ("generate", 2, "No prompts"),
    ("generate a --stesp 3", 2, "--steps"),
    ("generate a --steps", 2, "'--steps' requires an argument"),
    ("generate a --offline --download", 2, "--offline forbids it"),
    # values out of range or of another type
    ("generate a --steps -3", 2, "--steps: run.steps = -3 must be an integer from 1 to 1000"),
    ("generate a --steps 5000", 2, "must be an integer from 1 to 1000"),
    ("generate a --steps many", 2, "'--steps'"),
    ("generate a --seed -1", 2, "run.seed = -1"),
    ("generate a --seed one", 2, "'--seed'"),
    ("generate a -n 0", 2, "run.n = 0"),
    ("generate a --width 100", 2, "width = 100 must be a multiple of 8"),
    ("generate a --height 99999", 2, "run.height = 99999"),
    ("generate a --batch-size some", 2, "must be 'auto', or an integer of at least 1"),
    ("generate a --dtype fp16", 2, "did you mean 'float16'"),
    ("generate a --device abacus", 2, "known: auto, cpu, cuda"),
    ("generate a --device cdua:1", 2, "did you mean 'cuda'"),
    ("generate a --metadata all", 2, "'full', 'basic', 'none'"),
    ("generate a --executor clod", 2, "'local', 'torchrun', 'ray'"),
    ("generate a --color always", 2, "is not one of 'auto', 'never'"),
    ("generate a --preset drft", 2, "did you mean 'draft'"),
    ("generate a --name-template {promt}", 2, "known: index, key, seed, slug"),
    ("generate a\x00b", 2, "control character U+0000"),
    # strategies
    ("generate a --sampler ddmi", 2, "did you mean 'ddim'"),
    ("generate a --guidance cfgg", 2, "did you mean 'cfg'"),
    ("generate a --set guidance.scal=3", 2, "did you mean 'scale'"),
    ("generate a --set guidance.scale=high", 2, "scale = 'high' must be a number"),
    ("generate a --set guidance.scale=-1", 2, "scale = -1 must be a number of at least 0"),
    ("generate a --set sampler.eta=2", 2, "must be a number from 0 to 1"),
    ("generate a --sampler ab --set sampler.order=9", 2, "must be an integer from 1 to 5"),
    ("generate a --guidance sum --set 'guidance.rules=[cfg, {name: apg, scal: 3}]'", 2,
     "guidance 'apg' has no field 'scal' (did you mean 'scale'?)"),
    ("generate a --sampler ghvb --set sampler.momentum_number=big", 2, "'calibrated:FILE'"),
    ("generate a --sampler ghvb --set sampler.momentum_number=calibrated:no.json", 2, "no.json"),
    ("generate a --guidance embedded", 2, "use 'cfg'"),
    ("generate a --guidance student", 2, "--student DIR"),
    # --set
    ("generate a --set run.steps", 2, "takes a.b=value"),
    ("generate a --set run.stps=3", 2, "did you mean 'steps'"),
    ("generate a --set runn.steps=3", 2, "did you mean 'run'"),
    ("generate a --set run.steps=[1", 2, "--set run.steps:1"),
    ("generate a --set run.dedupe=yes", 2, "must be true or false"),
    # configuration files
    ("generate a -c nowhere.yaml", 2, "nowhere.yaml: no such file"),
    ("generate a -c folder", 2, "folder: is a directory"),
    ("generate a -c hidden.yaml", 2, "hidden.yaml: permission denied"),
    ("generate a -c list.yaml", 2, "list.yaml:1: a configuration is a mapping"),
    ("generate a -c twice.yaml", 2, "twice.yaml:2: the key 'run' is given twice"),
    ("generate a -c tab.yaml", 2, "tab.yaml:2: a tab cannot indent; use spaces"),
    ("generate a -c open.yaml", 2, "open.yaml:2"),
    ("generate a -c unknown.yaml", 2, "unknown.yaml:2: run.stpes: unknown key (did you mean 'ste"),
    ("generate a -c tag.yaml", 2, "tag.yaml:1: tags (!) are not allowed"),
    ("generate a -c text.yaml", 2, 'run.steps = "20" must be an integer from 1 to 1000'),
    ("generate a -c yes.yaml", 2, "yes.yaml:1: run.dedupe"),
    ("generate a -c version.yaml", 2, "version = 2 must be 1"),
    ("generate a -c latin.yaml", 2, "latin.yaml:1: not UTF-8"),
    ("generate a -c bad.json", 2, "bad.json:1"),
    ("generate -c gone.yaml", 2, "nowhere.txt: no such file"),
    ("validate unknown.yaml", 2, "did you mean 'steps'"),
    # prompt files
    ("generate --prompts nowhere.txt", 2, "nowhere.txt: no such file"),
    ("generate a -o s3://bucket/run", 2, "s3://bucket/run cannot be opened: Install s3fs"),
    ("generate a -o nowhere://run", 2, "nowhere://run cannot be opened: Protocol not known"),
    ("generate --prompts empty.txt", 2, "No prompts"),
    ("generate --prompts folder", 2, "folder: is a directory"),
    ("generate --prompts latin.txt", 2, "latin.txt:2: not UTF-8"),
    ("generate --prompts nul.txt", 2, "nul.txt:1: prompt: holds the control character U+0000"),
    ("generate --prompts midjourney.txt", 2, "--ar is not an option of prompt lines"),
    ("generate --prompts p.docx", 2, "txt, csv, tsv, jsonl, parquet"),
    ("generate --prompts p.parquet", 2, "not a readable parquet file"),
    ("generate --prompts blank.csv", 2, "blank.csv:3: prompt: the line has settings but no prompt"),
    ("generate --prompts large.csv", 2, "large.csv:2: seed: 1e17 is a float above 2^53"),
    ("generate --prompts p.txt --format cvs", 2, "'txt', 'csv', 'tsv'"),
    ("generate --prompts head.csv", 2, "needs a column 'prompt'"),
    ("generate --prompts odd.csv", 2, "did you mean 'width'"),
    ("generate --prompts short.csv", 2, "short.csv:2: 1 cells"),
    ("generate --prompts cell.csv", 2, "cell.csv:2: steps"),
    ("generate --prompts below.csv", 2, "below.csv:2: steps"),
    ("generate --prompts field.csv", 2, "did you mean 'order'"),
    ("generate --prompts broken.jsonl", 2, "broken.jsonl:1"),
    ("generate --prompts number.jsonl", 2, "must be a text"),
    ("generate --prompts wild.txt --expand all", 2, "--wildcards"),
    ("generate --prompts wild.txt --expand all --wildcards cards", 2, "did you mean 'animal'"),
    ("generate --prompts wild.txt --expand all --wildcards crads", 2, "crads is not a folder"),
    ("generate --prompts two.txt --expand all -n 600000", 2, "More than 1,000,000 images"),
    ("generate a --set limits.max_jobs=3 -n 5", 2, "More than 3 images"),
    # sweeps
    ("sweep a", 2, "--axis NAME=VALUES"),
    ("sweep a --axis stepz=1,2", 2, "did you mean 'steps'"),
    ("sweep a --axis steps=1..3:0", 2, "use a step > 0"),
    ("sweep a --axis steps=a,b", 2, "steps = 'a' must be an integer of at least 1"),
    ("sweep a --axis sampler=ddim,abb", 2, "did you mean 'ab'"),
    ("sweep a --axis guidance.scal=1,2", 2, "did you mean 'scale'"),
    ("sweep a --axis prompt/cat=cat,dog", 2, "not in the prompt"),
    # models, adapters, students
    ("generate a --model nowhere", 6, "nowhere"),
    ("generate a --model folder", 6, "folder is not a diffusers pipeline"),
    ("generate a --model pickled", 6, "pickle weights only"),
    ("generate a --model some/where", 6, "(--download) to fetch it"),
    ("generate a --lora folder", 6, "folder has no LoRA"),
    ("generate a --lora folder:much", 2, "PATH or PATH:weight"),
    ("generate a --student folder", 6, "folder has no student"),
    # pictures to restore
    ("generate a --task inpant --image plain.png", 2, "did you mean 'inpaint'"),
    ("generate a --task deblur", 2, "needs --image FILE"),
    ("generate a --task deblur --image text.png", 2, "text.png: it is not a readable image"),
    # run folders
    ("generate a -o p.txt", 5, "p.txt is a file; give a folder"),
    ("generate a dog -o run", 4, "run belongs to another plan"),
    ("generate a --extend", 2, "--extend needs the run folder -o DIR"),
    ("generate a --extend -o nowhere", 2, "nowhere is not a run folder"),
    ("generate a --extend --metadata none -o run", 4, "run cannot be extended; different: output"),
    ("generate a -o locked", 4, "locked is in use by process"),
    ("resume nowhere", 2, "nowhere is not a run folder"),
    ("resume folder", 2, "it has no run.json"),
    ("resume locked", 4, "in use by process"),
    ("eval", 2, "Give a RUN to score"),
    ("eval folder --scorers jugde", 2, "did you mean 'judge'"),
    ("eval folder --scorers fid", 2, "is the name of a protocol"),
    ("eval folder --steps 3", 2, "--steps has no effect"),
    ("verify damaged", 2, "damaged/plan.json is damaged"),
    ("show run#zz", 2, "no image with the key 'zz'"),
    ("show text.png", 2, "use PNG"),
    ("replay text.png", 2, "use PNG"),
    ("replay cut.png", 2, "truncated"),
    ("replay plain.png", 2, "holds no record"),
    ("replay folder", 2, "RUN#KEY"),
    ("grid run --x scale", 2, "no axis 'scale'"),
    ("grid run --columns -1", 2, "'--columns'"),
    ("export run --to xls", 2, "is not one of 'csv', 'parquet', 'webdataset'"),
    # inspections
    ("inspect featurs", 2, "Did you mean 'features'?"),
    ("inspect attention fox --word cat --steps 1", 2, "The word 'cat' is not in the prompt 'fox'"),
    ("inspect attention fox --score brightnes --steps 1", 2, "did you mean 'brightness'"),
    ("inspect features --images folder --labels p.txt", 2, "folder holds no finished image"),
    ("inspect features --images run --labels p.txt", 2, "a header is needed with 'file'"),
    ("inspect features --images run --labels nowhere.csv", 2, "no such file"),
    ("inspect loss --images nowhere", 2, "nowhere is not a folder"),
    ("inspect basis --images run --t 1", 2, "t = 1.0 is a level without signal"),
    ("inspect realism --real run --generated run", 2, "at least 16 real and 8 generated"),
    # fine-tuning
    ("finetune -c tune.yaml --reward brightnes", 2, "did you mean 'brightness'"),
    ("finetune -c tune.yaml --trainer ddp", 2, "did you mean 'ddpo'"),
    ("finetune -c tune.yaml --set trainer.los=hinge", 2, "did you mean 'loss'"),
    ("finetune -c tune.yaml --set fit.btch=1", 2, "did you mean 'batch'"),
    ("finetune -c tune.yaml --updates -1", 2, "updates = -1 must be an integer of at least 0"),
    ("finetune -c tune.yaml --reward compressibility", 2, "use trainer 'ddpo' or 'rlcm'"),
    ("finetune -c tune.yaml --reward os:system", 2, "--allow-python"),
    ("finetune -c tune.yaml --reward clip", 2, "needs the field 'path'"),
    ("finetune -c tune.yaml --set fit.log_with=tensorbord", 2, "did you mean 'tensorboard'"),
    ("finetune -c tune.yaml --model nowhere", 6, "nowhere"),
    ("finetune -c tune.yaml -o p.txt", 5, "p.txt is a file; give a folder"),
    ("finetune --reward brightness", 2, "No prompts"),
    ("calibrate momentum --prompts nowhere.txt -o m.json", 2, "nowhere.txt: no such file"),
    ("calibrate momentum --prompts p.txt -o m.json --guidance cfgg", 2, "did you mean 'cfg'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the rows name; a run in it is locked meanwhile."""
    home = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (home / "folder").mkdir()
    (home / "hidden.yaml").write_text("run: {steps: 2}\n")
    (home / "hidden.yaml").chmod(0)
    shutil.copytree(FOLDER / "pipeline", home / "pickled")
    weights = home / "pickled" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    Image.new("RGB", (64, 64)).save(home / "plain.png")
    made = ["generate", "a fox", "--steps", "1", "--seed", "1", "-q", "-o", str(home / "run")]
    assert main(made) == 0
    (image,) = (home / "run" / "images").iterdir()
    (home / "cut.png").write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    for name in ("locked", "damaged"):
        shutil.copytree(home / "run", home / name)
    (home / "damaged" / "plan.json").write_text("{")
    with Lock(home / "locked"):
        yield home


@pytest.fixture(autouse=True)
def _there(world, monkeypatch):
    for name in ("SAMPLER_OUT", "SAMPLER_DEVICE", "SAMPLER_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(world)


def everything(folder):
    """Every file with its time, but for the locks, which have a heartbeat."""
    return sorted(
        (path, path.stat().st_mtime_ns if path.is_file() else 0)
        for path in folder.rglob("*")
        if path.name != ".lock"
    )


def check(line, code, words, found, out, err):
    assert found == code, (line, found, err)
    if words is None:  # help instead of a message
        assert err == "" and "Usage" in out
        return
    assert out == "" and err.count("\n") == 1 and err.startswith("sampler: "), (line, out, err)
    assert words in err, (line, err)
    assert len(err) <= LONGEST and "Traceback" not in err and "0x" not in err, (line, err)


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_sentence_and_leaves_nothing(world, capsys, line, code, words):
    if "hidden" in line and os.access(world / "hidden.yaml", os.R_OK):
        pytest.skip("this user may read everything")
    before = everything(world)
    found = main(shlex.split(line))
    check(line, code, words, found, *capsys.readouterr())
    assert everything(world) == before


def test_the_table_is_long_enough_and_no_row_stands_twice():
    assert len({line for line, _, _ in MISTAKES}) == len(MISTAKES) >= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_gpu_that_is_not_there(capsys):
    for name in ("cuda", "cuda:7"):
        found = main(["generate", "a", "--device", name])
        check(name, 2, f"The device '{name}' is not available", found, *capsys.readouterr())


@pytest.mark.parametrize(
    "line",
    ["generate a --sampler ddmi", "verify damaged", "generate a --model pickled", "replay cut.png"],
)
def test_with_json_stdout_tells_the_same_as_an_event(capsys, line):
    code = main([*shlex.split(line), "--json"])
    out, err = capsys.readouterr()
    *_, event = map(json.loads, out.splitlines())
    assert event["t"] == "error" and event["code"] == code
    assert err == f"sampler: {event['message']}\n"


@pytest.mark.parametrize(
    "line", ["generate a --sampler ddmi", "genrate a", "generate a -o locked", "config"]
)
def test_a_process_of_its_own_says_the_same(world, line):
    row = next(row for row in MISTAKES if row[0] == line)
    done = subprocess.run(
        [sys.executable, "-m", "sampler", *shlex.split(line)],
        cwd=world, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    check(*row, done.returncode, done.stdout, done.stderr)


LEVELS = [sampler.Level(t, (1 - t * t) ** 0.5, t) for t in (0.9, 0.5, 0.0)]


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


CALLS = {
    "an unknown kind": (lambda e: sampler.build("samplers", "ddim"), "did you mean 'sampler'"),
    "a misspelt name": (lambda e: sampler.build("reward", "brightnes"), "'brightness'"),
    "a class": (lambda e: sampler.build("guidance", sampler.GuidanceBase), "an instance"),
    "a wrong field": (lambda e: sampler.build("sampler", {"name": "ab", "ordr": 2}), "'order'"),
    "no prompts": (lambda e: e.generate([]), "prompt"),
    "a prompt that is a number": (lambda e: e.generate([3]), "prompt"),
    "no steps": (lambda e: e.generate("a", steps=0), "steps"),
    "a size that is no multiple": (lambda e: e.generate("a", width=100), "width = 100"),
    "fewer seeds than images": (lambda e: e.generate(["a", "b"], seeds=[1]), "seeds"),
    "a negative prompt too many": (lambda e: e.generate("a", negative=["b", "c"]), "negative"),
    "an unknown output": (lambda e: e.generate("a", steps=1, output="jpg"), "output"),
    "an unknown rule": (lambda e: e.generate("a", guidance="cgf"), "'cfg'"),
    "one level": (lambda e: e.run(torch.zeros(1, 4, 8, 8), LEVELS[:1], guidance="none"), "level"),
    "seeds of other rows": (
        lambda e: e.run(torch.zeros(2, 4, 8, 8), LEVELS, guidance="none", seeds=[1]), "seed"),
    "a model that is not there": (lambda e: sampler.load("nowhere"), "nowhere"),
    "pickled weights": (lambda e: sampler.load("pickled"), "pickle"),
    "a trainer without gradients": (
        lambda e: sampler.finetune(e, "alignprop", "compressibility", ["a"], "tuned"), "'ddpo'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_mistake_in_python_is_one_sentence(world, engine, case):
    before = everything(world)
    call, words = CALLS[case]
    with pytest.raises((ValueError, sampler.SamplerError)) as caught:
        call(engine)
    told = str(caught.value)
    assert words in told and "\n" not in told and len(told) <= LONGEST, told
    assert everything(world) == before
