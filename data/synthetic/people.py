"""Who is drawn: a person is a list of words (build, hair, clothes, bag) from vocabularies that all people share.

So many people look alike, and a share of them are near twins: two people who differ in one visible detail.
"""

from collections import namedtuple

import numpy as np

COLOURS = {
    "black": (40, 40, 44), "white": (238, 236, 230), "grey": (132, 134, 138), "navy": (44, 56, 100),
    "blue": (58, 112, 196), "denim": (92, 118, 156), "red": (196, 52, 54), "ginger": (160, 86, 50),
    "green": (62, 134, 84), "yellow": (234, 192, 72), "pink": (230, 148, 170), "beige": (208, 188, 154),
    "brown": (122, 84, 58), "blond": (214, 176, 104), "pale": (244, 208, 180), "tan": (206, 156, 118),
    "dark": (128, 86, 62),
}  # fmt: skip
VOCABULARY = {  # a word that is listed twice is twice as common
    "build": ("slim", "medium", "medium", "broad"),
    "height": ("short", "medium", "tall"),
    "skin": ("pale", "pale", "tan", "dark"),
    "hair": ("short", "short", "long", "ponytail", "bun", "bald", "cap"),
    "hair_colour": ("black", "brown", "brown", "blond", "grey", "ginger"),  # of the cap, for someone who wears one
    "top": ("t-shirt", "t-shirt", "shirt", "hoodie", "jacket", "coat", "vest"),
    "top_colour": ("black", "black", "white", "white", "grey", "navy", "blue", "red", "green", "yellow", "pink"),
    "second_colour": ("black", "white", "grey", "navy", "red", "yellow"),  # of a pattern, or under an open jacket
    "pattern": ("plain", "plain", "plain", "stripes", "checks", "print", "yoke"),
    "bottom": ("trousers", "trousers", "trousers", "shorts", "skirt"),
    "bottom_colour": ("black", "black", "navy", "denim", "denim", "grey", "beige", "brown"),
    "shoes": ("black", "white", "brown", "red"),
    "bag": ("none", "none", "backpack", "backpack", "shoulder bag", "tote"),
    "bag_colour": ("black", "brown", "red", "blue"),
}
TWIN_SHARE = 0.4  # of all people
TWIN_DETAILS = [name for name in VOCABULARY if name not in ("build", "height", "skin")]

Person = namedtuple("Person", VOCABULARY)


def visible(person: Person) -> Person:
    """The person without the details that cannot be seen: the colour of no bag, say."""
    if person.bag == "none":
        person = person._replace(bag_colour="")
    if person.hair == "bald":
        person = person._replace(hair_colour="")
    if person.pattern == "plain" and person.top not in ("jacket", "coat"):
        person = person._replace(second_colour="")
    return person


def random_person(rng: np.random.Generator) -> Person:
    person = Person(*(words[rng.integers(len(words))] for words in VOCABULARY.values()))
    others = [colour for colour in VOCABULARY["second_colour"] if colour != person.top_colour]
    return person._replace(second_colour=others[rng.integers(len(others))])


def near_twin(person: Person, rng: np.random.Generator) -> Person:
    """The same person but for one detail that can be seen."""
    while True:
        detail = TWIN_DETAILS[rng.integers(len(TWIN_DETAILS))]
        twin = person._replace(**{detail: VOCABULARY[detail][rng.integers(len(VOCABULARY[detail]))]})
        if visible(twin) != visible(person) and twin.second_colour != twin.top_colour:
            return twin


def people(num_ids: int, seed: int, stream: int) -> list[Person]:
    """num_ids people of whom no two look the same; the last TWIN_SHARE / 2 of them are twins of the first ones."""
    rng = np.random.default_rng([seed, stream])
    twins = int(num_ids * TWIN_SHARE / 2)
    group, known = [], set()
    while len(group) < num_ids:
        source = len(group) - (num_ids - twins)
        person = near_twin(group[source], rng) if source >= 0 else random_person(rng)
        if visible(person) not in known:
            known.add(visible(person))
            group.append(person)
    return group
