"""Plain English that a small text encoder learns from: everyday words, and sentences made of them.

Words stand in classes, so that templates give questions and statements with the grammar of
questions about pictures.
"""

import re
from collections.abc import Iterator

import numpy as np

from minilora.data.generated.scenes import ShapesVQA, plural
from minilora.data.generated.shapes import picture_rng

THINGS = """
apple arch arm back bag ball balloon banana bank bar barn barrel basin basket bat bathroom bathtub beach
bear beard bed bedroom bell belt bench bicycle bike bin bird blanket blind block board boat body book
bookcase bookshelf boot border bottle bowl box boy branch bread breakfast brick bridge broccoli brush bucket
building bulb bull bus bush button cabinet cake camel camera can candle cap car card carpet carriage carrot
cart case castle cat ceiling chair chalk cheese chest chicken child church circle city clock closet cloth
cloud coast coat coffee collar color computer cone container cook cookie corner couch counter country cow
crane crayon crib crow crowd cube cup cupboard curtain cushion cycle cylinder dessert design desk diamond
dinner dish dishwasher dog doll dolphin door donut drawer dress dresser drink drum duck ear edge egg
elephant engine event eye face fan farm fan faucet fence field finger fire fireplace fish flag floor flower
food foot fork frame fridge fruit furniture game garage garden garment giraffe girl glass glasses glove goat
grape grass ground group guitar hair hand handle hat head heart hedge helicopter helmet hexagon hill hole
holder home horn horse hospital hotel house hut ice iron island jacket jar jeans job juice kettle key
keyboard kid kitchen kite knee knife knob ladder lady lake lamp land laptop leaf leg lemon letter library
lid light line lion lip lock logo luggage lunch machine magazine man map market mask mat match material meal
meat microwave milk mirror money monitor monkey moon motorcycle mountain mouse mouth mug mushroom music nail
name napkin neck necklace net night nose note number ocean octagon office onion orange oval oven owl page
paint painting pan pants paper park parking part party path pattern pen pencil pentagon people pepper person
phone photo piano picture pie piece pig pillow pipe pitcher pizza place plane plant plate platform player
pocket pole police pond pool post pot potato printer purse rabbit race rack rail railing rain ramp rectangle
refrigerator remote restaurant rice ride ring river road robe rock roll roof room rope rug sail salad sand
sandwich sauce scarf school scissors screen sculpture sea seat shade shadow shape sheep sheet shelf ship
shirt shoe shop shore shorts shoulder shower side sidewalk sign sink skateboard skater ski skin skirt sky
sleeve slice slope smile smoke snow snowboard soap sock sofa soup space speaker spoon sport spot square
stair stand star station statue steam step stick stone stool store storm stove strap street string stripe
stroller sugar suit suitcase sun surface surfboard sweater table tag tail tank tape target team television
tennis tent text tie tile time tire toast toilet tomato tongue tool tooth top towel tower town toy track
tracks traffic trail train trash tray tree triangle truck trunk trousers tub umbrella uniform van vase
vegetable vehicle vest video view wagon wall wallet wardrobe watch water wave weather wheel whiteboard wind
window wine wing wire woman wood word wrist yard year zebra zoo
""".split()

QUALITIES = """
red green blue yellow orange purple black white gray grey brown pink teal cyan magenta tan beige gold silver
maroon navy violet turquoise dark bright pale big small large little tiny huge tall short long wide narrow
thick thin high low deep round flat sharp soft hard smooth rough clean dirty new old young wet dry hot cold
warm cool full empty open closed broken heavy light fast slow happy sad angry calm tired hungry busy quiet
loud strong weak rich poor safe wild wooden metal plastic real fake striped plain main other same different
first second third last next left right front middle upper lower nearest largest smallest biggest tallest
only visible sunny cloudy rainy healthy cheap famous modern normal pretty nice good bad best better
""".split()

ACTIONS = """
ask bake bend bite blow bounce break bring brush build buy call carry catch chase cheer clean climb close
contain cook count cover cross cry cut dance dig dive drink drive eat enjoy face fall feed feel fight find
fix float fly follow get give go grow hang happen have hear help hide hit hold hug jump keep kick kiss kneel
know land laugh lay lead lean leave lift like listen live look love make move need open paint park pass pay
play point pose post pour prepare pull push put raise reach read ride roll run sail say see sell send serve
set share shine show sing sit skate ski sleep slide smell smile smoke speak spend spread stand start stay
stop surf swim swing take talk taste teach tell think throw touch travel try turn use visit wait wake walk
want wash watch wear win work write
""".split()

