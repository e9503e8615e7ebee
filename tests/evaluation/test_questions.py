"""Scorers that ask a model about an image: vqa, dpg, geneval, on tiny random networks."""

import json
from itertools import permutations

import pytest
import torch
from PIL import Image

import sampler
from sampler import objectives
from sampler.core.errors import SamplerError
from sampler.evaluation.objects import ObjectScorer, read_objects
from sampler.evaluation.parse import scorers_from
from sampler.evaluation.questions import QuestionScorer, read_questions
from sampler.evaluation.vlm import VisionLanguage
from tests.evaluation.worlds import llava_folder
from tests.rewards import worlds
from tests.training.test_objectives import cases

TREE = [  # 3 asks about 2, which asks about 1; 4 stands by itself
    {"prompt": "a dog", "q": "is there a dog ?", "answer": "yes", "id": 1},
    {"prompt": "a dog", "q": "is the dog red ?", "answer": "yes", "parents": [1], "id": 2},
    {"prompt": "a dog", "q": "how many dog ?", "answer": "two", "parents": [2], "id": 3},
    {"prompt": "a dog", "q": "is there a cat ?", "answer": "no", "parents": [0], "id": 4},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llava_folder(tmp_path_factory.mktemp("vlm") / "llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images of two prompts."""
    root, lines = tmp_path_factory.mktemp("images"), []
    for number in range(4):
        torch.manual_seed(number)
        pixels = (torch.rand(32, 48, 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(root / f"{number}.png")
        prompt = "a dog" if number < 2 else "a cat"
        lines.append({"file_name": f"{number}.png", "prompt": prompt, "seed": number})
    write(root / "metadata.jsonl", lines)
    return root


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_probability_is_that_of_the_next_token_summed_over_the_ways_to_write_it(model):
    network, image = VisionLanguage(model), torch.rand(3, 24, 20)
    found = network.probabilities(image, "is there a dog ?", ["yes", "no", "two"])
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    inputs = network.processor(
        text=["<image> is there a dog ? "], images=[Image.fromarray(pixels)], return_tensors="pt"
    )
    with torch.no_grad():
        p = network.model(**inputs).logits[0, -1].softmax(-1)
    words = network.processor.tokenizer.get_vocab()
    wanted = [p[words["yes"]] + p[words["Yes"]], p[words["no"]] + p[words["No"]], p[words["two"]]]
    assert found == pytest.approx([float(v) for v in wanted], rel=1e-5)
    with pytest.raises(SamplerError, match="no token for the answer"):
        network.probabilities(image, "is there a dog ?", [" "])


def test_a_model_without_a_chat_template_gets_its_image_token(model, tmp_path):
    plain = VisionLanguage(llava_folder(tmp_path / "plain", chat=None))
    assert plain._text("is it red ?") == "<image>\nis it red ?"
    assert 0 < plain.probabilities(torch.rand(3, 24, 24), "is it red ?", ["yes"])[0] < 1


def test_vqa_is_the_mean_probability_of_the_right_answers(model, folder, tmp_path):
    file = write(
        tmp_path / "q.jsonl", [*TREE, {"prompt": "a cat", "q": "is there a cat ?", "answer": "yes"}]
    )
    found = sampler.evaluate(folder, f"vqa:{file}:model={model}", out=tmp_path)
    values = found.scored.images["vqa(llava)"]
    network = VisionLanguage(model)
    for row, picture in enumerate(found.scored.source.pictures):
        asked = read_questions(file)[picture.prompt]
        image = sampler.core.images.read(picture.read())[0]
        each = [network.probabilities(image, q.text, [q.answer])[0] for q in asked]
        assert values[row] == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert len(set(values)) == 4 and found["vqa(llava)"].prompts == 2
    assert "vqa(llava)" in (tmp_path / "eval.md").read_text()


def dpg(monkeypatch, tmp_path, order, right, released=False):
    """Score of an image whose answers to the questions `right` are right."""
    file = write(tmp_path / "tree.jsonl", [TREE[i] for i in order])
    scorer = QuestionScorer("dpg", file, "some/vlm", released)

    class Answers:
        def probabilities(self, image, question, answers):
            entry = next(line for line in TREE if line["q"] == question)
            yes = entry["id"] in right
            return [0.8 if yes else 0.1, *([0.3] if len(answers) > 1 else [])]

    monkeypatch.setattr(QuestionScorer, "_network", Answers())
    column = scorer.columns(torch.rand(1, 3, 16, 16), ["a dog"])
    return float(column["dpg-like(vlm, released)" if released else "dpg-like(vlm)"])


@pytest.mark.parametrize(
    ("right", "score"), [((1, 2, 3, 4), 1.0), ((2, 3, 4), 0.25), ((1, 3), 0.25), ((1, 2, 3), 0.75)]
)
def test_dpg_counts_answers_with_right_ancestors_in_any_order(monkeypatch, tmp_path, right, score):
    for order in permutations(range(4)):
        assert dpg(monkeypatch, tmp_path, order, right) == score


def test_categories_are_shares_of_raw_answers_over_all_images(monkeypatch, folder, tmp_path):
    """Of all images that have a question of it, whatever the answers to its parents are."""
    kinds = ("entity", "attribute", "attribute", "")
    lines = [{**line, "category": kind} for line, kind in zip(TREE, kinds, strict=True)]
    lines.append({"prompt": "a cat", "q": "is there a cat ?", "category": "entity"})
    file = write(tmp_path / "tree.jsonl", lines)

    class Answers:
        def probabilities(self, image, question, answers):
            right = {"is there a dog ?": 0.1, "is the dog red ?": 0.8, "how many dog ?": 0.9}
            return [right.get(question, float(image.mean() > 0.5)), 0.3][: len(answers)]

    monkeypatch.setattr(QuestionScorer, "_network", Answers())
    monkeypatch.setattr(QuestionScorer, "fingerprint", "0" * 20)
    for _ in range(2):  # the second one reads the scores of the first
        found = sampler.evaluate(folder, f"dpg:{file}:model=some/vlm", out=tmp_path / "out")
        cats = [float(sampler.core.images.read(p.read()).mean() > 0.5)
                for p in found.scored.source.pictures if p.prompt == "a cat"]  # fmt: skip
        entity, attribute = found["dpg-like(vlm).entity"], found["dpg-like(vlm).attribute"]
        assert entity.mean == pytest.approx((0 + sum(cats) / 2) / 2) and entity.images == 4
        assert attribute.mean == 1 and (attribute.prompts, attribute.images) == (1, 2)
        assert found.rows[0].scorer == "dpg-like(vlm)"
    table = (tmp_path / "out" / "eval.csv").read_text()
    assert "nan" not in table and "NaN" not in (tmp_path / "out" / "eval.json").read_text()
    against = sampler.evaluate(folder, f"dpg:{file}:model=some/vlm", against=folder)
    assert against["dpg-like(vlm).attribute"].difference.mean == 0
    assert against["dpg-like(vlm).attribute"].images == 2


def test_a_category_is_the_share_of_all_its_questions(monkeypatch, folder, tmp_path):
    """A prompt with three questions counts three times, in the mean and in its interval."""
    lines = [{**line, "category": "entity"} for line in TREE[:3]]
    lines.append({"prompt": "a cat", "q": "is there a cat ?", "category": "entity"})
    file = write(tmp_path / "tree.jsonl", lines)

    class Answers:
        def probabilities(self, image, question, answers):
            return [0.8 if "cat" in question else 0.1, 0.3][: len(answers)]

    monkeypatch.setattr(QuestionScorer, "_network", Answers())
    monkeypatch.setattr(QuestionScorer, "fingerprint", "1" * 20)
    found = sampler.evaluate(folder, f"dpg:{file}:model=some/vlm", against=folder)
    row, whole = found["dpg-like(vlm).entity"], found["dpg-like(vlm)"]
    assert row.mean == row.other == pytest.approx(1 / 4) and whole.mean == pytest.approx(1 / 2)
    assert row.interval == pytest.approx((0, 1)) and row.difference.mean == 0


def test_the_released_form_depends_on_the_order_of_the_file(monkeypatch, tmp_path):
    found = {
        dpg(monkeypatch, tmp_path, o, (2, 3, 4), released=True) for o in permutations(range(4))
    }
    assert found == {0.25, 0.5}


@pytest.mark.parametrize(("about", "a"), cases("evaluation", "dpg"))
def test_released_scores_are_the_published_ones(about, a):
    order, parents = about["order"], about["parents"]
    score = objectives.score_questions(order, parents, about["answers"], released=True)
    assert score == pytest.approx(about["score"], abs=1e-12)


@pytest.mark.parametrize(("about", "a"), cases("evaluation", "geneval"))
def test_the_share_is_one_for_correct_images_alone(about, a):
    given = (about["boxes"], about["colours"], about["metadata"])
    share = objectives.geneval_share(*given)
    assert 0 <= share <= 1 and (share == 1) == objectives.geneval_correct(*given)


OBJECTS = [
    {"prompt": "a dog", "include": [{"class": "dog", "count": 1, "color": "red"}]},
    {
        **{"prompt": "a cat", "tag": "counting", "include": [{"class": "cat", "count": 2}]},
        "exclude": [{"class": "car", "count": 3}],
    },
]


def test_geneval_reads_the_boxes_of_a_detector_and_colours_of_clip(folder, tmp_path):
    """End to end on random networks; correctness is that of the rules on what they found."""
    clip = worlds.clip_folder(tmp_path / "clip")
    detector = worlds.vision_folder(tmp_path / "yolos", "yolos")
    file = write(tmp_path / "objects.jsonl", OBJECTS)
    spec = f"geneval:{file}:detector={detector}:clip={clip}:threshold=0.1"
    found = sampler.evaluate(folder, spec)
    label = "geneval-like(yolos)"
    assert {label, f"{label}.share"} <= set(found.scored.images)
    (scorer,) = scorers_from([spec])
    asked = dict(zip(("a dog", "a cat"), OBJECTS, strict=True))
    for row, picture in enumerate(found.scored.source.pictures):
        image = sampler.core.images.read(picture.read())[0]
        boxes = scorer.boxes(image, asked[picture.prompt])
        colours = {n: [scorer.colour(image, n, b) for b in boxes[n]] for n in boxes}
        correct = objectives.geneval_correct(boxes, colours, asked[picture.prompt])
        assert found.scored.images[label][row] == correct
    boxes = scorer.boxes(image, {"include": [{"class": "dog", "count": 1}]})["dog"]
    assert boxes and all(len(box) == 5 and box[4] > 0.1 for box in boxes)
    assert [box[4] for box in boxes] == sorted((box[4] for box in boxes), reverse=True)
    assert not scorer.boxes(image, {"tag": "counting", **OBJECTS[0]})["dog"]


def test_boxes_are_pixels_of_the_image_and_an_open_vocabulary_takes_phrases(tmp_path):
    torch.manual_seed(3)
    image = torch.rand(3, 40, 60)
    path = worlds.grounding_folder(tmp_path / "grounding")
    scorer = ObjectScorer("none", path, threshold=0.01)
    (boxes,) = scorer.boxes(image, {"include": [{"class": "a red dog", "count": 1}]}).values()
    p, shares = scorer._detector.detections(image[None], ["a red dog"])[0]
    answer = scorer._detector._answer(scorer._detector.prepare(image[None]), "a red dog")
    x, y, w, h = answer.pred_boxes[0, int(p[0].argmax())].tolist()
    wanted = [60 * (x - w / 2), 40 * (y - h / 2), 60 * (x + w / 2), 40 * (y + h / 2)]
    assert boxes[0][:4] == pytest.approx(wanted, abs=1e-3)
    assert boxes[0][4] == pytest.approx(float(p.max()))


def test_a_colour_is_that_of_the_box(tmp_path, monkeypatch):
    """By a stand-in for CLIP whose embedding is the mean colour."""
    tones = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}

    class Colours:
        def text(self, texts):
            words = [next((c for c in tones if c in text), None) for text in texts]
            return torch.tensor([tones.get(w, (-1, -1, -1)) for w in words]).float()

        def image(self, crop):
            assert min(crop.shape[2:]) >= 16
            return crop.mean((2, 3))

    monkeypatch.setattr(ObjectScorer, "_clip", Colours())
    image = torch.zeros(3, 40, 40)
    image[0, :, :20], image[2, :, 20:] = 1, 1
    scorer = ObjectScorer("none", "detector")
    assert scorer.colour(image, "dog", (0, 0, 19, 39)) == "red"
    assert scorer.colour(image, "dog", (21, 0, 39, 39)) == "blue"
    assert scorer.colour(image, "dog", (38, 38, 39, 39)) == "blue"  # grown to 16 pixels


def test_tables_of_text_and_of_json_say_the_same(tmp_path):
    table = tmp_path / "q.csv"
    table.write_text(
        'prompt,id,q,answer,parents\na,1,Is it?,yes,0\na,2,Red?,,"1"\na,3,Big?,no,"[1, 2]"\n'
        'a,4,Old?,0,"1,2"\n'
    )
    lines = [
        {"prompt": "a", "id": 1.0, "q": "Is it?", "answer": True, "parents": "0"},
        {"prompt": "a", "id": "2", "q": "Red?", "parents": 1},
        {"prompt": "a", "id": 3, "q": "Big?", "answer": False, "parents": [1.0, 2.0]},
        {"prompt": "a", "id": 4, "q": "Old?", "answer": 0, "parents": [1, 2]},
    ]
    found = read_questions(str(table))
    assert found == read_questions(write(tmp_path / "q.jsonl", lines))
    assert [q.parents for q in found["a"]] == [(), (1,), (1, 2), (1, 2)]
    assert [q.answer for q in found["a"]] == ["yes", "yes", "no", "0"]
    table.write_text('prompt,include\na,"[{""class"": ""dog"", ""count"": 2}]"\n')
    row = {"prompt": "a", "include": [{"class": "dog", "count": 2}]}
    assert read_objects(str(table)) == read_objects(write(tmp_path / "o.jsonl", [row, row]))
    write(tmp_path / "o.jsonl", [row, {**row, "include": [dog()]}])
    with pytest.raises(SamplerError, match="'a' has another row already"):
        read_objects(str(tmp_path / "o.jsonl"))


def dog(**more):
    return {"class": "dog", "count": 1, **more}


@pytest.mark.parametrize(
    ("scorer", "line", "problem"),
    [
        ("geneval", {}, "is the name of a protocol.*geneval-like"),
        ("dpg", {}, "is the name of a protocol.*dpg-like"),
        ("vqa", {}, "vqa needs questions=PATH, as in vqa:FILE:model=DIR"),
        ("dpg:FILE", TREE[0], "dpg needs model=PATH"),
        ("vqa:FILE:model=MODEL:colour=red", TREE[0], "vqa has no option 'colour'"),
        ("vqa:nowhere.jsonl:model=MODEL", {}, "nowhere.jsonl does not exist"),
        ("vqa:FILE:model=MODEL", {"prompt": "a"}, "q is missing"),
        ("vqa:FILE:model=MODEL", {**TREE[0], "colour": 1}, "'colour'.*has the columns"),
        (
            "vqa:FILE:model=MODEL",
            {**TREE[0], "parents": [7]},
            "the parent 7 is not among the questions",
        ),
        ("vqa:FILE:model=MODEL", {**TREE[0], "parents": ["x"]}, "must be numbers"),
        ("vqa:FILE:model=MODEL", {**TREE[0], "parents": [TREE[0]["id"]]}, "depends on itself"),
        ("vqa:FILE:model=MODEL", {**TREE[0], "id": 0}, "must be numbers of questions, from 1"),
        ("vqa:FILE:model=MODEL", {**TREE[0], "id": 1.5}, "must be numbers"),
        ("vqa:FILE:model=MODEL", {**TREE[0], "prompt": ["a cat"]}, "prompt must be a text, not"),
        ("dpg:FILE:model=MODEL:released=maybe", TREE[0], "released must be true or false"),
        ("vqa:FILE:model=", TREE[0], "'model=' must be OPTION=VALUE"),
        ("vqa:FILE:model=MODEL", TREE[0], "'a cat' has no entry"),
        ("geneval:FILE:detector=YOLOS", OBJECTS[0], "give clip=FOLDER"),
        (
            "geneval:FILE:detector=YOLOS",
            {"prompt": "a", "include": [{"class": "fox", "count": 1}]},
            "has no class 'fox'",
        ),
        (
            "geneval:FILE:detector=YOLOS",
            {"prompt": "a", "include": [{"class": "dog", "color": "teal"}]},
            "color must be one of red",
        ),
        ("geneval:FILE:detector=YOLOS", {"prompt": "a", "include": "dog"}, "must be a list"),
        ("geneval:FILE:detector=YOLOS:threshold=2", OBJECTS[1], "above 0 and below 1"),
        ("geneval:FILE:detector=YOLOS:threshold=high", OBJECTS[1], "above 0 and below 1"),
        *[
            ("geneval:FILE:detector=YOLOS", {"prompt": "a", "include": include, **more}, problem)
            for include, more, problem in (
                ([dog(position=["left of", 0])], {}, "an earlier object"),
                ([dog(), dog(position=["left-of", 0])], {}, "left of, right of, above, below"),
                ([dog(), dog(position=["above", "0"])], {}, "an earlier object"),
                ([dog(), dog(position=3)], {}, "an earlier object"),
                ([dog(colour="red")], {}, "'colour': the object 'dog' has class, count, color"),
                ([dog()], {"exclude": [dog(color="red")]}, "'color': the object 'dog' has class"),
                ([dog()], {"exlude": [dog()]}, "'exlude': a row has prompt, include, exclude"),
                ([dog()], {"tag": "count"}, "tag must be one of single_object"),
                ([dog(count=17)], {}, "an integer from 1 to 16, not 17"),
                ([dog(count=True)], {}, "an integer from 1 to 16, not True"),
                ([], {}, "include must name an object"),
            )
        ],
    ],
)
def test_what_does_not_fit_is_one_sentence(model, folder, tmp_path, scorer, line, problem):
    file = write(tmp_path / "file.jsonl", [line])
    if "YOLOS" in scorer:
        worlds.vision_folder(tmp_path / "YOLOS", "yolos")
    spec = scorer.replace("FILE", file).replace("MODEL", model)
    spec = spec.replace("YOLOS", str(tmp_path / "YOLOS"))
    with pytest.raises(SamplerError, match=problem) as error:
        sampler.evaluate(folder, spec)
    assert "\n" not in str(error.value)