PLACES = """
on in under above below behind beside near between inside outside across along around against over through toward
""".split()
PLACES += ["left of", "right of", "next to", "in front of", "on top of", "close to"]

NUMBERS = "one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9 10 11 12 20 50 100".split()

OTHERS = """
a about after again all almost also always am an and any anyone anything are as at away be because been
before being both but by can could day did do does doing done down each either else enough even ever every
everyone for from had has he her here him his how i if into is isn't it its just kind later less many may me
might mine more morning most much must my never no nobody none nor not nothing now of off often once or our
out please quite rather shall she should since so some someone something soon still such than that the their
them then there these they this those to today together too top toward type twice under until up upon us
very was way we well were what when where which while who whose why will with within without would yes
yesterday yet you your afternoon evening season spring summer autumn winter breed brand century language
meter mile million minute month sort style s t re ll ve
""".split()

TEMPLATES = (
    "what color is the {thing} {place} the {thing}?",
    "what is the color of the {quality} {thing}?",
    "what color is the {quality} {thing}?",
    "what is {place} the {thing}?",
    "what is the {quality} {thing} {place} the {thing}?",
    "what is the {thing} made of?",
    "what shape is the {thing}?",
    "what shape is present?",
    "what shape does the image contain?",
    "which {thing} is {quality}?",
    "which things are {place} the {quality} {thing}?",
    "what kind of {thing} is this?",
    "what is the {thing} {action}ing?",
    "what are the {things} doing?",
    "who is {action}ing the {thing}?",
    "where is the {quality} {thing}?",
    "why is the {thing} {quality}?",
    "how many {things} are there?",
    "how many {things} are {place} the {thing}?",
    "how many {quality} {things} are in the picture?",
    "is there a {thing}?",
    "is there a {quality} {thing} in the image?",
    "is there not a {quality} {thing} in the image?",
    "is a {thing} present?",
    "is no {thing} present?",
    "does the image contain a {thing}?",
    "does the image not contain a {quality} {thing}?",
    "is the {thing} {quality}?",
    "is the {thing} {place} the {thing}?",
    "is this a {thing} or a {thing}?",
    "are the {things} {quality}?",
    "are there any {things} {place} the {thing}?",
    "do you see a {thing} {place} the {thing}?",
    "can the {thing} {action}?",
    "was the {thing} {action}ed?",
    "what {thing} is that?",
    "the {thing} is {place} the {quality} {thing}.",
    "a {quality} {thing} and {number} {things} {place} a {thing}.",
    "there are {number} {quality} {things}.",
    "{number} {things} {action} {place} the {thing}.",
    "a picture of a {quality} {thing} and a {quality} {thing}.",
    "{other} {other} {thing} {other} {action} {other}.",
    "{other} {quality} {other} {number} {other}?",
)
SLOTS = {
    "thing": THINGS,
    "things": [plural(thing) for thing in THINGS],
    "quality": QUALITIES,
    "action": ACTIONS,
    "place": PLACES,
    "number": NUMBERS,
    "other": OTHERS,
}
# This share of the sentences are questions about scenes: few different ones, but the demonstrations
# ask such questions.
SCENE_SHARE = 0.3


class Sentences:
    """`sentences[i]` is the i-th sentence; a function of (seed, i) alone."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.scenes = [record["question"] for record in ShapesVQA("vqa-source", "train", 400, seed).questions]

    def __getitem__(self, i: int) -> str:
        rng = picture_rng(self.seed, "sentences", "train", i)
        if rng.random() < SCENE_SHARE:
            return self.scenes[rng.integers(len(self.scenes))]
        template = TEMPLATES[rng.integers(len(TEMPLATES))]
        return re.sub(r"\{(\w+)\}", lambda slot: _draw(SLOTS[slot[1]], rng), template)


def _draw(words: list[str], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))]


def vocabulary_texts() -> Iterator[str]:
    """What the vocabulary is learned from: every word with its usual endings, the commonest
    words more often."""
    everyday = [*OTHERS, *NUMBERS, *PLACES, *(word for text in TEMPLATES for word in re.findall("[a-z]+", text))]
    yield from (f"{word} {word} {word}" for word in everyday)
    yield from (f"{thing} {thing} {plural(thing)}" for thing in THINGS)
    yield from (f"{quality} {quality} {quality}er" for quality in QUALITIES)
    yield from (f"{action} {action} {action}ing {action}ed" for action in ACTIONS)
    for world in ("vqa-source", "vqa"):
        yield from (record["question"] for record in ShapesVQA(world, "train", 60).questions)
